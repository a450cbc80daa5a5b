"""A web.Application behind a listening socket: how many connections, how long they may idle, errors as JSON."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from aiohttp import web

LOGGER = logging.getLogger("server")
FastPath = Callable[[str], bytes | None]
"""Gives the whole answer to a simple POST request to a path, or None."""
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


# The head of a POST with a body whose length it says.
_SIMPLE_HEAD = re.compile(rb"POST (\S+) HTTP/1\.1\r\n((?:[^\r\n]+\r\n)+)\r\n")
_LENGTH = re.compile(rb"^Content-Length:[ \t]*(\d{1,9})\r$", re.IGNORECASE | re.MULTILINE)
# What a short answer would not do for.
_ASKS_FOR_MORE = re.compile(
    rb"^(?:Transfer-Encoding|Expect|Origin|Upgrade|Connection:(?![ \t]*keep-alive\r$))", re.IGNORECASE | re.MULTILINE
)
MAX_HEAD_BYTES = 4096


def simple_post(data: bytes) -> str | None:
    """The path, if these bytes are one whole request to which a short answer is all that is needed."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
    path, length = _simple_head(data[:end]) if end >= 4 else (None, 0)
    return path if len(data) - end == length else None


@lru_cache(maxsize=256)  # clients send the same again and again
def _simple_head(head: bytes) -> tuple[str | None, int]:
    """The path of a request and the length of its body; no path if it is not simple."""
    found = _SIMPLE_HEAD.fullmatch(head)
    lengths = _LENGTH.findall(found[2]) if found else []
    if found is None or len(lengths) != 1 or _ASKS_FOR_MORE.search(found[2]):
        return None, 0
    return found[1].decode("latin-1"), int(lengths[0])


def fast_response(status: int, body: bytes, headers: Mapping[str, str]) -> bytes:
    """An answer in JSON, all of it, for a connection that stays."""
    lines = {"Content-Type": "application/json; charset=utf-8", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    date = formatdate(time.time(), usegmt=True)
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nDate: {date}\r\n{head}\r\n".encode("ascii") + body


class Connection(web.RequestHandler):
    """aiohttp's side of a connection; what it cannot read as HTTP is answered in JSON and not logged.

    What `fast_path` answers is not made a request of: a thousand refusals a second would take a tenth of a processor.
    """

    __slots__ = ("_at_once", "_simple")

    def __init__(self, *args: Any, fast_path: FastPath, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._at_once = fast_path
        self._simple = True  # aiohttp has had whole simple requests only, and so holds no part of another

    def data_received(self, data: bytes) -> None:
        if self._simple and data:  # aiohttp itself calls this with nothing
            path = simple_post(data)
            self._simple = path is not None
            if path is not None and self._rests() and (answer := self._at_once(path)) is not None:
                assert self.transport is not None
                self.transport.write(answer)
                self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
                return
        super().data_received(data)

    def _rests(self) -> bool:
        """Whether every request has been answered, and the client has taken the answers."""
        waiter, transport = self._waiter, self.transport
        return (
            waiter is not None
            and not waiter.done()
            and not self._force_close
            and not self._close
            and transport is not None
            and transport.get_write_buffer_size() == 0
        )

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


class OverloadedProtocol(asyncio.Protocol):
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


@asynccontextmanager
async def serving(
    app: web.Application,
    sock: socket.socket,
    *,
    connections: int,
    idle_seconds: float,
    fast_path: FastPath = lambda _: None,
) -> AsyncIterator[web.AppRunner]:
    """Serve an application on a listening socket; at the end the requests under way are finished.

    Args:
        connections: more are answered with 503.
        idle_seconds: a connection without a whole request head for so long is closed.
        fast_path: what answers simple POST requests to a path, if it does, before the application sees them.
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

    def protocol() -> asyncio.BaseProtocol:
        if len(manager.connections) >= connections:
            return OverloadedProtocol(connections)
        return Connection(manager, loop=loop, fast_path=fast_path, **settings)

    server = await loop.create_server(protocol, sock=sock, backlog=ACCEPTED_AT_ONCE)
    sock.listen(QUEUED)
    try:
        yield runner
    finally:
        server.close()
        await runner.cleanup()
