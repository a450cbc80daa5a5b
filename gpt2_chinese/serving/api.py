"""The requests of the HTTP API: one table of fields, which the checks and /openapi.json share.

A request's bytes become a CompletionRequest or raise an ApiError, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NoReturn

from gpt2_chinese.decoding.completion import MAX_LOGPROBS, SAMPLING_LIMITS, SamplingParams
from gpt2_chinese.serving.errors import ApiError

DEFAULT_LENGTH = 50
DEFAULT_SAMPLES = 5
V1_DEFAULT_LENGTH = 16
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_BAD_WORDS = 32
MAX_BAD_WORD_LENGTH = 64
MAX_STOP_TOKENS = 32
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100

MAX_TOKENS = 2**31
"""Larger than any vocabulary; stands for the size of one that is not loaded yet."""

MIN_TOP_P = 1e-6
"""Keeps only the most likely token. /v1/completions means that by top_p 0, which is off in the engine."""

Schema = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """The largest request that is accepted, its time limits, and the number of connections.

    Attributes:
        answer_bytes: the most that an answer may be able to have, see answer_size.py.
        pending_bytes: the same of all requests that are under way together.
    """

    samples: int = 32
    length: int = 1024
    prompts: int = 16
    body_bytes: int = 65_536
    answer_bytes: int = 8 << 20
    pending_bytes: int = 64 << 20
    body_seconds: float = 5.0
    request_seconds: float = 120.0
    idle_seconds: float = 5.0
    connections: int = 800


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request: `samples` completions of each context, which is a text or a list of token ids.

    Attributes:
        scored: report the logprobs of the contexts' own tokens too.
        model: the name of the model; None is the first one.
        length_field: what the request calls `length`, for error messages.
        distinct: no two completions of a context have the same text.
        until_sentence: a completion ends with its first sentence.
        sort_likely: order the completions of a context by score.
        with_scores: report the scores.
        best_of: completions that are decoded, of which the `samples` likeliest are returned; None is `samples`.
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
    length_field: str = "maxlength"
    distinct: bool = True
    until_sentence: bool = False
    sort_likely: bool = False
    with_scores: bool = False
    best_of: int | None = None

    @property
    def sequences(self) -> int:
        """Sequences that are decoded for each context."""
        return self.best_of or self.samples

    @property
    def needs_scores(self) -> bool:
        """Whether the completions must have scores."""
        return self.sort_likely or self.with_scores or self.sequences > self.samples


# The fields. A field that is null is treated as absent.


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


def _flag(description: str, default: bool = False) -> Schema:
    return {"type": ["boolean", "null"], "default": default, "description": description}


def _choice(description: str, *values: str) -> Schema:
    return {"type": ["string", "null"], "enum": [None, *values], "description": description}


def _array_of(items: Schema, most: int, description: str) -> Schema:
    return {"type": ["array", "null"], "maxItems": most, "items": items, "description": description}


def _neutral(description: str, *values: Any) -> Schema:
    """A parameter of OpenAI's API that is not supported: only values without an effect are accepted."""
    return {"enum": [None, *values], "description": description}


def pattern_up_to(last: int) -> str:
    """A regular expression for the decimal numbers from 0 to this one.

    Example:
        >>> pattern_up_to(25)
        '0|[1-9][0-9]{0,0}|[1-1][0-9]{1}|2[0-4][0-9]{0}|25'
    """
    digits = str(last)
    parts = ["0"]
    if len(digits) > 1:
        parts.append(f"[1-9][0-9]{{0,{len(digits) - 2}}}")
    for place, digit in enumerate(digits):
        least = 0 if place else 1
        if int(digit) > least:
            parts.append(f"{digits[:place]}[{least}-{int(digit) - 1}][0-9]{{{len(digits) - place - 1}}}")
    return "|".join([*parts, digits])


def _sampling(top_k: int, top_p: float, vocab_size: int) -> dict[str, Schema]:
    setting = SamplingParams()
    id_ = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    return {
        "temperature": _number(setting.temperature, *SAMPLING_LIMITS["temperature"], "0 is greedy decoding"),
        "top_k": _whole(top_k, *SAMPLING_LIMITS["top_k"], "sample from the k most likely tokens; 0 is off"),
        "top_p": _number(
            top_p,
            *SAMPLING_LIMITS["top_p"],
            "sample from the fewest tokens whose probabilities add up to p; 1 is off",
        ),
        "repetition_penalty": _number(
            setting.repetition_penalty,
            *SAMPLING_LIMITS["repetition_penalty"],
            "above 1 makes repetition less likely",
        ),
        "min_p": _number(0.0, *SAMPLING_LIMITS["min_p"], "at least this share of the likeliest probability; 0 is off"),
        "presence_penalty": _number(
            0.0, *SAMPLING_LIMITS["presence_penalty"], "subtracted from the logits of tokens that the completion has"
        ),
        "frequency_penalty": _number(
            0.0, *SAMPLING_LIMITS["frequency_penalty"], "the same for each time that the completion has the token"
        ),
        "no_repeat_ngram_size": _whole(
            0, *SAMPLING_LIMITS["no_repeat_ngram_size"], "no n-gram of so many tokens occurs twice; 0 is off"
        ),
        "logit_bias": {
            "type": ["object", "null"],
            "propertyNames": {"pattern": f"^({pattern_up_to(vocab_size - 1)})$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS},
            "maxProperties": MAX_LOGIT_BIASES,
            "description": "from token ids of the vocabulary to what is added to their logits",
        },
        "bad_words": _array_of(
            {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_LENGTH, "pattern": r"\S"},
            MAX_BAD_WORDS,
            "texts that a completion never has",
        ),
        "min_tokens": _whole(
            0, *SAMPLING_LIMITS["min_tokens"], "tokens before a document's end or a token of stop_token_ids may come"
        ),
        "ignore_eos": _flag("the token that ends a document is never sampled"),
        "stop_token_ids": _array_of(id_, MAX_STOP_TOKENS, "tokens that end a completion; they are not part of it"),
        "distinct": _flag("the completions of a prompt are different texts", default=True),
        "until": _choice("end a completion with its first sentence", "sentence"),
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
            "description": "strings that end a completion; they are not part of it",
        },
        "stream": _flag("answer with server-sent events as tokens are generated"),
    }


_MODEL: Schema = {
    "type": ["string", "null"],
    "description": "a model of GET /v1/models; the default is the first",
}


@cache
def generate_fields(limits: Limits, vocab_size: int = MAX_TOKENS) -> dict[str, Schema]:
    """The fields of POST /generate and POST /, as JSON schemas; `vocab_size` is the largest of the models."""
    length, samples = min(DEFAULT_LENGTH, limits.length), min(DEFAULT_SAMPLES, limits.samples)
    return {
        "context": {"type": "string", "description": "the text to complete"},
        "maxlength": _whole(length, 1, limits.length, "maximum tokens of a completion"),
        "samples": _whole(samples, 1, limits.samples, "number of completions"),
        "model": _MODEL,
        **_sampling(SamplingParams().top_k, SamplingParams().top_p, vocab_size),
        "sort": _choice("order the completions by mean log-probability, the likeliest first", "likely"),
        "scores": _flag("answer with objects of text, score (the mean log-probability) and finish_reason"),
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
            "description": "a text, several texts, token ids, or several lists of token ids",
        },
        "max_tokens": _whole(
            min(V1_DEFAULT_LENGTH, limits.length),
            0,
            limits.length,
            "maximum tokens of a completion; 0 with echo and logprobs scores the prompt alone",
        ),
        "n": _whole(1, 1, limits.samples, "number of completions of each prompt"),
        "max_completion_tokens": _whole(None, 0, limits.length, "another name of max_tokens"),
        "best_of": _whole(None, 1, limits.samples, "decode so many, and return the n likeliest; not with stream"),
        **_sampling(0, 1.0, vocab_size),
        "echo": _flag("return the prompt before the completion, in the text and in logprobs"),
        "logprobs": _whole(None, 0, MAX_LOGPROBS, "return each token's logprob and this many most likely tokens"),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": {"type": ["boolean", "null"]}},
            "additionalProperties": False,
            "description": "include_usage sends a last chunk with the usage",
        },
        "suffix": _neutral("only an empty string is accepted", ""),
        "user": {"type": ["string", "null"], "description": "accepted and ignored"},
    }


# Checks.


def parse_json_object(body: bytes, example: str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no duplicate names, no NaN; every fault is an ApiError."""
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
                raise ApiError(400, "duplicate_field", f"the field {_quoted(name)} is given twice", name)
            fields[name] = value
        return fields

    def no_constant(name: str) -> NoReturn:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {name} is not a JSON number")

    try:
        value = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {where}: {error.msg}") from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "the body is nested too deeply") from None
    except ValueError:
        # Python refuses to convert integers of thousands of digits.
        raise ApiError(400, "invalid_json", "a number in the body has too many digits") from None
    if not isinstance(value, dict):
        raise ApiError(400, "not_an_object", f"the body must be a JSON object, it is {_json_type(value)}")
    return value


def tokenize_fields(add_special_tokens: bool = True) -> dict[str, Schema]:
    """The fields of POST /tokenize, with vLLM's names, as JSON schemas."""
    return {
        "model": _MODEL,
        "prompt": {"type": "string", "description": "the text"},
        "add_special_tokens": _flag("begin with the token that begins a document", default=add_special_tokens),
        "return_token_strs": _flag("also give the tokens as the vocabulary spells them"),
    }


@cache
def detokenize_fields(limits: Limits, vocab_size: int = MAX_TOKENS) -> dict[str, Schema]:
    """The fields of POST /detokenize, with vLLM's names, as JSON schemas."""
    id_ = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    return {
        "model": _MODEL,
        "tokens": {"type": "array", "maxItems": limits.body_bytes, "items": id_, "description": "token ids"},
    }


VocabSizeOf = Callable[[str | None], int | None]
"""From the name of a model (None is the first one) to the size of its vocabulary, None while it is loading; raises
ApiError for an unknown name."""


def parse_tokenize(body: bytes, example: str = '{"prompt": "你好"}') -> dict[str, Any]:
    """Check a request of /tokenize: its fields."""
    fields = _checked_fields(parse_json_object(body, example), tokenize_fields())
    if fields["prompt"] is None:
        raise ApiError(400, "missing_field", f"prompt is missing; send JSON such as {example}", "prompt")
    if not isinstance(fields["prompt"], str):
        raise _wrong_type("prompt", "a string", fields["prompt"])
    _characters("prompt", fields["prompt"])
    return fields


def parse_detokenize(body: bytes, limits: Limits, vocab_size_of: VocabSizeOf) -> dict[str, Any]:
    """Check a request of /detokenize: its fields."""
    example = '{"tokens": [5, 6]}'
    fields = _checked_fields(parse_json_object(body, example), detokenize_fields(limits))
    if fields["tokens"] is None:
        raise ApiError(400, "missing_field", f"tokens is missing; send JSON such as {example}", "tokens")
    vocab_size = vocab_size_of(fields["model"]) or MAX_TOKENS
    return fields | {"tokens": _id_array("tokens", fields["tokens"], vocab_size, limits.body_bytes)}


def parse_generate(body: bytes, limits: Limits, vocab_size_of: VocabSizeOf = lambda _: None) -> CompletionRequest:
    """Check a request of /generate.

    Raises:
        ApiError: the first fault, with the name of its field.
    """
    fields = _checked_fields(parse_json_object(body, '{"context": "你好"}'), generate_fields(limits))
    vocab_size = vocab_size_of(fields["model"]) or MAX_TOKENS
    context = fields["context"]
    if context is None:
        raise ApiError(400, "missing_field", 'context is missing; send JSON such as {"context": "你好"}', "context")
    if not isinstance(context, str):
        raise _wrong_type("context", "a string", context)
    return CompletionRequest(
        contexts=(_characters("context", context),),
        length=fields["maxlength"],
        samples=fields["samples"],
        settings=_settings(fields, vocab_size),
        seed=fields["seed"],
        stop=_stop(fields["stop"]),
        stream=fields["stream"],
        model=fields["model"],
        distinct=fields["distinct"],
        until_sentence=fields["until"] == "sentence",
        sort_likely=fields["sort"] == "likely",
        with_scores=fields["scores"] or fields["stream"],
    )


def parse_v1(body: bytes, limits: Limits, vocab_size_of: VocabSizeOf) -> CompletionRequest:
    """Check a request of /v1/completions.

    Raises:
        ApiError: the first fault, with the name of its field.
    """
    fields = _checked_fields(parse_json_object(body, '{"prompt": "你好"}'), v1_fields(limits))
    vocab_size = vocab_size_of(fields["model"]) or MAX_TOKENS
    if fields["prompt"] is None:
        raise ApiError(400, "missing_field", 'prompt is missing; send JSON such as {"prompt": "你好"}', "prompt")
    contexts = _prompts(fields["prompt"], limits.prompts, vocab_size)
    best_of, n = fields["best_of"], fields["n"]
    if best_of is not None and best_of < n:
        raise ApiError(400, "out_of_range", f"best_of must not be less than n, which is {n}", "best_of")
    if best_of is not None and best_of > n and fields["stream"]:
        raise ApiError(400, "unsupported", "best_of is not supported with stream; leave one of them out", "best_of")
    scored = bool(fields["echo"]) and fields["logprobs"] is not None
    length_field = "max_tokens" if fields["max_completion_tokens"] is None else "max_completion_tokens"
    length = fields[length_field]
    if length == 0 and not scored:
        message = f"{length_field} 0 needs echo and logprobs; otherwise it must be 1 or more"
        raise ApiError(400, "out_of_range", message, length_field)
    settings = _settings(fields, vocab_size)
    if settings.top_p < MIN_TOP_P:
        settings = replace(settings, top_p=MIN_TOP_P)
    return CompletionRequest(
        contexts=contexts,
        length=length,
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
        length_field=length_field,
        distinct=fields["distinct"],
        until_sentence=fields["until"] == "sentence",
        best_of=best_of,
    )


def _checked_fields(given: dict[str, Any], schemas: dict[str, Schema]) -> dict[str, Any]:
    """Every field with its value or its default; raises ApiError for an unknown name or a value outside its schema."""
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
            value = _to_whole_number(value) if schema.get("type", [""])[0] == "integer" else value
            _check_scalar(name, value, schema)
            fields[name] = value
    return fields


def _to_whole_number(value: Any) -> Any:
    """5.0 as 5: JSON does not distinguish integers from floats."""
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
        if value not in schema.get("enum", [value]):
            words = " or ".join(json.dumps(one) for one in schema["enum"] if one is not None)
            raise ApiError(400, "out_of_range", f"{name} must be {words}", name)
    elif kind == "object" and not isinstance(value, dict):
        raise _wrong_type(name, "an object", value)
    elif "enum" in schema and (isinstance(value, bool) or value not in schema["enum"]):
        raise ApiError(400, "unsupported", f"{name} is not supported: {schema['description']}", name)


def _settings(fields: dict[str, Any], vocab_size: int) -> SamplingParams:
    return SamplingParams(
        temperature=float(fields["temperature"]),
        top_k=fields["top_k"],
        top_p=float(fields["top_p"]),
        repetition_penalty=float(fields["repetition_penalty"]),
        min_p=float(fields["min_p"]),
        presence_penalty=float(fields["presence_penalty"]),
        frequency_penalty=float(fields["frequency_penalty"]),
        no_repeat_ngram_size=fields["no_repeat_ngram_size"],
        logit_bias=_logit_bias(fields["logit_bias"], vocab_size),
        bad_words=_bad_words(fields["bad_words"]),
        min_tokens=fields["min_tokens"],
        ignore_eos=fields["ignore_eos"],
        stop_token_ids=_id_array("stop_token_ids", fields["stop_token_ids"], vocab_size, MAX_STOP_TOKENS),
    )


def _logit_bias(value: dict[str, Any] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = []
    if value and len(value) > MAX_LOGIT_BIASES:
        message = f"logit_bias may have at most {MAX_LOGIT_BIASES} tokens, it has {len(value)}"
        raise ApiError(400, "out_of_range", message, "logit_bias")
    for name, bias in (value or {}).items():
        if not name.isascii() or not name.isdecimal() or len(name) > 9 or (len(name) > 1 and name[0] == "0"):
            message = f"logit_bias has {_quoted(name)}, which is no token id; write ids as strings, such as 5"
            raise ApiError(400, "out_of_range", message, "logit_bias")
        if int(name) >= vocab_size:
            message = f"logit_bias has a token id outside the vocabulary, whose ids are 0 to {vocab_size - 1}"
            raise ApiError(400, "out_of_range", message, "logit_bias")
        if type(bias) not in (int, float):
            raise _wrong_type("logit_bias", "an object of numbers", bias)
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            message = f"the numbers of logit_bias must be from {-MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}"
            raise ApiError(400, "out_of_range", message, "logit_bias")
        biases.append((int(name), float(bias)))
    return tuple(biases)


def _bad_words(value: Any) -> tuple[str, ...]:
    words = [] if value is None else value
    if not isinstance(words, list):
        raise _wrong_type("bad_words", "an array of strings", value)
    if len(words) > MAX_BAD_WORDS:
        message = f"bad_words may have at most {MAX_BAD_WORDS} strings, it has {len(words)}"
        raise ApiError(400, "out_of_range", message, "bad_words")
    for word in words:
        if not isinstance(word, str):
            raise _wrong_type("bad_words", "an array of strings", word)
        _characters("bad_words", word)
        if not word.strip() or len(word) > MAX_BAD_WORD_LENGTH:
            message = f"each string of bad_words must have 1 to {MAX_BAD_WORD_LENGTH} characters, not only white space"
            raise ApiError(400, "out_of_range", message, "bad_words")
    return tuple(words)


def _id_array(name: str, value: Any, vocab_size: int, most: int) -> tuple[int, ...]:
    ids = [] if value is None else value
    if not isinstance(ids, list):
        raise _wrong_type(name, "an array of token ids", value)
    if len(ids) > most:
        raise ApiError(400, "out_of_range", f"{name} may have at most {most} ids, it has {len(ids)}", name)
    ids = [_to_whole_number(id_) for id_ in ids]
    for id_ in ids:
        if type(id_) is not int:
            raise _wrong_type(name, "an array of token ids", id_)
        if not 0 <= id_ < vocab_size:
            message = f"{name} has a token id outside the vocabulary, whose ids are 0 to {vocab_size - 1}"
            raise ApiError(400, "out_of_range", message, name)
    return tuple(ids)


def _characters(name: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"{name} has an unpaired surrogate at character {error.start + 1}"
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
            message = f"each string of stop must have 1 to {MAX_STOP_LENGTH} characters, one has {len(text)}"
            raise ApiError(400, "out_of_range", message, "stop")
        _characters("stop", text)
    if len(texts) > MAX_STOP_STRINGS:
        message = f"stop may have at most {MAX_STOP_STRINGS} strings, it has {len(texts)}"
        raise ApiError(400, "out_of_range", message, "stop")
    return tuple(texts)


def _prompts(value: Any, max_prompts: int, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    words = "a string, an array of strings, an array of token ids or an array of such arrays"
    if isinstance(value, str):
        return (_characters("prompt", value),)
    if not isinstance(value, list):
        raise _wrong_type("prompt", words, value)
    value = [_to_whole_number(item) for item in value]
    if value and all(type(item) is int for item in value):
        return (_ids(value, vocab_size),)
    if not 1 <= len(value) <= max_prompts:
        raise ApiError(400, "out_of_range", f"prompt may have 1 to {max_prompts} texts, it has {len(value)}", "prompt")
    if all(isinstance(item, str) for item in value):
        return tuple(_characters("prompt", item) for item in value)
    lists = [[_to_whole_number(id_) for id_ in item] for item in value if isinstance(item, list)]
    if len(lists) == len(value) and all(type(id_) is int for ids in lists for id_ in ids):
        return tuple(_ids(ids, vocab_size) for ids in lists)
    raise ApiError(400, "wrong_type", f"prompt must be {words}; this array is none of these", "prompt")


def _ids(ids: list[int], vocab_size: int) -> tuple[int, ...]:
    if not ids:
        raise ApiError(
            400, "out_of_range", 'a prompt of token ids must not be empty; send "" for an empty text', "prompt"
        )
    for id_ in ids:
        if not 0 <= id_ < vocab_size:
            message = f"prompt has a token id outside the vocabulary, whose ids are 0 to {vocab_size - 1}"
            raise ApiError(400, "out_of_range", message, "prompt")
    return tuple(ids)


def _include_usage(options: dict[str, Any] | None) -> bool:
    for name, value in (options or {}).items():
        param = f"stream_options.{name}"
        if name != "include_usage":
            message = f"stream_options has no field {_quoted(name)}, only include_usage"
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
