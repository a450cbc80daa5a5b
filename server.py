"""Serve completions over HTTP: a model folder in, POST {"context", "maxlength", "samples"} answered with a JSON array.

Reads   model/final_model/     what train.py wrote, or a folder of GPT2-Chinese
Writes  nothing

    python server.py
    curl http://127.0.0.1:5005/generate -d '{"context": "你好", "maxlength": 50, "samples": 5}'

POST /v1/completions is the same for clients of OpenAI's API, and GET / is a web page that completes as one types.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp_cors
from aiohttp import web

from gpt2_chinese.best_model import note_of_a_better_model
from gpt2_chinese.command_line import message_language, print_settings, remark, run_script, say, set_quiet
from gpt2_chinese.decoding.completion import Completion, EngineStopped
from gpt2_chinese.decoding.process import EngineOptions, EngineProcess
from gpt2_chinese.serving.answer_size import (
    check_answer_size,
    largest_detokenize_answer,
    largest_tokenize_answer,
)
from gpt2_chinese.serving.api import (
    MAX_TOKENS,
    parse_detokenize,
    parse_generate,
    parse_json_object,
    parse_tokenize,
    parse_v1,
)
from gpt2_chinese.serving.connections import open_socket, url_of
from gpt2_chinese.serving.devices import run_for_each_device
from gpt2_chinese.serving.errors import ApiError
from gpt2_chinese.serving.events import GenerateEvents, stream_sse
from gpt2_chinese.serving.fast_path import COMPLETION_PATHS
from gpt2_chinese.serving.flags import (
    MEGABYTE,
    check_flags,
    limits_of,
    model_names,
    parse_args,
    parse_devices,
    parse_origins,
)
from gpt2_chinese.serving.hosts import allowed_hosts
from gpt2_chinese.serving.keys import ADMIN_PATH, read_admin_keys, read_keys, require_key, restart_without_keys
from gpt2_chinese.serving.lifecycle import serve
from gpt2_chinese.serving.metrics import CONTENT_TYPE, metrics_page
from gpt2_chinese.serving.middlewares import (
    check_host,
    count_responses,
    errors_as_json,
    expect_continue,
    set_headers,
)
from gpt2_chinese.serving.openai_completions import OpenAICompletion, openai_model
from gpt2_chinese.serving.openapi import openapi
from gpt2_chinese.serving.responses import json_response
from gpt2_chinese.serving.running_request import RunningRequest, count_tokens, submit
from gpt2_chinese.serving.service import ServedModel, Service
from gpt2_chinese.serving.supervision import run_models
from gpt2_chinese.serving.watching import newest_model
from gpt2_chinese.serving.writing import send_json

SERVICE = web.AppKey("service", Service)
PAGE = Path(__file__).resolve().parent / "gpt2_chinese" / "serving" / "web" / "index.html"
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
CUT_HEADER = "X-Context-Cut"
"""The number of tokens of the context that did not fit into the model's window."""
TOKENS_HEADER = "X-Tokens"
"""The number of tokens generated for the answer."""
MISSING_HEADER = "X-Samples-Missing"
"""The number of samples that were asked for and are not there, since the model has no more different texts."""
SWITCH_SECONDS = 0.0005
"""Longest time that one Python thread keeps the others waiting: tokenizing a long text must not delay short answers."""


# The application.


def build_app(service: Service, cors_origins: Sequence[str] = ("*",)) -> web.Application:
    """Make the application; its models are loaded when it starts, and closed with it."""
    app = web.Application(
        middlewares=[
            count_responses(service),
            errors_as_json,
            check_host(service),
            require_key(service.keys, service.admin_keys),
        ],
        client_max_size=service.limits.body_bytes,
    )
    app[SERVICE] = service
    app.cleanup_ctx.append(models_context)
    app.on_response_prepare.append(set_headers)
    app.router.add_get("/", handle_page, expect_handler=expect_continue)
    app.router.add_post("/", handle_generate, expect_handler=expect_continue)
    app.router.add_post("/generate", handle_generate, expect_handler=expect_continue)
    app.router.add_post("/v1/completions", handle_v1_completions, expect_handler=expect_continue)
    app.router.add_get("/v1/models", handle_v1_models, expect_handler=expect_continue)
    app.router.add_get("/v1/models/{model}", handle_v1_model, expect_handler=expect_continue)
    app.router.add_get("/health", handle_health, expect_handler=expect_continue)
    app.router.add_get("/metrics", handle_metrics, expect_handler=expect_continue)
    app.router.add_get("/openapi.json", handle_openapi, expect_handler=expect_continue)
    if service.admin_keys:
        app.router.add_post(ADMIN_PATH + "reload", handle_reload, expect_handler=expect_continue)
    app.router.add_post("/tokenize", handle_tokenize, expect_handler=expect_continue)
    app.router.add_post("/detokenize", handle_detokenize, expect_handler=expect_continue)
    if cors_origins:
        allow_cors(app, cors_origins)
    return app


async def models_context(app: web.Application) -> AsyncIterator[None]:
    async with run_models(app[SERVICE]):
        yield


def allow_cors(app: web.Application, origins: Sequence[str]) -> None:
    """Let the pages of these sites complete texts from a browser; of the other routes they can read nothing."""
    options = aiohttp_cors.ResourceOptions(
        allow_credentials=False,
        allow_headers="*",
        allow_methods="*",
        expose_headers=(CUT_HEADER, TOKENS_HEADER, MISSING_HEADER, "Retry-After"),
    )
    cors = aiohttp_cors.setup(app, defaults=dict.fromkeys(origins, options))
    for route in list(app.router.routes()):
        if route.method == "POST" and route.resource is not None and route.resource.canonical in COMPLETION_PATHS:
            cors.add(route)


# Completions.


async def handle_generate(request: web.Request) -> web.StreamResponse:
    """POST /generate and POST /: a JSON array of texts, or server-sent events."""
    service = request.app[SERVICE]
    completion_request = parse_generate(
        await read_body(request), service.limits, lambda name: service.model(name).vocab_size
    )
    async with submit(service, completion_request) as running:
        if completion_request.stream:
            return await stream_sse(request, service, running, GenerateEvents(running), cut_header(running))
        completions = await running.completions()
        headers = {**cut_header(running), **missing_header(running), TOKENS_HEADER: str(count_tokens(completions))}
        value = partial(generate_answer, completions[0], completion_request.with_scores)
        return await send_json(request, service, running.answer_bytes, value, headers)


def generate_answer(completions: Sequence[Completion], with_scores: bool) -> list[Any]:
    """What /generate answers: texts, or objects with their scores."""
    if not with_scores:
        return [completion.text for completion in completions]
    return [
        {"text": one.text, "score": round(one.score or 0.0, 4), "finish_reason": one.finish_reason}
        for one in completions
    ]


async def handle_v1_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions: the completions of several prompts in OpenAI's shape, or server-sent events."""
    service = request.app[SERVICE]
    body = await read_body(request)
    completion_request = parse_v1(body, service.limits, lambda name: service.model(name).vocab_size)
    async with submit(service, completion_request) as running:
        response = OpenAICompletion(running)
        if completion_request.stream:
            return await stream_sse(request, service, running, response, cut_header(running))
        completions = await running.completions()
        headers = cut_header(running) | missing_header(running)
        return await send_json(request, service, running.answer_bytes, lambda: response.body(completions), headers)


async def handle_tokenize(request: web.Request) -> web.StreamResponse:
    """POST /tokenize: the ids of a text, with vLLM's names."""
    service = request.app[SERVICE]
    fields = parse_tokenize(await read_body(request))
    model = service.model(fields["model"])
    engine = service.ready_engine(model)
    tokenizer, text, with_names = engine.tokenizer, fields["prompt"], fields["return_token_strs"]
    size = largest_tokenize_answer(text, model.token_bytes, with_names=with_names)
    check_answer_size(size, service.limits, "send a shorter text, or leave out return_token_strs", "prompt")

    def answer(ids: list[int]) -> dict[str, Any]:
        if fields["add_special_tokens"]:
            ids = [tokenizer.marks.begin, *ids]
        names = [tokenizer.vocabulary[id_] for id_ in ids] if with_names else None
        return {"count": len(ids), "max_model_len": engine.n_ctx, "tokens": ids, "token_strs": names}

    with service.admit(engine, size):
        ids = await model.answer_with_tokenizer(lambda: tokenizer.encode(text), len(text))
        return await send_json(request, service, size, partial(answer, ids))


async def handle_detokenize(request: web.Request) -> web.StreamResponse:
    """POST /detokenize: the text of ids, with vLLM's names."""
    service = request.app[SERVICE]
    fields = parse_detokenize(await read_body(request), service.limits, lambda name: service.model(name).vocab_size)
    model = service.model(fields["model"])
    engine, ids = service.ready_engine(model), fields["tokens"]
    size = largest_detokenize_answer(ids, model.token_bytes)
    check_answer_size(size, service.limits, "send fewer tokens", "tokens")
    with service.admit(engine, size):
        text = await model.answer_with_tokenizer(lambda: engine.tokenizer.decode(ids), len(ids))
        return await send_json(request, service, size, lambda: {"prompt": text})


async def read_body(request: web.Request, *, admitted: bool = True) -> bytes:
    """Read a body of limited size in limited time; one that is `admitted` only if requests are accepted at all.

    Raises:
        ApiError: the server accepts no requests, or the body is not as it must be.
    """
    service = request.app[SERVICE]
    if admitted and (error := service.admission_error()):
        raise error
    limits = service.limits
    if "Content-Encoding" in request.headers:
        raise ApiError(415, "unsupported_encoding", "compressed bodies are not supported; omit Content-Encoding")
    too_large = ApiError(413, "body_too_large", f"the body has more than {limits.body_bytes} bytes")
    if request.content_length is not None and request.content_length > limits.body_bytes:
        raise too_large
    try:
        if request.content.is_eof():  # it came with the head; a timer would cost more than reading it
            return await request.read()
        return await asyncio.wait_for(request.read(), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise ApiError(408, "body_timeout", message) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except web.RequestPayloadError as error:
        raise ApiError(400, "invalid_body", f"the body cannot be read: {error}") from None


def cut_header(running: RunningRequest) -> dict[str, str]:
    return {CUT_HEADER: str(running.cut_tokens)} if running.cut_tokens else {}


def missing_header(running: RunningRequest) -> dict[str, str]:
    return {MISSING_HEADER: str(running.num_missing)} if running.num_missing else {}


# The models and the server's state.


async def handle_v1_models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    service = request.app[SERVICE]
    return json_response({"object": "list", "data": [openai_model(service, model) for model in service.models]})


async def handle_v1_model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}."""
    service = request.app[SERVICE]
    return json_response(openai_model(service, service.model(request.match_info["model"])))


async def handle_health(request: web.Request) -> web.Response:
    """GET /health: 200 while requests are accepted, otherwise 503."""
    service = request.app[SERVICE]
    models = [model_health(model) for model in service.models]
    health = {
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
    return json_response(health, status=200 if service.status == "ready" else 503)


def model_health(model: ServedModel) -> dict[str, str | int | bool | None]:
    return {
        "model": model.name,
        "status": model.status,
        "running": model.running,
        "waiting": model.waiting,
        "full_speed": model.at_full_speed,
        "n_ctx": model.engine.n_ctx if model.engine else None,
        "restarts": model.restarts,
    }


async def handle_reload(request: web.Request) -> web.Response:
    """POST /admin/reload: load every model's folder again, or that of {"model": name}, and serve what is there now.

    A folder that cannot be loaded leaves the old model serving, and is answered with 409 and the reason.
    """
    service = request.app[SERVICE]
    body = await read_body(request, admitted=False)
    fields = parse_json_object(body, '{"model": "final_model"}') if body.strip() else {}
    name = fields.get("model")
    if set(fields) - {"model"} or not isinstance(name, (str, type(None))):
        raise ApiError(400, "unknown_field", 'the only field is model, a name: {"model": "final_model"}', "model")
    models = list(service.models) if name is None else [service.model(name)]
    if service.draining or service.supervisor is None or any(model.status == "loading" for model in models):
        raise ApiError(503, service.status, "models are being loaded or the server is shutting down; try again later")
    for model in models:
        try:
            await asyncio.to_thread(service.supervisor.reload, model)
        except (ValueError, OSError, EngineStopped) as error:
            message = f"{model.name} is served as before, its folder cannot be loaded: {error}"
            raise ApiError(409, "not_reloaded", message, "model") from None
    return json_response({"reloaded": [model.name for model in models]})


async def handle_metrics(request: web.Request) -> web.Response:
    """GET /metrics: Prometheus' text format."""
    return web.Response(body=metrics_page(request.app[SERVICE]), headers={"Content-Type": CONTENT_TYPE})


async def handle_openapi(request: web.Request) -> web.Response:
    """GET /openapi.json."""
    service = request.app[SERVICE]
    vocab_size = max(model.vocab_size or MAX_TOKENS for model in service.models)
    return json_response(openapi(service.limits, vocab_size, needs_key=bool(service.keys)))


async def handle_page(_: web.Request) -> web.Response:
    """GET /: the web page that completes as one types."""
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
    return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html", headers=headers)


# The process.


def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse_args(argv, "Serve completions of a trained model over HTTP.")
    set_quiet(args.quiet)
    check_flags(args)
    keys, admin_keys = read_keys(args), read_admin_keys(args)
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    devices = parse_devices(args.device)
    is_child = args.listen_fd is not None
    if not is_child:
        print_settings(printable(args, len(keys), len(admin_keys)))
    with socket.socket(fileno=args.listen_fd) if is_child else open_socket(args.host, args.port) as sock:
        if not is_child:
            remark(f"listening on {url_of(sock)}, loading {', '.join(args.model_path)}")
            for better in filter(None, map(note_of_a_better_model, args.model_path)):
                remark(f"note: {better}")
        if len(devices) > 1:
            return run_for_each_device(Path(__file__).resolve(), sys.argv[1:] if argv is None else argv, devices, sock)
        hosts = allowed_hosts(args.host, args.allowed_hosts, sock.getsockname()[0])
        service = Service(served_models(args), limits_of(args), keys, admin_keys=admin_keys, hosts=hosts)
        app = build_app(service, parse_origins(args.cors_origins))
        asyncio.run(serve(app, service, sock, ready_fd=args.ready_fd))
    if isinstance(service.error, EngineStopped):
        raise OSError(f"{service.error}; was it killed, or is the memory too small for it?")
    if service.error is not None:
        raise service.error
    if service.has_failed:
        print("error: a model has stopped, and it is not to be started again (--no-restart)", file=sys.stderr)
        return 1
    say("stopped")
    if not service.loading_done.is_set():
        os._exit(0)  # the thread that loads would fail in the middle of an import
    return None


def printable(args: argparse.Namespace, keys: int, admin_keys: int = 0) -> argparse.Namespace:
    """The flags for the log: how many API keys there are instead of the keys, and no internal flags."""
    flags = {name: value for name, value in vars(args).items() if name not in ("listen_fd", "ready_fd")}
    return argparse.Namespace(**flags | {"api_key": f"<{keys} keys>", "admin_key": f"<{admin_keys} keys>"})


def served_models(args: argparse.Namespace) -> list[ServedModel]:
    """The models of the flags, not loaded yet; each decodes in a process of its own."""

    def load(folder: str) -> EngineProcess:
        marks = tuple(args.document_marks) if args.document_marks else None
        options = EngineOptions(
            folder,
            args.vocab_file,
            args.device,
            args.batch_size,
            args.precision,
            marks,
            args.prefix_cache * MEGABYTE,
            quiet=args.quiet,
            language=message_language(),
        )
        return EngineProcess(options, max_waiting=args.max_waiting, hang_timeout=args.hang_timeout)

    models = []
    for name, path in zip(model_names(args), args.model_path, strict=True):
        folder, watched = watched_folder(path) if args.watch else (path, None)
        models.append(
            ServedModel(
                name, partial(load, folder), Path(folder), load_from=load, restart=args.restart, watched=watched
            )
        )
    return models


def watched_folder(path: str) -> tuple[str, Path]:
    """The model folder to begin with, and the folder of train.py in which new ones are looked for.

    Raises:
        FileNotFoundError: there is no model folder yet.
    """
    if (Path(path) / "config.json").is_file():
        return path, Path(path).resolve().parent
    newest = newest_model(Path(path))
    if newest is None:
        raise FileNotFoundError(f"--watch: there is no model folder in {path} yet; train.py writes one after an epoch")
    return str(newest), Path(path)


if __name__ == "__main__":
    restart_without_keys()
    run_script(main)
