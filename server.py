"""Serve completions over HTTP: a model folder in, POST {"context", "maxlength", "samples"} answered with a JSON array.

Reads   model/final_model/     what train.py wrote, or a folder of GPT2-Chinese
Writes  nothing

    python server.py
    curl http://127.0.0.1:5005/generate -d '{"context": "你好", "maxlength": 50, "samples": 5}'
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import aiohttp_cors
from aiohttp import web

from gpt2_chinese.checkpoint import load_model
from gpt2_chinese.command_line import run_script
from gpt2_chinese.engine import (
    SETTING_LIMITS,
    Engine,
    EngineFull,
    EngineStopped,
    Settings,
    choose_device,
)

LOGGER = logging.getLogger("server")
PAGE = Path(__file__).resolve().parent / "gpt2_chinese" / "web" / "index.html"
CUT_HEADER = "X-Context-Cut"
"""Says how many tokens of the context did not fit the model."""

DEFAULT_LENGTH = 50
DEFAULT_SAMPLES = 5
WARM_UP = "你好"


@dataclass(frozen=True)
class Limits:
    """What one request may ask for and how long it may take."""

    samples: int = 32
    length: int = 1024
    body_bytes: int = 65_536
    body_seconds: float = 10.0
    request_seconds: float = 120.0


@dataclass(frozen=True)
class Wish:
    """A request that has been checked."""

    context: str
    length: int
    samples: int
    settings: Settings
    seed: int | None


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param


ENGINE = web.AppKey("engine", Engine)
LIMITS = web.AppKey("limits", Limits)
TOKENIZING = web.AppKey("tokenizing", ThreadPoolExecutor)
DRAINING = web.AppKey("draining", asyncio.Event)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve completions of a trained model over HTTP.")
    limits = Limits()
    # the model
    parser.add_argument("--model_path", default="model/final_model", help="model folder (%(default)s)")
    parser.add_argument("--vocab_file", help="vocabulary of a model folder that has none, such as GPT2-Chinese's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or a GPU's number (%(default)s)")
    # where to listen
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 is every one (%(default)s)")
    parser.add_argument("--port", type=int, default=5005, help="0 takes a free one (%(default)s)")
    # limits
    parser.add_argument("--max_samples", type=int, default=limits.samples, help="of one request (%(default)s)")
    parser.add_argument("--max_length", type=int, default=limits.length, help="tokens of a sample (%(default)s)")
    parser.add_argument("--max_body", type=int, default=limits.body_bytes, help="bytes of a request (%(default)s)")
    parser.add_argument("--body_timeout", type=float, default=limits.body_seconds, help="seconds to read a request")
    parser.add_argument("--request_timeout", type=float, default=limits.request_seconds, help="seconds to answer one")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences decoded at once (%(default)s)")
    parser.add_argument("--max_waiting", type=int, default=256, help="sequences that may wait (%(default)s)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag whose value makes no sense."""
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, it is {args.port}")
    for flag in ("max_samples", "max_length", "max_body", "batch_size", "max_waiting"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be 1 or more, it is {getattr(args, flag)}")
    for flag in ("body_timeout", "request_timeout"):
        if not getattr(args, flag) > 0:
            raise ValueError(f"--{flag} must be above 0 seconds, it is {getattr(args, flag)}")


# What a request may look like.


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no duplicate names, no NaN, and no error but a Refusal."""
    if not body.strip():
        raise Refusal(400, "empty_body", 'the body is empty; send JSON such as {"context": "你好"}')
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(
            400,
            "not_utf8",
            f"the body is not UTF-8 at byte {error.start}; in cmd.exe write Chinese as \\u escapes: \\u4f60\\u597d",
        ) from None

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise Refusal(400, "duplicate_field", f"{_quoted(name)} stands there twice", name)
            fields[name] = value
        return fields

    def no_constant(name: str) -> NoReturn:
        raise Refusal(400, "invalid_json", f"the body is not JSON: {name} is not a JSON number")

    try:
        value = json.loads(text, object_pairs_hook=without_duplicates, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, "invalid_json", f"the body is not JSON: {where}: {error.msg}") from None
    except RecursionError:
        raise Refusal(400, "invalid_json", "the body is nested too deeply") from None
    except ValueError:
        # Python refuses to convert integers of thousands of digits.
        raise Refusal(400, "invalid_json", "the body has a number with too many digits") from None
    if not isinstance(value, dict):
        raise Refusal(400, "not_an_object", f"the body must be a JSON object, it is {_json_type(value)}")
    return value


def parse_wish(body: bytes, limits: Limits) -> Wish:
    """Check a request of /generate; a field that is null counts as not given.

    Raises:
        Refusal: the first thing that is wrong, with the field's name.
    """
    fields = {name: value for name, value in parse_json_object(body).items() if value is not None}
    known = ["context", "maxlength", "samples", "temperature", "top_k", "top_p", "repetition_penalty", "seed"]
    for name in fields:
        if name not in known:
            message = f"there is no field {_quoted(name)}; the fields are {', '.join(known)}"
            raise Refusal(400, "unknown_field", message, name)
    context = fields.get("context")
    if context is None:
        raise Refusal(400, "missing_field", 'context is missing; send JSON such as {"context": "你好"}', "context")
    if not isinstance(context, str):
        raise Refusal(400, "wrong_type", f"context must be a string, it is {_json_type(context)}", "context")
    try:
        context.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"context has half of a surrogate pair at character {error.start + 1}, which is no character"
        raise Refusal(400, "invalid_character", message, "context") from None

    def number(name: str, default: Any, low: float, high: float, *, whole: bool = True) -> Any:
        value = fields.get(name, default)
        kind = "a whole number" if whole else "a number"
        if value is not default and (type(value) is not int and (whole or type(value) is not float)):
            raise Refusal(400, "wrong_type", f"{name} must be {kind}, it is {_json_type(value)}", name)
        if value is not default and not low <= value <= high:
            raise Refusal(400, "out_of_range", f"{name} must be {kind} from {low} to {high}", name)
        return value

    samples = number("samples", min(DEFAULT_SAMPLES, limits.samples), 1, limits.samples)
    length = number("maxlength", min(DEFAULT_LENGTH, limits.length), 1, limits.length)
    defaults = Settings()
    settings = Settings(
        temperature=float(number("temperature", defaults.temperature, *SETTING_LIMITS["temperature"], whole=False)),
        top_k=number("top_k", defaults.top_k, *SETTING_LIMITS["top_k"]),
        top_p=float(number("top_p", defaults.top_p, *SETTING_LIMITS["top_p"], whole=False)),
        repetition_penalty=float(
            number(
                "repetition_penalty",
                defaults.repetition_penalty,
                *SETTING_LIMITS["repetition_penalty"],
                whole=False,
            )
        ),
    )
    return Wish(context, length, samples, settings, number("seed", None, *SETTING_LIMITS["seed"]))


def _quoted(name: str) -> str:
    return json.dumps(name if len(name) <= 60 else name[:60] + "…", ensure_ascii=False)


def _json_type(value: Any) -> str:
    if isinstance(value, float) or type(value) is int:
        return "a fraction" if isinstance(value, float) else "a number"
    names = {str: "a string", bool: "true or false", list: "an array", dict: "an object", type(None): "null"}
    return names[type(value)]


async def read_body(request: web.Request, limits: Limits) -> bytes:
    """Read a request's body, of limited size and in limited time."""
    if "Content-Encoding" in request.headers:
        raise Refusal(415, "unsupported_encoding", "a compressed body is not accepted; leave out Content-Encoding")
    too_large = Refusal(413, "body_too_large", f"the body has more than {limits.body_bytes} bytes")
    if request.content_length is not None and request.content_length > limits.body_bytes:
        raise too_large
    try:
        return await asyncio.wait_for(request.read(), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise Refusal(408, "body_timeout", message) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except web.RequestPayloadError as error:
        raise Refusal(400, "invalid_body", f"the body could not be read: {error}") from None


# The handlers.


async def handle_generate(request: web.Request) -> web.Response:
    """POST /generate and POST /: the completions as a JSON array of strings."""
    app = request.app
    engine, limits = app[ENGINE], app[LIMITS]
    wish = parse_wish(await read_body(request, limits), limits)
    refuse_when_stopped(app)
    loop = asyncio.get_running_loop()
    prompt = await loop.run_in_executor(app[TOKENIZING], engine.prompt, wish.context, wish.length)
    try:
        ticket = engine.submit(prompt, samples=wish.samples, length=wish.length, settings=wish.settings, seed=wish.seed)
    except EngineFull as error:
        raise Refusal(429, "full", str(error)) from None
    try:
        completions = await asyncio.wait_for(asyncio.wrap_future(ticket.future), limits.request_seconds)
    except asyncio.TimeoutError:
        message = f"no answer within {limits.request_seconds:g} seconds; ask for fewer samples or a smaller maxlength"
        raise Refusal(504, "timeout", message) from None
    finally:
        ticket.cancel()  # frees its rows if the client has gone or the time is over
    response = json_response([completion.text for completion in completions])
    if prompt.cut:
        response.headers[CUT_HEADER] = str(prompt.cut)
    return response


async def handle_health(request: web.Request) -> web.Response:
    """GET /health: 200 while requests are taken, 503 otherwise."""
    engine = request.app[ENGINE]
    status = "dead" if engine.error else "draining" if request.app[DRAINING].is_set() else "ready"
    if status == "ready" and not engine.alive:
        status = "dead"
    facts = {"status": status, "running": engine.running, "waiting": engine.waiting, "n_ctx": engine.n_ctx}
    return json_response(facts, status=200 if status == "ready" else 503)


async def handle_page(_: web.Request) -> web.Response:
    """GET /: what this server is."""
    return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html")


def refuse_when_stopped(app: web.Application) -> None:
    if app[DRAINING].is_set():
        raise Refusal(503, "draining", "the server is shutting down")
    if not app[ENGINE].alive:
        raise Refusal(503, "engine_stopped", "the model has stopped; the server must be started again")


def json_response(value: Any, *, status: int = 200) -> web.Response:
    # A field's name in an error may hold half of a surrogate pair.
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace")
    return web.Response(body=body, status=status, content_type="application/json", charset="utf-8")


def error_response(status: int, code: str, message: str, param: str | None = None) -> web.Response:
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return json_response({"error": {"message": message, "type": kind, "param": param, "code": code}}, status=status)


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Answer every error in one form, and tell nothing of the inside."""
    try:
        return await handler(request)
    except Refusal as refusal:
        response = error_response(refusal.status, refusal.code, refusal.message, refusal.param)
        if refusal.status == 429:
            response.headers["Retry-After"] = "1"
        if refusal.status in (408, 413, 415):
            response.force_close()  # the rest of the body is not read
        return response
    except EngineStopped:
        return error_response(503, "engine_stopped", "the model has stopped; the server must be started again")
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
    except Exception:
        LOGGER.exception("%s %s failed", request.method, request.path)
        return error_response(500, "internal_error", "the server made a mistake; its log has the details")


async def vary_by_origin(_: web.Request, response: web.StreamResponse) -> None:
    """Keep caches from giving one site's CORS headers to another."""
    response.headers["Vary"] = "Origin"


def build_app(engine: Engine, limits: Limits | None = None) -> web.Application:
    """Make the application; the engine is started and stopped with it."""
    limits = limits or Limits()
    app = web.Application(
        middlewares=[errors_as_json],
        client_max_size=limits.body_bytes,
        # Compressed bodies are refused, so they need not be unpacked: 64 KiB of gzip can be 64 MiB of text. A body
        # that was refused is read for a second more, so that its sender gets to read the answer.
        handler_args={"auto_decompress": False, "lingering_time": 1.0},
    )
    app[ENGINE] = engine
    app[LIMITS] = limits
    app[DRAINING] = asyncio.Event()

    async def run_engine(app: web.Application) -> AsyncIterator[None]:
        with ThreadPoolExecutor(1, "tokenizing") as tokenizing, engine:
            app[TOKENIZING] = tokenizing
            # The first use loads the segmenter's model and compiles: before the first client, not for it.
            prompt = await asyncio.get_running_loop().run_in_executor(tokenizing, engine.prompt, WARM_UP, 1)
            await asyncio.wrap_future(engine.submit(prompt, samples=1, length=2, seed=0).future)
            yield

    async def start_draining(app: web.Application) -> None:
        app[DRAINING].set()

    app.cleanup_ctx.append(run_engine)
    app.on_shutdown.append(start_draining)
    app.on_response_prepare.append(vary_by_origin)
    routes = [
        app.router.add_get("/", handle_page, allow_head=False),
        app.router.add_post("/", handle_generate),
        app.router.add_post("/generate", handle_generate),
        app.router.add_get("/health", handle_health, allow_head=False),
    ]
    any_site = aiohttp_cors.ResourceOptions(
        allow_credentials=False, allow_headers="*", allow_methods="*", expose_headers=(CUT_HEADER,)
    )
    cors = aiohttp_cors.setup(app, defaults={"*": any_site})
    for route in routes:
        cors.add(route)
    return app


def listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded.

    Raises:
        OSError: the port is in use or may not be used, or there is no such host; the message names the flag.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise OSError(f"--host {host}: no such host ({error.strerror}); use 127.0.0.1, or 0.0.0.0 for all") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            mend = "is in use; stop what uses it, or take another with --port (0 is any free one)"
        elif error.errno == errno.EACCES:
            mend = "is not allowed; take one from 1024 on with --port"
        else:
            mend = f"cannot be used: {error.strerror}"
        raise OSError(f"port {port} on {host} {mend}") from None


def greeting(sock: socket.socket) -> str:
    """The address, and how to try it from a shell and from cmd.exe (which does not send UTF-8)."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    body = {"context": WARM_UP, "maxlength": DEFAULT_LENGTH, "samples": DEFAULT_SAMPLES}
    escaped = json.dumps(body).replace('"', '\\"')
    return (
        f"serving on {url} (Ctrl-C stops); try\n"
        f"  Linux, macOS:  curl {url}/generate -d '{json.dumps(body, ensure_ascii=False)}'\n"
        f'  Windows (cmd): curl {url}/generate -d "{escaped}"'
    )


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(argv)
    check(args)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    print("settings: " + ", ".join(f"{name} {value}" for name, value in vars(args).items()), flush=True)
    with listen(args.host, args.port) as sock:
        model, tokenizer = load_model(args.model_path, device=choose_device(args.device), vocab_file=args.vocab_file)
        engine = Engine(model, tokenizer, rows=args.batch_size, max_waiting=args.max_waiting)
        limits = Limits(args.max_samples, args.max_length, args.max_body, args.body_timeout, args.request_timeout)
        app = build_app(engine, limits)

        async def greet(_: web.Application) -> None:
            print(greeting(sock), flush=True)

        app.on_startup.append(greet)
        web.run_app(app, sock=sock, print=None, handler_cancellation=True, access_log=None)
    print("stopped")
    return None


if __name__ == "__main__":
    run_script(main)
