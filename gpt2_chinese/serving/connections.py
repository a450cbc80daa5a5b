"""Connections between clients and the application: the port, how many there are, how long they may be idle."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web

from gpt2_chinese.serving.errors import INTERNAL_ERROR, ApiError
from gpt2_chinese.serving.fast_path import FastPath, simple_post
from gpt2_chinese.serving.responses import SECURITY_HEADERS, SERVER_NAME, error_response

LOGGER = logging.getLogger("server")
MAX_ACCEPTS = 16
"""Connections that one process accepts in a row; then the processes of other devices get their turn."""
BACKLOG = 1024
"""Connections that the system queues until they are accepted."""
LINGERING_SECONDS = 1.0
"""How long the rest of a refused body is read, so that its sender gets to read the answer."""
PROGRESS_CHECKS = 5
"""How often, in the time that a client has for reading, it is looked whether it reads."""
SHUTDOWN_SECONDS = 5.0
"""How long the requests that are left may take when the server stops."""


def open_socket(host: str, port: int) -> socket.socket:
    """Bind and listen, before the model is loaded.

    Raises:
        OSError: the port is in use or not allowed, or there is no such host; the message names the flag.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise OSError(
            f"--host {host}: there is no such host ({error.strerror}); use 127.0.0.1, or 0.0.0.0 for all"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = "is in use; stop the program that uses it, or choose another --port (0 is any free one)"
        elif error.errno == errno.EACCES:
            problem = "is not allowed; choose a --port from 1024 on"
        else:
            problem = f"cannot be used: {error.strerror}"
        raise OSError(f"port {port} on {host} {problem}") from None


def url_of(sock: socket.socket) -> str:
    """The address under which this machine reaches the socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(web.RequestHandler):
    """aiohttp's protocol of a connection, with errors of HTTP answered in JSON, and with the fast path.

    What `fast_path` answers does not reach aiohttp: a thousand refusals a second would take a tenth of a processor.
    """

    __slots__ = ("_fast_path", "_only_simple")

    def __init__(self, *args: Any, fast_path: FastPath, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._fast_path = fast_path
        self._only_simple = True  # so far aiohttp got whole simple requests only, and holds no part of another one

    def data_received(self, data: bytes) -> None:
        if self._only_simple and data:  # aiohttp itself calls this with no data
            request = simple_post(data)
            self._only_simple = request is not None
            if request is not None and self._is_idle() and (response := self._fast_path(request)) is not None:
                assert self.transport is not None
                self.transport.write(response)
                self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
                return
        super().data_received(data)

    def _is_idle(self) -> bool:
        """Whether every request has been answered, and the client has received the answers."""
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
            error = ApiError(status, "internal_error", INTERNAL_ERROR)
        else:
            problem = (message or "").partition("\n")[0].strip().rstrip(":")
            error = ApiError(status, "bad_http", f"the request is not valid HTTP: {problem}")
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun")
        response = error_response(error, {"Server": SERVER_NAME, **SECURITY_HEADERS})
        response.force_close()
        return response


class OverloadedProtocol(asyncio.Protocol):
    """Answers 503 to a connection above the limit and closes it."""

    def __init__(self, max_connections: int) -> None:
        message = f"{max_connections} connections are open, the maximum; try again later"
        body = ApiError(503, "too_many_connections", message).body()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n"
            + "".join(f"{name}: {value}\r\n" for name, value in SECURITY_HEADERS.items())
            + "\r\n"
        )
        self.response = head.encode("ascii") + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.response)
        transport.write_eof()
        # If it were closed now, the bytes that the client is still sending would be answered by a reset, which makes
        # its system discard the response.
        asyncio.get_running_loop().call_later(1, transport.abort)


@contextmanager
def abort_after(seconds: float, request: web.Request, *, most: float | None = None) -> Iterator[None]:
    """Abort the connection of a client that reads nothing of what is written in this block for `seconds`.

    Args:
        most: seconds for a client that reads slowly but steadily; as many as `seconds` if None.

    Raises:
        ConnectionResetError: the client has disconnected already.
    """
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client has disconnected")
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (most or seconds)
    unread, progress_at = transport.get_write_buffer_size(), loop.time()
    timer = loop.call_later(seconds / PROGRESS_CHECKS, lambda: check())

    def check() -> None:
        nonlocal timer, unread, progress_at
        before, unread = unread, transport.get_write_buffer_size()
        if unread < before:
            progress_at = loop.time()
        if loop.time() < min(deadline, progress_at + seconds):
            timer = loop.call_later(seconds / PROGRESS_CHECKS, check)
        else:
            transport.abort()

    try:
        yield
    finally:
        timer.cancel()


@asynccontextmanager
async def start_listening(
    app: web.Application,
    sock: socket.socket,
    *,
    connections: int,
    idle_seconds: float,
    fast_path: FastPath = lambda _: None,
) -> AsyncIterator[web.AppRunner]:
    """Serve an application on a listening socket; at the end the requests under way are finished.

    Args:
        connections: the most that may be open; further ones are answered with 503.
        idle_seconds: a connection without a whole request head for so long is closed.
        fast_path: answers simple POST requests before the application sees them.
    """
    settings: dict[str, Any] = {
        # Compressed bodies are refused, so nothing need decompress them: 64 KiB of gzip can be 64 MiB of text.
        "auto_decompress": False,
        "lingering_time": LINGERING_SECONDS,
        "keepalive_timeout": idle_seconds,
        "access_log": None,
    }
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS, **settings)
    await runner.setup()
    manager = runner.server
    assert manager is not None
    loop = asyncio.get_running_loop()

    def protocol() -> asyncio.BaseProtocol:
        if len(manager.connections) >= connections:
            return OverloadedProtocol(connections)
        return Connection(manager, loop=loop, fast_path=fast_path, **settings)

    server = await loop.create_server(protocol, sock=sock, backlog=MAX_ACCEPTS)
    sock.listen(BACKLOG)
    try:
        yield runner
    finally:
        server.close()
        await runner.cleanup()
