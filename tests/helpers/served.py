"""server.py's application behind a real socket, in the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
from tiny_model import tiny_model, tiny_tokenizer

from gpt2_chinese.decoding.engine import Engine
from gpt2_chinese.serving.api import Limits
from gpt2_chinese.serving.connections import open_socket, start_listening
from gpt2_chinese.serving.fast_path import refuse_overload
from gpt2_chinese.serving.service import ServedModel, Service

GOOD = {"context": "一丁", "maxlength": 6, "samples": 2, "seed": 1}


class Client:
    """An aiohttp session at the server's address; tests may look at the server's `service` and `app`."""

    def __init__(self, session: aiohttp.ClientSession, port: int, service: Any, app: Any) -> None:
        self.session, self.host, self.port, self.service, self.app = session, "127.0.0.1", port, service, app

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def served(
    test: Callable[[Client], Awaitable[Any]],
    *,
    engine: Engine | None = None,
    load: Callable[[], Engine] | None = None,
    others: dict[str, Engine] | None = None,
    keys: tuple[bytes, ...] = (),
    cors: tuple[str, ...] = ("*",),
    wait: bool = True,
    send_buffer: int | None = None,
    **limits: Any,
) -> Any:
    """Run `test(client)` against a server of its own; without `wait`, while the model is still being loaded.

    The model is called "tiny"; `others` are served beside it, by their names.
    """
    server = sys.modules["server"]

    async def run() -> Any:
        made = engine or (None if load else Engine(tiny_model(), tiny_tokenizer(), max_num_seqs=8))
        if "length" in limits:  # completions that end when they are told to need no room for all their tokens
            limits.setdefault("answer_bytes", 1 << 40)
            limits.setdefault("pending_bytes", 1 << 50)
        server_limits = Limits(**limits)
        loads = {"tiny": load or (lambda: made)} | {name: lambda one=one: one for name, one in (others or {}).items()}
        models = [ServedModel(name, one) for name, one in loads.items()]
        service = Service(models, server_limits, keys, "cpu")
        sock = open_socket("127.0.0.1", 0)
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        port = sock.getsockname()[1]
        app = server.build_app(service, cors)
        fast_path = partial(refuse_overload, service)
        async with start_listening(
            app,
            sock,
            connections=server_limits.connections,
            idle_seconds=server_limits.idle_seconds,
            fast_path=fast_path,
        ):
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                if wait:
                    await asyncio.wait_for(service.loading_done.wait(), 60)
                    if service.error is not None:
                        raise service.error
                return await test(Client(session, port, service, app))

    return asyncio.run(run())


async def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.001)


async def check_good(client: Client) -> list[str]:
    async with client.post("/generate", json=GOOD) as response:
        assert response.status == 200, await response.text()
        texts = await response.json()
    assert len(texts) == 2 and all(text.startswith("一丁") for text in texts)
    return texts


async def check_error(response: aiohttp.ClientResponse, status: int, code: str, param: str | None = None) -> dict:
    body = await response.text()
    assert response.status == status, body
    assert response.content_type == "application/json"
    return error_of(body, code, param)


def error_of(body: str, code: str, param: str | None = None) -> dict:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"] and "Traceback" not in body
    return error


async def raw(client: Client, data: bytes, *, wait: float = 5) -> bytes:
    """Send bytes as they are and read the answer until the server closes or `wait` seconds have passed."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(data)
    answer = b""
    with contextlib.suppress(asyncio.TimeoutError, ConnectionResetError):
        while part := await asyncio.wait_for(reader.read(65536), wait):
            answer += part
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()
    return answer


async def events(response: aiohttp.ClientResponse) -> list[tuple[str, Any]]:
    """The server-sent events of an answer as (name, data); data that is not JSON stays a text."""
    assert response.status == 200, await response.text()
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    found = []
    for block in (await response.text()).split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            data = fields["data"]
            found.append((fields.get("event", ""), json.loads(data) if data != "[DONE]" else data))
    return found
