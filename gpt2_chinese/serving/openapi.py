"""GET /openapi.json: the description of the server's routes, with its limits."""

from __future__ import annotations

from typing import Any

from gpt2_chinese.serving.api import Limits, Schema, detokenize_fields, generate_fields, tokenize_fields, v1_fields
from gpt2_chinese.serving.keys import PUBLIC_PATHS

COMPLETION_ERRORS = (400, 404, 408, 413, 415, 429, 500, 503, 504)


def openapi(limits: Limits, vocab_size: int, *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server with these limits; `vocab_size` is the largest of its models."""
    paths = _paths(limits, vocab_size)
    document = {"openapi": "3.1.0", "info": {"title": "GPT2-Chinese", "version": "1"}, "paths": paths}
    if needs_key:
        document["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        for path, item in paths.items():
            for method in ("get", "post"):
                if method in item and (method.upper(), path) not in PUBLIC_PATHS:
                    item[method]["security"] = [{"key": []}]
                    item[method]["responses"]["401"] = _response(ERROR)
    return document


def _paths(limits: Limits, vocab_size: int) -> dict[str, Any]:
    texts = _response({"anyOf": [_array(TEXT), _array(SCORED)]}, "application/json", "text/event-stream")
    completion = _response(COMPLETION, "application/json", "text/event-stream")

    def generate() -> Schema:
        return _operation("complete a text", texts, *COMPLETION_ERRORS) | _body(
            generate_fields(limits, vocab_size), "context"
        )

    return {
        "/generate": {"post": generate()},
        "/": {"post": generate(), "get": _operation("the web page", _response(TEXT, "text/html"))},
        "/v1/completions": {
            "post": _operation("complete texts, as OpenAI's API does", completion, *COMPLETION_ERRORS)
            | _body(v1_fields(limits, vocab_size), "prompt")
        },
        "/tokenize": {
            "post": _operation("the tokens of a text", _response(TOKENS), *COMPLETION_ERRORS)
            | _body(tokenize_fields(), "prompt")
        },
        "/detokenize": {
            "post": _operation("the text of tokens", _response(_object(prompt=TEXT)), *COMPLETION_ERRORS)
            | _body(detokenize_fields(limits, vocab_size), "tokens")
        },
        "/v1/models": {"get": _operation("the models", _response(MODELS))},
        "/v1/models/{model}": {
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": TEXT}],
            "get": _operation("one model", _response(MODEL), 404),
        },
        "/health": {"get": _health()},
        "/metrics": {"get": _operation("metrics in the Prometheus text format", _response(TEXT, "text/plain"))},
        "/openapi.json": {"get": _operation("this OpenAPI document", _response({"type": "object"}))},
    }


def _operation(summary: str, success: Schema, *errors: int) -> Schema:
    responses = {"200": success} | {str(status): _response(ERROR) for status in errors}
    return {"summary": summary, "responses": responses}


def _health() -> Schema:
    """A 503 of /health has the same form as a 200."""
    operation = _operation("the state of the server and its models; 503 unless it accepts requests", _response(HEALTH))
    operation["responses"]["503"] = _response(HEALTH)
    return operation


def _body(fields: dict[str, Schema], required: str) -> Schema:
    schema = {"type": "object", "properties": fields, "required": [required], "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _response(schema: Schema, content_type: str = "application/json", *other_types: str) -> Schema:
    content: Schema = {content_type: {"schema": schema}}
    return {"description": "the response", "content": content | {other: {} for other in other_types}}


# The schemas of the responses.


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(type_: str) -> Schema:
    return {"type": [type_, "null"]}


TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}

ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_or_null("string"), code=TEXT))
LOGPROBS = _object(
    tokens=_array(TEXT),
    token_logprobs=_array(_or_null("number")),
    top_logprobs=_or_null("array") | {"items": _or_null("object")},
    text_offset=_array(INTEGER),
)
SCORED = _object(text=TEXT, score={"type": "number"}, finish_reason={"enum": ["stop", "length"]})
TOKENS = _object(
    count=INTEGER,
    max_model_len=INTEGER,
    tokens=_array(INTEGER),
    token_strs=_or_null("array") | {"items": TEXT},
)
CHOICE = _object(
    text=TEXT,
    index=INTEGER,
    logprobs=LOGPROBS | _or_null("object"),
    finish_reason={"enum": ["stop", "length"]},
)
COMPLETION = _object(
    id=TEXT,
    object={"const": "text_completion"},
    created=INTEGER,
    model=TEXT,
    choices=_array(CHOICE),
    usage=_object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER),
)
MODEL = _object(
    id=TEXT,
    object={"const": "model"},
    created=INTEGER,
    owned_by=TEXT,
    root=TEXT,
    max_model_len=_or_null("integer"),
)
MODELS = _object(object={"const": "list"}, data=_array(MODEL))
MODEL_HEALTH = _object(
    model=TEXT,
    status={"enum": ["loading", "ready", "restarting", "dead"]},
    running=INTEGER,
    waiting=INTEGER,
    full_speed=BOOLEAN,
    n_ctx=_or_null("integer"),
    restarts=INTEGER,
)
HEALTH = _object(
    status={"enum": ["loading", "ready", "restarting", "draining", "dead"]},
    model=TEXT,
    device=_or_null("string"),
    running=INTEGER,
    waiting=INTEGER,
    full_speed=BOOLEAN,
    n_ctx=_or_null("integer"),
    models=_array(MODEL_HEALTH),
    maxlength=INTEGER,
    samples=INTEGER,
)
