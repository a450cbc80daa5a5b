"""A web.Application behind a listening socket: how many connections, how long they may idle, errors as JSON."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import formatdate
from functools import lru_cache
from typing import Any

from aiohttp import HttpVersion11, web

LOGGER = logging.getLogger("server")
ACCEPTED_AT_ONCE = 16
"""Connections that one process takes from the queue before the others get their turn."""
QUEUED = 1024
"""Connections that the system keeps until they are taken."""


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


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def error_body(status: int, code: str, message: str, param: str | None = None) -> bytes:
    """An error as OpenAI's clients expect it, in UTF-8."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    # A field's name in an error may hold half of a surrogate pair.
    return json.dumps(error, ensure_ascii=False).encode("utf-8", errors="replace")


class Connection(web.RequestHandler):
    """aiohttp's side of a connection; what it cannot read as HTTP is answered in JSON and not logged."""

    __slots__ = ()

    def handle_error(
        self, request: Any, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if status >= 500:
            LOGGER.error("a connection failed", exc_info=exc)
            message, code = "the server made a mistake; its log has the details", "internal_error"
        else:
            code = "bad_http"
            message = "this is not HTTP as it should be: " + (message or "").partition("\n")[0].strip().rstrip(":")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        response = web.Response(
            body=error_body(status, code, message), status=status, content_type="application/json", charset="utf-8"
        )
        response.force_close()
        return response


class FullHouse(asyncio.Protocol):
    """Says 503 to a connection too many and closes it."""

    def __init__(self, most: int) -> None:
        body = error_body(503, "too_many_connections", f"{most} connections are open already; try again later")
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
        )
        self.answer = head.encode("ascii") + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.answer)
        transport.write_eof()
        # Closed at once, what the client has still to send would be answered by a reset that eats the answer.
        asyncio.get_running_loop().call_later(1, transport.abort)


class ShortAnswer(web.StreamResponse):
    """An answer in JSON whose bytes are written as they are: what is refused a thousand times a second costs little."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(status=status)
        lines = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(body)), **headers}
        head = f"HTTP/1.1 {status} {self.reason}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._first_lines, self._content = head.encode("ascii"), body

    @property
    def keep_alive(self) -> bool:
        return True

    async def prepare(self, request: web.BaseRequest) -> None:
        if request.transport is not None:
            request.transport.write(self._first_lines + _date_line(int(time.time())) + b"\r\n" + self._content)

    async def write_eof(self, data: bytes = b"") -> None:
        assert not data


@lru_cache(maxsize=1)
def _date_line(seconds: int) -> bytes:
    return f"Date: {formatdate(seconds, usegmt=True)}\r\n".encode("ascii")


def can_be_short(request: web.BaseRequest) -> bool:
    """Whether a ShortAnswer is all that is needed: the whole request is there, and so is the client."""
    transport = request.transport
    return (
        request.keep_alive
        and request.version == HttpVersion11
        and request.content.is_eof()
        and "Origin" not in request.headers
        and "Expect" not in request.headers
        and transport is not None
        and transport.get_write_buffer_size() == 0
    )


@asynccontextmanager
async def serving(
    app: web.Application,
    sock: socket.socket,
    *,
    connections: int,
    idle_seconds: float,
    at_once: Callable[[web.BaseRequest], ShortAnswer | None] = lambda _: None,
) -> AsyncIterator[web.AppRunner]:
    """Serve an application on a listening socket; at the end the requests under way are finished.

    Args:
        connections: more are answered with 503.
        idle_seconds: a connection without a whole request head for so long is closed.
        at_once: what may answer a request before the application sees it.
    """
    # Compressed bodies are refused, so they need not be unpacked: 64 KiB of gzip can be 64 MiB of text. A body that
    # was refused is read for a second more, so that its sender gets to read the answer.
    settings: dict[str, Any] = {
        "auto_decompress": False,
        "lingering_time": 1.0,
        "keepalive_timeout": idle_seconds,
        "access_log": None,
    }
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=5.0, **settings)
    await runner.setup()
    manager = runner.server
    assert manager is not None
    loop = asyncio.get_running_loop()
    application = manager.request_handler

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        short = at_once(request)
        return short if short is not None else await application(request)

    manager.request_handler = answer

    def protocol() -> asyncio.BaseProtocol:
        if len(manager.connections) >= connections:
            return FullHouse(connections)
        return Connection(manager, loop=loop, **settings)

    server = await loop.create_server(protocol, sock=sock, backlog=ACCEPTED_AT_ONCE)
    sock.listen(QUEUED)
    try:
        yield runner
    finally:
        server.close()
        await runner.cleanup()
