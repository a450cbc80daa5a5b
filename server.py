"""Serve completions over HTTP: a model folder in, POST {"context", "maxlength", "samples"} answered with a JSON array.

Reads   model/final_model/     what train.py wrote, or a folder of GPT2-Chinese
Writes  nothing

    python server.py
    curl http://127.0.0.1:5005/generate -d '{"context": "你好", "maxlength": 50, "samples": 5}'

POST /v1/completions is the same for clients of OpenAI's API, and GET / is a page that completes while one types.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import aiohttp_cors
from aiohttp import web

from gpt2_chinese.command_line import run_script
from gpt2_chinese.decoding.completion import PRECISIONS, Completion, EngineStopped, Prompt, TextDelta, TokenLogprob
from gpt2_chinese.decoding.process import EngineOptions, EngineProcess
from gpt2_chinese.serving.api import (
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    MAX_TOKENS,
    ApiError,
    Limits,
    openapi,
    parse_generate,
    parse_v1,
)
from gpt2_chinese.serving.connections import error_body, fast_response, listen, serving, url_of
from gpt2_chinese.serving.prometheus import Exposition
from gpt2_chinese.serving.service import (
    WARM_UP,
    RunningRequest,
    ServedModel,
    Service,
    asked,
    completions_of,
    observe,
    running,
    stopped,
    timeout_error,
    tokens_of,
)

LOGGER = logging.getLogger("server")
PAGE = Path(__file__).resolve().parent / "gpt2_chinese" / "serving" / "web" / "index.html"
CUT_HEADER = "X-Context-Cut"
"""Says how many tokens of the context did not fit the model."""
TOKENS_HEADER = "X-Tokens"
"""Says how many tokens were drawn for the answer."""
KEY_VARIABLE = "GPT2_CHINESE_API_KEY"
PUBLIC_PATHS = [("GET", "/"), ("GET", "/health")]
"""What needs no API key."""
COMPLETION_PATHS = ("/generate", "/", "/v1/completions")
RETRY_SECONDS = "1"
"""When those whom there is no room for may try again."""
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)

SWITCH_SECONDS = 0.0005
"""Longest that one of Python's threads keeps the others waiting: a long text that is tokenized must not hold up the
short answers."""
SSE_KEEPALIVE_SECONDS = 10.0
"""Seconds after which a stream without news gets a comment, so that nothing between closes it."""


SERVICE = web.AppKey("service", Service)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve completions of a trained model over HTTP.")
    limits = Limits()
    # the model
    parser.add_argument(
        "--model_path",
        action="append",
        help="model folder (model/final_model); given several times, requests choose with their field model",
    )
    parser.add_argument("--vocab_file", help="vocabulary of a model folder that has none, such as GPT2-Chinese's")
    parser.add_argument(
        "--model_name",
        action="append",
        help="its name in /v1/models and on the page (the folder's name); once for each --model_path, in their order",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda or a GPU's number; 0,1 starts a process for each (%(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of the weights on a CPU: fp32 is exact, bf16 half as large, int8 a quarter and twice as fast as bf16, "
        "for it multiplies integers, but less exact; auto is bf16 (%(default)s); a GPU computes in fp32 (auto) or bf16",
    )
    # where to listen and to whom
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 is every one (%(default)s)")
    parser.add_argument("--port", type=int, default=5005, help="0 takes a free one (%(default)s)")
    parser.add_argument("--api_key", action="append", help="a key that clients must send; may be given several times")
    parser.add_argument("--api_key_file", help=f"the same, a key a line; or in the variable {KEY_VARIABLE}")
    parser.add_argument("--cors_origins", default="*", help="*, none, or sites as https://a.example,… (%(default)s)")
    # limits
    parser.add_argument("--max_samples", type=int, default=limits.samples, help="of one request (%(default)s)")
    parser.add_argument("--max_length", type=int, default=limits.length, help="tokens of a sample (%(default)s)")
    parser.add_argument("--max_prompts", type=int, default=limits.prompts, help="of a /v1 request (%(default)s)")
    parser.add_argument("--max_body", type=int, default=limits.body_bytes, help="bytes of a request (%(default)s)")
    parser.add_argument(
        "--body_timeout", type=float, default=limits.body_seconds, help="seconds to send a request or take an answer"
    )
    parser.add_argument("--request_timeout", type=float, default=limits.request_seconds, help="seconds to answer one")
    parser.add_argument(
        "--idle_timeout",
        type=float,
        default=limits.idle_seconds,
        help="seconds a connection may be silent (%(default)s)",
    )
    parser.add_argument(
        "--max_connections", type=int, default=limits.connections, help="open at once, of a process (%(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="sequences decoded at once (%(default)s)")
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=512,
        help="sequences that may wait; when there is no room, requests are refused until an eighth of it "
        "is free (%(default)s)",
    )
    # given to the processes of several devices
    parser.add_argument("--listen_fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ready_fd", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.model_path = args.model_path or ["model/final_model"]
    return args


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag whose value makes no sense."""
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, it is {args.port}")
    for flag in (
        "max_samples",
        "max_length",
        "max_prompts",
        "max_body",
        "max_connections",
        "batch_size",
        "max_waiting",
    ):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be 1 or more, it is {getattr(args, flag)}")
    for flag in ("body_timeout", "request_timeout", "idle_timeout"):
        if not getattr(args, flag) > 0:
            raise ValueError(f"--{flag} must be above 0 seconds, it is {getattr(args, flag)}")
    origins(args.cors_origins)
    model_names(args)


def model_names(args: argparse.Namespace) -> list[str]:
    """What each of the models is called.

    Raises:
        ValueError: there is not one name for each model, or two are called the same.
    """
    folders = [Path(folder).resolve().name for folder in args.model_path]
    names: list[str] = args.model_name or folders
    if len(names) != len(folders):
        raise ValueError(
            f"--model_name is given {len(names)} times and --model_path {len(folders)} times; give one name for each"
        )
    for name, count in Counter(names).items():
        if not name or count > 1:
            what = f"{count} models are called {name}" if name else "a model has no name"
            raise ValueError(f"{what}; give each --model_path a --model_name of its own")
    return names


def read_keys(args: argparse.Namespace) -> tuple[bytes, ...]:
    """The API keys of the flags, the file and the environment, as clients send them.

    Raises:
        ValueError: a key is empty or has other than printable ASCII characters, or the file has none.
    """
    keys = {"--api_key": list(args.api_key or ())}
    if args.api_key_file:
        lines = Path(args.api_key_file).read_text(encoding="utf-8").splitlines()
        keys["--api_key_file"] = [line.strip() for line in lines if line.strip()]
        if not keys["--api_key_file"]:
            raise ValueError(f"--api_key_file {args.api_key_file} has no key; write one on a line")
    if KEY_VARIABLE in os.environ:
        keys[KEY_VARIABLE] = [os.environ[KEY_VARIABLE]]
    for source, values in keys.items():
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in values):
            raise ValueError(f"{source}: a key must have letters, digits and signs of ASCII, without spaces")
    return tuple(dict.fromkeys(key.encode("ascii") for values in keys.values() for key in values))


def origins(flag: str) -> list[str]:
    """The sites that --cors_origins names.

    Raises:
        ValueError: one is not a scheme and a host.
    """
    if flag == "none":
        return []
    sites = [site.strip() for site in flag.split(",")]
    for site in sites:
        scheme, _, host = site.partition("://")
        if site != "*" and (scheme not in ("http", "https") or not host or "/" in host):
            raise ValueError(f"--cors_origins {flag}: {site!r} is not *, none or a site such as https://a.example")
    return sites


# From a request to the engine.


async def read_body(request: web.Request) -> bytes:
    """Read a request's body, of limited size and in limited time, unless it would be refused whatever it is."""
    service = request.app[SERVICE]
    if refusal := service.refusal():
        raise refusal
    limits = service.limits
    if "Content-Encoding" in request.headers:
        raise ApiError(415, "unsupported_encoding", "a compressed body is not accepted; leave out Content-Encoding")
    too_large = ApiError(413, "body_too_large", f"the body has more than {limits.body_bytes} bytes")
    if request.content_length is not None and request.content_length > limits.body_bytes:
        raise too_large
    try:
        if request.content.is_eof():  # it has come with the head; a timer would cost more than the reading
            return await request.read()
        return await asyncio.wait_for(request.read(), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise ApiError(408, "body_timeout", message) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except web.RequestPayloadError as error:
        raise ApiError(400, "invalid_body", f"the body could not be read: {error}") from None


async def stream_sse(
    request: web.Request,
    asked: RunningRequest,
    length: str,
    of_piece: Callable[[int, TextDelta], bytes],
    end: Callable[[list[list[Completion]]], bytes],
) -> web.StreamResponse:
    """Write each piece as it comes, then the end; an error after the beginning becomes an event."""
    service = request.app[SERVICE]
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"} | headers_of(asked)
    )

    async def write(data: bytes) -> None:
        # A client that takes nothing for so long is let go.
        if request.transport is None:
            raise ConnectionResetError("the client has gone")
        letting_go = asyncio.get_running_loop().call_later(service.limits.body_seconds, request.transport.abort)
        try:
            await response.write(data)
        finally:
            letting_go.cancel()

    await response.prepare(request)
    running = len(asked.tickets)
    assert asked.arrivals is not None
    try:
        while running:
            left = asked.deadline - time.monotonic()
            try:
                arrived = await asyncio.wait_for(asked.arrivals.get(), max(0.0, min(left, SSE_KEEPALIVE_SECONDS)))
            except asyncio.TimeoutError:
                if left <= SSE_KEEPALIVE_SECONDS:
                    raise timeout_error(service.limits, length) from None
                await write(b": waiting\n\n")
                continue
            running -= sum(piece is None for _, piece in arrived)
            if data := b"".join(of_piece(place, piece) for place, piece in arrived if piece is not None):
                await write(data)
        completions = [ticket.future.result() for ticket in asked.tickets]
        observe(asked, completions)
        await write(end(completions))
    except (ApiError, EngineStopped) as error:
        refusal = error if isinstance(error, ApiError) else stopped()
        await write(b"event: error\ndata: " + error_body(refusal.status, refusal.code, refusal.message) + b"\n\n")
    await response.write_eof()
    return response


def headers_of(asked: RunningRequest) -> dict[str, str]:
    return {CUT_HEADER: str(asked.cut)} if asked.cut else {}


def event(value: Any, name: str | None = None) -> bytes:
    """A server-sent event of JSON."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


# The handlers.


async def handle_generate(request: web.Request) -> web.StreamResponse:
    """POST /generate and POST /: the completions as a JSON array of strings, or as events."""
    service = request.app[SERVICE]
    wish = parse_generate(await read_body(request), service.limits)
    async with asked(service, wish) as asking:
        if wish.stream:

            def of_piece(_: int, piece: TextDelta) -> bytes:
                text = event({"sample": piece.sample, "text": piece.text}, "text") if piece.text else b""
                if piece.finish_reason is None:
                    return text
                return text + event({"sample": piece.sample, "finish_reason": piece.finish_reason}, "end")

            def end(completions: list[list[Completion]]) -> bytes:
                seconds = round(time.monotonic() - asking.arrived, 3)
                return event({"tokens": tokens_of(completions), "seconds": seconds}, "done")

            return await stream_sse(request, asking, "maxlength", of_piece, end)
        completions = await completions_of(service.limits, asking, "maxlength")
    response = json_response([completion.text for completion in completions[0]])
    response.headers.update(headers_of(asking) | {TOKENS_HEADER: str(tokens_of(completions))})
    return response


async def handle_v1_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions: as clients of OpenAI's API expect it."""
    service = request.app[SERVICE]
    body = await read_body(request)
    wish = parse_v1(body, service.limits, lambda name: service.model(name).vocab_size)
    async with asked(service, wish) as asking:
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asking.model.name,
        }

        def choice(place: int, sample: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> Any:
            reported = None if wish.logprobs is None else v1_logprobs(logprobs, with_top=wish.logprobs > 0)
            index = place * wish.samples + sample
            return {"text": text, "index": index, "logprobs": reported, "finish_reason": reason}

        if wish.stream:
            no_usage = {"usage": None} if wish.include_usage else {}
            begun: set[tuple[int, int]] = set()

            def of_piece(place: int, piece: TextDelta) -> bytes:
                text, logprobs = piece.text, asking.echoed(place, piece.logprobs, begun=(place, piece.sample) in begun)
                if wish.echo and (place, piece.sample) not in begun:
                    text = asking.prompts[place].context + text
                begun.add((place, piece.sample))
                chunk = choice(place, piece.sample, text, logprobs, piece.finish_reason)
                return event({**head, "choices": [chunk], **no_usage})

            def end(completions: list[list[Completion]]) -> bytes:
                usage = {**head, "choices": [], "usage": v1_usage(asking.prompts, completions)}
                return (event(usage) if wish.include_usage else b"") + b"data: [DONE]\n\n"

            return await stream_sse(request, asking, "max_tokens", of_piece, end)
        completions = await completions_of(service.limits, asking, "max_tokens")
    choices = []
    for place, (prompt, group) in enumerate(zip(asking.prompts, completions, strict=True)):
        for sample, completion in enumerate(group):
            text = completion.text if wish.echo else completion.text[len(prompt.context) :]
            logprobs = asking.echoed(place, completion.logprobs)
            choices.append(choice(place, sample, text, logprobs, completion.finish_reason))
    response = json_response({**head, "choices": choices, "usage": v1_usage(asking.prompts, completions)})
    response.headers.update(headers_of(asking))
    return response


def v1_logprobs(logprobs: Sequence[TokenLogprob], *, with_top: bool) -> dict[str, Any]:
    return {
        "tokens": [one.token for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [one.top for one in logprobs] if with_top else None,
        "text_offset": [one.offset for one in logprobs],
    }


def v1_usage(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> dict[str, int]:
    """Tokens as the model got them: a prompt's with the [MASK] that begins a document."""
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    drawn = tokens_of(completions)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": drawn, "total_tokens": prompt_tokens + drawn}


def v1_model(service: Service, model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": service.started, "owned_by": "gpt2-chinese"}


async def handle_v1_models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    service = request.app[SERVICE]
    return json_response({"object": "list", "data": [v1_model(service, model) for model in service.models]})


async def handle_v1_model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}."""
    service = request.app[SERVICE]
    return json_response(v1_model(service, service.model(request.match_info["model"])))


async def handle_health(request: web.Request) -> web.Response:
    """GET /health: 200 while requests are taken, 503 otherwise."""
    service = request.app[SERVICE]
    models = [
        {
            "model": model.name,
            "status": model.status,
            "running": model.running,
            "waiting": model.waiting,
            "full_speed": model.at_full_speed,
            "n_ctx": model.engine.n_ctx if model.engine else None,
        }
        for model in service.models
    ]
    facts = {
        "status": service.status,
        "model": models[0]["model"],
        "device": service.device,
        "running": sum(model.running for model in service.models),
        "waiting": sum(model.waiting for model in service.models),
        "full_speed": all(model.at_full_speed for model in service.models),
        "n_ctx": models[0]["n_ctx"],
        "models": models,
        "maxlength": service.limits.length,
        "samples": service.limits.samples,
    }
    return json_response(facts, status=200 if service.status == "ready" else 503)


async def handle_metrics(request: web.Request) -> web.Response:
    """GET /metrics: Prometheus' text format."""
    service = request.app[SERVICE]
    device = service.device or ""
    page = Exposition()
    page.add("admitted_requests", "gauge", service.admitted, device=device)
    page.add("tasks", "gauge", len(asyncio.all_tasks()), device=device)
    for (route, status), count in sorted(service.requests.items()):
        page.add("http_requests_total", "counter", count, device=device, route=route, status=status)
    for model in service.models:
        labels = {"model": model.name, "device": device}
        page.add("ready", "gauge", int(model.status == "ready" and not service.draining), **labels)
        page.add("full_speed", "gauge", int(model.at_full_speed), **labels)
        page.add("running_sequences", "gauge", model.running, **labels)
        page.add("waiting_sequences", "gauge", model.waiting, **labels)
        engine = model.engine
        page.add("prompt_tokens_total", "counter", engine.prompt_tokens if engine else 0, **labels)
        page.add("generated_tokens_total", "counter", engine.generated_tokens if engine else 0, **labels)
        page.add_histogram("time_to_first_token_seconds", model.timings.first_token, **labels)
        page.add_histogram("time_per_token_seconds", model.timings.per_token, **labels)
    return web.Response(text=str(page), content_type="text/plain", charset="utf-8")


async def handle_openapi(request: web.Request) -> web.Response:
    """GET /openapi.json."""
    service = request.app[SERVICE]
    vocab_size = max(model.vocab_size or MAX_TOKENS for model in service.models)
    return json_response(openapi(service.limits, vocab_size, needs_key=bool(service.keys)))


async def handle_page(_: web.Request) -> web.Response:
    """GET /: the page that completes while one types."""
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
    return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html", headers=headers)


def json_response(value: Any, *, status: int = 200) -> web.Response:
    body = json.dumps(value, ensure_ascii=False).encode("utf-8")
    return web.Response(body=body, status=status, content_type="application/json", charset="utf-8")


def error_response(status: int, code: str, message: str, param: str | None = None) -> web.Response:
    body = error_body(status, code, message, param)
    return web.Response(body=body, status=status, content_type="application/json", charset="utf-8")


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def answer_and_count(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Send the answer to a client that may be slow or gone, and count it by route and status."""
    service = request.app[SERVICE]
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "other"
    try:
        response = await handler(request)
    except asyncio.CancelledError:
        service.requests[route, 499] += 1  # the client has gone
        raise
    service.requests[route, response.status] += 1
    if service.draining:
        response.force_close()
    if request.transport is not None:
        letting_go = asyncio.get_running_loop().call_later(service.limits.body_seconds, request.transport.abort)
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            pass
        finally:
            letting_go.cancel()
    return response


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error in one form, and tell nothing of the inside."""
    try:
        return await handler(request)
    except (ApiError, EngineStopped) as error:
        refusal = error if isinstance(error, ApiError) else stopped()
        response = error_response(refusal.status, refusal.code, refusal.message, refusal.param)
        if refusal.status == 429 or refusal.code in ("loading", "draining"):
            response.headers["Retry-After"] = RETRY_SECONDS if refusal.status == 429 else "3"
        if refusal.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if refusal.status in (401, 408, 413, 415):
            response.force_close()  # the rest of the body is not read
        return response
    except web.HTTPException as error:
        if error.status < 400:
            raise
        allowed = error.headers.get("Allow", "")
        messages = {
            404: f"there is nothing at {request.path}; POST /generate completes texts",
            405: f"{request.method} is not possible at {request.path}, only {allowed}",
        }
        code = error.reason.lower().replace(" ", "_")
        response = error_response(error.status, code, messages.get(error.status, error.text or error.reason))
        if allowed:
            response.headers["Allow"] = allowed
        return response
    except ConnectionError:
        raise asyncio.CancelledError from None  # a client that has left in the middle of a stream
    except Exception:
        LOGGER.exception("%s %s failed", request.method, request.path)
        return error_response(500, "internal_error", "the server made a mistake; its log has the details")


@web.middleware
async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse who has no API key, where keys were set. A browser's preflight carries none."""
    keys = request.app[SERVICE].keys
    if keys and request.method != "OPTIONS" and (request.method, request.path) not in PUBLIC_PATHS:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        sent = given.strip().encode("utf-8", errors="replace") if scheme.lower() == "bearer" else b""
        # Every key is compared, in constant time: neither which nor how much of one was right can be measured.
        if not sum([hmac.compare_digest(sent, key) for key in keys]):
            problem = "there is no such API key" if sent else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, "invalid_api_key", problem)
    return await handler(request)


async def vary_by_origin(_: web.Request, response: web.StreamResponse) -> None:
    """Keep caches from giving one site's CORS headers to another."""
    response.headers["Vary"] = "Origin"


async def expected(request: web.Request) -> web.StreamResponse | None:
    """Answer an Expect header, which aiohttp asks before the middlewares."""
    if request.headers["Expect"].lower() != "100-continue":
        return error_response(417, "expectation_failed", "the only Expect that is known is 100-continue")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # nothing of the answer has been sent
    return None


def refused_at_once(service: Service, path: str) -> bytes | None:
    """The refusal of `read_body` when too many sequences wait, before aiohttp has cost its time."""
    if path not in COMPLETION_PATHS or service.keys:
        return None
    refusal = service.refusal()
    if refusal is None or refusal.status != 429:
        return None
    service.requests[path, 429] += 1
    return short_refusal(int(time.time()), refusal.code, refusal.message)


@lru_cache(maxsize=64)
def short_refusal(_: int, code: str, message: str) -> bytes:
    """The same for a second, for its date."""
    return fast_response(429, error_body(429, code, message), {"Retry-After": RETRY_SECONDS, "Vary": "Origin"})


def build_app(service: Service, cors_origins: Sequence[str] = ("*",)) -> web.Application:
    """Make the application; the model is loaded when it starts, and the engine stopped with it."""
    app = web.Application(
        middlewares=[answer_and_count, errors_as_json, check_key], client_max_size=service.limits.body_bytes
    )
    app[SERVICE] = service

    async def run_model(app: web.Application) -> AsyncIterator[None]:
        async with running(app[SERVICE]):
            yield

    app.cleanup_ctx.append(run_model)
    app.on_response_prepare.append(vary_by_origin)
    routes = [
        app.router.add_get("/", handle_page, allow_head=False),
        app.router.add_post("/", handle_generate, expect_handler=expected),
        app.router.add_post("/generate", handle_generate, expect_handler=expected),
        app.router.add_post("/v1/completions", handle_v1_completions, expect_handler=expected),
        app.router.add_get("/v1/models", handle_v1_models, allow_head=False),
        app.router.add_get("/v1/models/{model}", handle_v1_model, allow_head=False),
        app.router.add_get("/health", handle_health, allow_head=False),
        app.router.add_get("/metrics", handle_metrics, allow_head=False),
        app.router.add_get("/openapi.json", handle_openapi, allow_head=False),
    ]
    site = aiohttp_cors.ResourceOptions(
        allow_credentials=False,
        allow_headers="*",
        allow_methods="*",
        expose_headers=(CUT_HEADER, TOKENS_HEADER, "Retry-After"),
    )
    if cors_origins:
        cors = aiohttp_cors.setup(app, defaults=dict.fromkeys(cors_origins, site))
        for route in routes:
            cors.add(route)
    return app


# The process.


def startup_message(url: str) -> str:
    """The address, and how to try it from a shell and from cmd.exe (which does not send UTF-8)."""
    body = {"context": WARM_UP, "maxlength": DEFAULT_LENGTH, "samples": DEFAULT_SAMPLES}
    escaped = json.dumps(body).replace('"', '\\"')
    return (
        f"serving on {url} (Ctrl-C stops), a page for your browser; or try\n"
        f"  Linux, macOS:  curl {url}/generate -d '{json.dumps(body, ensure_ascii=False)}'\n"
        f'  Windows (cmd): curl {url}/generate -d "{escaped}"'
    )


async def tell_full_speed(service: Service, begin: float) -> None:
    """Say when the compiled decoder has taken over; until then, the first time on a machine, PyTorch decodes."""
    for model in [model for model in service.models if not model.at_full_speed]:
        while not model.at_full_speed:
            await asyncio.sleep(0.2)
        print(f"{model.name} is at full speed, {time.monotonic() - begin:.1f} s after the port", flush=True)


async def serve(
    service: Service, sock: socket.socket, cors_origins: Sequence[str], *, ready_fd: int | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C, or until the model cannot be loaded; then finish what was admitted.

    A second signal ends the process at once. With `ready_fd` it is one of several processes: it writes a byte there
    when the model is ready, and ends when its model or its parent has died.
    """
    parent = os.getppid()
    begin = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked_to_stop() -> None:
        if stop.is_set():
            os._exit(1)  # asked twice: what is under way is given up
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, asked_to_stop)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(asked_to_stop))
    stopping = asyncio.create_task(stop.wait())
    limits = service.limits
    app = build_app(service, cors_origins)
    async with serving(
        app,
        sock,
        connections=limits.connections,
        idle_seconds=limits.idle_seconds,
        fast_path=partial(refused_at_once, service),
    ):
        settling = asyncio.create_task(service.settled.wait())
        await asyncio.wait([settling, stopping], return_when=asyncio.FIRST_COMPLETED)
        settling.cancel()
        if service.status == "ready":
            seconds = time.monotonic() - begin
            for model in service.models:
                ready = "ready and at full speed" if model.at_full_speed else "ready"
                print(f"{model.name} is {ready} on {service.device}, {seconds:.1f} s after the port", flush=True)
            full_speed = asyncio.create_task(tell_full_speed(service, begin))
            if ready_fd is None:
                print(startup_message(url_of(sock)), flush=True)
                await stopping
            else:
                os.write(ready_fd, b"r")
                # A process that could only say 503 must not stand in the others' way.
                while not stop.is_set() and service.status == "ready" and os.getppid() == parent:
                    await asyncio.wait([stopping], timeout=0.5)
            full_speed.cancel()
        # New connections are still taken, and told that the server is shutting down.
        service.draining = True
        while service.admitted and service.status == "draining":
            await asyncio.sleep(0.02)
    stopping.cancel()


def run_for_each_device(argv: Sequence[str], devices: Sequence[str], sock: socket.socket) -> int:
    """Start this script once for each device, all on one listening socket; the first that fails ends them all."""
    if sys.platform == "win32":
        raise ValueError("--device: several devices need a system other than Windows; start a server for each --port")
    environment = dict(os.environ)
    if all(device == "cpu" for device in devices):
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))
    url = url_of(sock)
    ready, ready_fd = os.pipe()
    os.set_blocking(ready, False)
    children = []
    for device in devices:
        flags = ["--device", device, "--listen_fd", str(sock.fileno()), "--ready_fd", str(ready_fd)]
        command = [sys.executable, str(Path(__file__).resolve()), *argv, *flags]
        # In a session of its own it does not get Ctrl-C twice, from the terminal and from here.
        child = subprocess.Popen(command, pass_fds=[sock.fileno(), ready_fd], env=environment, start_new_session=True)
        children.append(child)
    sock.close()  # it is the children's now: who of them stops must not be waited for on it
    os.close(ready_fd)
    waiting = len(devices)
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while any(child.poll() is None for child in children):
        failed = [child for child in children if child.poll() is not None]
        if failed and not stopping:
            status = failed[0].returncode
            print(f"error: the process of device {devices[children.index(failed[0])]} has ended", file=sys.stderr)
            stop()
            for child in children:
                child.wait()
            return status or 1
        with suppress(BlockingIOError):
            if waiting and (bytes_read := len(os.read(ready, waiting))):
                waiting -= bytes_read
                if not waiting:
                    print(startup_message(url), flush=True)
        time.sleep(0.1)
    os.close(ready)
    return max((abs(child.returncode) for child in children), default=0)


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(argv)
    check(args)
    keys = read_keys(args)
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    devices = [device.strip() for device in args.device.split(",")]
    if args.listen_fd is None:
        shown = {name: value for name, value in vars(args).items() if name not in ("api_key", "listen_fd", "ready_fd")}
        shown["api_keys"] = len(keys)
        print("settings: " + ", ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    limits = Limits(
        samples=args.max_samples,
        length=args.max_length,
        prompts=args.max_prompts,
        body_bytes=args.max_body,
        body_seconds=args.body_timeout,
        request_seconds=args.request_timeout,
        idle_seconds=args.idle_timeout,
        connections=args.max_connections,
    )

    def load(folder: str) -> EngineProcess:
        options = EngineOptions(folder, args.vocab_file, args.device, args.batch_size, args.precision)
        return EngineProcess(options, max_waiting=args.max_waiting)

    with listen(args.host, args.port) if args.listen_fd is None else socket.socket(fileno=args.listen_fd) as sock:
        if args.listen_fd is None:
            print(f"listening on {url_of(sock)}, loading {', '.join(args.model_path)}", flush=True)
        if len(devices) > 1:
            return run_for_each_device(sys.argv[1:] if argv is None else argv, devices, sock)
        models = [
            ServedModel(name, partial(load, folder))
            for name, folder in zip(model_names(args), args.model_path, strict=True)
        ]
        service = Service(models, limits, keys)
        asyncio.run(serve(service, sock, origins(args.cors_origins), ready_fd=args.ready_fd))
    if service.error is not None:
        raise service.error
    if args.listen_fd is not None and any(model.engine and model.engine.error for model in models):
        return 1
    print("stopped", flush=True)
    if not service.settled.is_set():
        os._exit(0)  # the thread that loads would be torn down in the middle of an import
    return None


if __name__ == "__main__":
    run_script(main)
