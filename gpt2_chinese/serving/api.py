"""What a request over HTTP may look like: one table of fields for the checks and for /openapi.json.

Nothing but a CompletionRequest or a ApiError comes out of a request's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from gpt2_chinese.decoding.completion import MAX_LOGPROBS, SAMPLING_LIMITS, SamplingParams

DEFAULT_LENGTH = 50
DEFAULT_SAMPLES = 5
V1_DEFAULT_LENGTH = 16
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256

MAX_TOKENS = 2**31
"""More than any vocabulary has; stands for one that is not known yet."""

MIN_TOP_P = 1e-6
"""Leaves the likeliest token only. In /v1/completions top_p 0 means that; in the engine 0 is off."""

Schema = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for and how long it may take; how much the server takes at once."""

    samples: int = 32
    length: int = 1024
    prompts: int = 16
    body_bytes: int = 65_536
    body_seconds: float = 5.0
    request_seconds: float = 120.0
    idle_seconds: float = 5.0
    connections: int = 800


@dataclass(frozen=True)
class CompletionRequest:
    """A request that has been checked: `samples` completions of each context, a text or a list of ids.

    `model` is the name that was asked for, None where none was.
    """

    contexts: tuple[str | tuple[int, ...], ...]
    length: int
    samples: int
    settings: SamplingParams
    seed: int | None
    stop: tuple[str, ...] = ()
    stream: bool = False
    logprobs: int | None = None
    echo: bool = False
    scored: bool = False
    include_usage: bool = False
    model: str | None = None


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


# The fields. A field that is null counts as not given.


def _whole(default: int | None, low: float, high: float, description: str) -> Schema:
    return _number(default, low, high, description) | {"type": ["integer", "null"]}


def _number(default: float | None, low: float, high: float, description: str) -> Schema:
    return {
        "type": ["number", "null"],
        "minimum": low,
        "maximum": high,
        "default": default,
        "description": description,
    }


def _flag(description: str) -> Schema:
    return {"type": ["boolean", "null"], "default": False, "description": description}


def _neutral(description: str, *values: Any) -> Schema:
    """A parameter that OpenAI's clients may send, of which only the values that change nothing are taken."""
    return {"enum": [None, *values], "description": description}


def _sampling(top_k: int, top_p: float) -> dict[str, Schema]:
    setting = SamplingParams()
    return {
        "temperature": _number(setting.temperature, *SAMPLING_LIMITS["temperature"], "0 takes the likeliest token"),
        "top_k": _whole(top_k, *SAMPLING_LIMITS["top_k"], "draw from the k likeliest tokens; 0 is off"),
        "top_p": _number(top_p, *SAMPLING_LIMITS["top_p"], "draw from the likeliest tokens that make p; 1 is off"),
        "repetition_penalty": _number(
            setting.repetition_penalty, *SAMPLING_LIMITS["repetition_penalty"], "above 1 avoids repeats"
        ),
        "seed": _whole(None, *SAMPLING_LIMITS["seed"], "the same seed gives the same texts"),
        "stop": {
            "anyOf": [
                {"type": "null"},
                {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                {
                    "type": "array",
                    "maxItems": MAX_STOP_STRINGS,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
                },
            ],
            "description": "texts that end a completion, which is cut before them",
        },
        "stream": _flag("answer with server-sent events while the texts grow"),
    }


_MODEL: Schema = {
    "type": ["string", "null"],
    "description": "the model's name, as GET /v1/models has it; the first one where it is not given",
}


@cache
def generate_fields(limits: Limits) -> dict[str, Schema]:
    """The fields of POST /generate and POST /, as JSON schemas."""
    length, samples = min(DEFAULT_LENGTH, limits.length), min(DEFAULT_SAMPLES, limits.samples)
    return {
        "context": {"type": "string", "description": "the text to go on with"},
        "maxlength": _whole(length, 1, limits.length, "tokens of a completion"),
        "samples": _whole(samples, 1, limits.samples, "completions"),
        "model": _MODEL,
        **_sampling(SamplingParams().top_k, SamplingParams().top_p),
    }


@cache
def v1_fields(limits: Limits, vocab_size: int = MAX_TOKENS) -> dict[str, Schema]:
    """The fields of POST /v1/completions, as JSON schemas; `vocab_size` is the largest of the models."""
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}}
    return {
        "model": _MODEL,
        "prompt": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "maxItems": limits.prompts, "items": {"type": "string"}},
                ids,
                {"type": "array", "minItems": 1, "maxItems": limits.prompts, "items": ids},
            ],
            "description": "a text, texts, a list of token ids or lists of token ids",
        },
        "max_tokens": _whole(
            min(V1_DEFAULT_LENGTH, limits.length),
            0,
            limits.length,
            "tokens of a completion; 0 with echo and logprobs says how likely the prompt's own are",
        ),
        "n": _whole(1, 1, limits.samples, "completions of each prompt"),
        "best_of": _whole(None, 1, limits.samples, "must be n where it is given"),
        **_sampling(0, 1.0),
        "echo": _flag("put the prompt before the completion, and its tokens before the completion's in logprobs"),
        "logprobs": _whole(None, 0, MAX_LOGPROBS, "report the tokens' logprobs and so many likeliest tokens"),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": {"type": ["boolean", "null"]}},
            "additionalProperties": False,
            "description": "include_usage: a last chunk with the usage",
        },
        "presence_penalty": _neutral("only 0; repetition_penalty is there instead", 0),
        "frequency_penalty": _neutral("only 0; repetition_penalty is there instead", 0),
        "logit_bias": {"type": ["object", "null"], "maxProperties": 0, "description": "only an empty one"},
        "suffix": _neutral("only an empty one", ""),
        "user": {"type": ["string", "null"], "description": "taken and not used"},
    }


# Checks.


def parse_json_object(body: bytes, example: str) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no duplicate names, no NaN, and no error but a ApiError."""
    if not body.strip():
        raise ApiError(400, "empty_body", f"the body is empty; send JSON such as {example}")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError(
            400,
            "not_utf8",
            f"the body is not UTF-8 at byte {error.start}; in cmd.exe write Chinese as \\u escapes: \\u4f60\\u597d",
        ) from None

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise ApiError(400, "duplicate_field", f"{_quoted(name)} stands there twice", name)
            fields[name] = value
        return fields

    def no_constant(name: str) -> NoReturn:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {name} is not a JSON number")

    try:
        value = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, "invalid_json", f"the body is not JSON: {where}: {error.msg}") from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "the body is nested too deeply") from None
    except ValueError:
        # Python refuses to convert integers of thousands of digits.
        raise ApiError(400, "invalid_json", "the body has a number with too many digits") from None
    if not isinstance(value, dict):
        raise ApiError(400, "not_an_object", f"the body must be a JSON object, it is {_json_type(value)}")
    return value


def parse_generate(body: bytes, limits: Limits) -> CompletionRequest:
    """Check a request of /generate.

    Raises:
        ApiError: the first thing that is wrong, with the field's name.
    """
    fields = _known(parse_json_object(body, '{"context": "你好"}'), generate_fields(limits))
    context = fields["context"]
    if context is None:
        raise ApiError(400, "missing_field", 'context is missing; send JSON such as {"context": "你好"}', "context")
    if not isinstance(context, str):
        raise _wrong_type("context", "a string", context)
    return CompletionRequest(
        contexts=(_characters("context", context),),
        length=fields["maxlength"],
        samples=fields["samples"],
        settings=_settings(fields),
        seed=fields["seed"],
        stop=_stop(fields["stop"]),
        stream=fields["stream"],
        model=fields["model"],
    )


def parse_v1(body: bytes, limits: Limits, vocab_size_of: Callable[[str | None], int | None]) -> CompletionRequest:
    """Check a request of /v1/completions.

    Args:
        vocab_size_of: the number of tokens of the model of a name, or of the one for those who name none; None while
            it is not known. It raises a ApiError for a name that is none.

    Raises:
        ApiError: the first thing that is wrong, with the parameter's name.
    """
    fields = _known(parse_json_object(body, '{"prompt": "你好"}'), v1_fields(limits))
    vocab_size = vocab_size_of(fields["model"]) or MAX_TOKENS
    if fields["prompt"] is None:
        raise ApiError(400, "missing_field", 'prompt is missing; send JSON such as {"prompt": "你好"}', "prompt")
    contexts = _prompts(fields["prompt"], limits.prompts, vocab_size)
    if fields["best_of"] not in (None, fields["n"]):
        raise ApiError(400, "unsupported", f"best_of must be n, which is {fields['n']}; leave it out", "best_of")
    scored = bool(fields["echo"]) and fields["logprobs"] is not None
    if fields["max_tokens"] == 0 and not scored:
        message = "max_tokens 0 leaves nothing to answer; take 1 or more, or echo and logprobs too"
        raise ApiError(400, "out_of_range", message, "max_tokens")
    settings = _settings(fields)
    if settings.top_p < MIN_TOP_P:
        settings = SamplingParams(settings.temperature, settings.top_k, MIN_TOP_P, settings.repetition_penalty)
    return CompletionRequest(
        contexts=contexts,
        length=fields["max_tokens"],
        samples=fields["n"],
        settings=settings,
        seed=fields["seed"],
        stop=_stop(fields["stop"]),
        stream=fields["stream"],
        logprobs=fields["logprobs"],
        echo=fields["echo"],
        scored=scored,
        include_usage=_include_usage(fields["stream_options"]),
        model=fields["model"],
    )


def _known(given: dict[str, Any], schemas: dict[str, Schema]) -> dict[str, Any]:
    """Every field with its value or default; names that are not known and values outside a schema are refused."""
    for name in given:
        if name not in schemas:
            message = f"there is no field {_quoted(name)}; the fields are {', '.join(schemas)}"
            raise ApiError(400, "unknown_field", message, name)
    fields = {}
    for name, schema in schemas.items():
        value = given.get(name)
        if value is None:
            fields[name] = schema.get("default")
        else:
            value = _whole_if_it_is(value) if schema.get("type", [""])[0] == "integer" else value
            _check_scalar(name, value, schema)
            fields[name] = value
    return fields


def _whole_if_it_is(value: Any) -> Any:
    """5.0 is a whole number in JSON, which knows one kind of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_scalar(name: str, value: Any, schema: Schema) -> None:
    kind = (schema.get("type") or [""])[0]
    if kind in ("integer", "number"):
        words = "a whole number" if kind == "integer" else "a number"
        if type(value) is not int and (kind == "integer" or type(value) is not float):
            raise _wrong_type(name, words, value)
        low, high = schema["minimum"], schema["maximum"]
        if not low <= value <= high:
            raise ApiError(400, "out_of_range", f"{name} must be {words} from {low} to {high}", name)
    elif kind == "boolean" and type(value) is not bool:
        raise _wrong_type(name, "true or false", value)
    elif schema.get("type") == ["string", "null"]:
        if not isinstance(value, str):
            raise _wrong_type(name, "a string", value)
        _characters(name, value)
    elif kind == "object" and not isinstance(value, dict):
        raise _wrong_type(name, "an object", value)
    elif value == {} or "enum" not in schema and "maxProperties" not in schema:
        return
    elif isinstance(value, bool) or "maxProperties" in schema or value not in schema["enum"]:
        raise ApiError(400, "unsupported", f"{name} is not supported: {schema['description']}", name)


def _settings(fields: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        temperature=float(fields["temperature"]),
        top_k=fields["top_k"],
        top_p=float(fields["top_p"]),
        repetition_penalty=float(fields["repetition_penalty"]),
    )


def _characters(name: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"{name} has half of a surrogate pair at character {error.start + 1}, which is no character"
        raise ApiError(400, "invalid_character", message, name) from None
    return text


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise _wrong_type("stop", "a string or an array of strings", text if isinstance(value, list) else value)
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            message = f"a stop string must have 1 to {MAX_STOP_LENGTH} characters, one has {len(text)}"
            raise ApiError(400, "out_of_range", message, "stop")
        _characters("stop", text)
    if len(texts) > MAX_STOP_STRINGS:
        message = f"stop may have {MAX_STOP_STRINGS} strings, it has {len(texts)}"
        raise ApiError(400, "out_of_range", message, "stop")
    return tuple(texts)


def _prompts(value: Any, most: int, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    words = "a string, an array of strings, an array of token ids or an array of such arrays"
    if isinstance(value, str):
        return (_characters("prompt", value),)
    if not isinstance(value, list):
        raise _wrong_type("prompt", words, value)
    value = [_whole_if_it_is(item) for item in value]
    if value and all(type(item) is int for item in value):
        return (_ids(value, vocab_size),)
    if not 1 <= len(value) <= most:
        raise ApiError(400, "out_of_range", f"prompt may have 1 to {most} texts, it has {len(value)}", "prompt")
    if all(isinstance(item, str) for item in value):
        return tuple(_characters("prompt", item) for item in value)
    lists = [[_whole_if_it_is(id_) for id_ in item] for item in value if isinstance(item, list)]
    if len(lists) == len(value) and all(type(id_) is int for ids in lists for id_ in ids):
        return tuple(_ids(ids, vocab_size) for ids in lists)
    raise ApiError(400, "wrong_type", f"prompt must be {words}; this array holds something else", "prompt")


def _ids(ids: list[int], vocab_size: int) -> tuple[int, ...]:
    if not ids:
        raise ApiError(
            400, "out_of_range", 'a prompt of token ids must have at least one; "" is an empty text', "prompt"
        )
    for id_ in ids:
        if not 0 <= id_ < vocab_size:
            message = f"the vocabulary has the ids from 0 to {vocab_size - 1}; prompt has another"
            raise ApiError(400, "out_of_range", message, "prompt")
    return tuple(ids)


def _include_usage(options: dict[str, Any] | None) -> bool:
    for name, value in (options or {}).items():
        param = f"stream_options.{name}"
        if name != "include_usage":
            message = f"there is no field {_quoted(name)} in stream_options, only include_usage"
            raise ApiError(400, "unknown_field", message, param)
        if value is not None and type(value) is not bool:
            raise _wrong_type(param, "true or false", value)
    return bool((options or {}).get("include_usage"))


def _wrong_type(name: str, words: str, value: Any) -> ApiError:
    return ApiError(400, "wrong_type", f"{name} must be {words}, it is {_json_type(value)}", name)


def _quoted(name: str) -> str:
    return json.dumps(name if len(name) <= 60 else name[:60] + "…", ensure_ascii=False)


def _json_type(value: Any) -> str:
    if isinstance(value, float) or type(value) is int:
        return "a fraction" if isinstance(value, float) else "a number"
    names = {str: "a string", bool: "true or false", list: "an array", dict: "an object", type(None): "null"}
    return names[type(value)]


# The description.


def openapi(limits: Limits, vocab_size: int, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of this server with its limits."""
    text, whole = {"type": "string"}, {"type": "integer"}
    error = _object(error=_object(message=text, type=text, param={"type": ["string", "null"]}, code=text))
    logprobs = _object(
        tokens={"type": "array", "items": text},
        token_logprobs={"type": "array", "items": {"type": ["number", "null"]}},
        top_logprobs={"type": ["array", "null"], "items": {"type": ["object", "null"]}},
        text_offset={"type": "array", "items": whole},
    )
    choice = _object(
        text=text,
        index=whole,
        logprobs=logprobs | {"type": ["object", "null"]},
        finish_reason={"enum": ["stop", "length"]},
    )
    completion = _object(
        id=text,
        object={"const": "text_completion"},
        created=whole,
        model=text,
        choices={"type": "array", "items": choice},
        usage=_object(prompt_tokens=whole, completion_tokens=whole, total_tokens=whole),
    )
    model = _object(id=text, object={"const": "model"}, created=whole, owned_by=text)
    of_model = _object(
        model=text,
        status={"enum": ["loading", "ready", "dead"]},
        running=whole,
        waiting=whole,
        full_speed={"type": "boolean"},
        n_ctx={"type": ["integer", "null"]},
    )
    health = _object(
        status={"enum": ["loading", "ready", "draining", "dead"]},
        model=text,
        device={"type": ["string", "null"]},
        running=whole,
        waiting=whole,
        full_speed={"type": "boolean"},
        n_ctx={"type": ["integer", "null"]},
        models={"type": "array", "items": of_model},
        maxlength=whole,
        samples=whole,
    )

    def answer(schema: Schema | None, kind: str = "application/json", *more: str) -> Schema:
        content: Schema = {kind: {"schema": schema} if schema else {}}
        return {"description": "the answer", "content": content | {other: {} for other in more}}

    def operation(summary: str, good: Schema, *errors: int, body: Schema | None = None) -> Schema:
        refusals = {str(status): answer(error) for status in sorted({*errors, *([401] if needs_key else [])})}
        described: Schema = {"summary": summary, "responses": {"200": good, **refusals}}
        if body is not None:
            described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        return described

    def body(fields: dict[str, Schema], required: str) -> Schema:
        return {"type": "object", "properties": fields, "required": [required], "additionalProperties": False}

    posted = (400, 408, 413, 415, 429, 500, 503, 504)
    generate = operation(
        "complete a text",
        answer({"type": "array", "items": text}, "application/json", "text/event-stream"),
        *posted,
        404,
        body=body(generate_fields(limits), "context"),
    )
    document = {
        "openapi": "3.1.0",
        "info": {"title": "GPT2-Chinese", "version": "1"},
        "paths": {
            "/generate": {"post": generate},
            "/": {
                "post": generate,
                "get": {"summary": "the page", "responses": {"200": answer(text, "text/html")}},
            },
            "/v1/completions": {
                "post": operation(
                    "complete texts as OpenAI's API does",
                    answer(completion, "application/json", "text/event-stream"),
                    *posted,
                    404,
                    body=body(v1_fields(limits, vocab_size), "prompt"),
                )
            },
            "/v1/models": {
                "get": operation(
                    "the models", answer(_object(object={"const": "list"}, data={"type": "array", "items": model}))
                )
            },
            "/v1/models/{model}": {
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
                "get": operation("the model by its name", answer(model), 404),
            },
            "/health": {
                "get": {
                    "summary": "how the server is; 503 while it takes no requests",
                    "responses": {"200": answer(health), "503": answer(health)},
                }
            },
            "/metrics": {"get": operation("Prometheus' text format", answer(text, "text/plain"))},
            "/openapi.json": {"get": operation("this document", answer({"type": "object"}))},
        },
    }
    if needs_key:
        document["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        for path, methods in document["paths"].items():  # type: ignore[attr-defined]
            for method, described in methods.items():
                if method in ("get", "post") and (path, method) not in (("/", "get"), ("/health", "get")):
                    described["security"] = [{"key": []}]
    return document


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}
