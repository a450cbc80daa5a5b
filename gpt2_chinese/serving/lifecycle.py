"""The life of a server process: it listens, loads, serves, drains at a signal, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from functools import partial
from typing import Any

from aiohttp import web

from gpt2_chinese.command_line import remark, say
from gpt2_chinese.serving.api import DEFAULT_LENGTH, DEFAULT_SAMPLES
from gpt2_chinese.serving.connections import start_listening, url_of
from gpt2_chinese.serving.fast_path import refuse_overload
from gpt2_chinese.serving.service import WARM_UP_CONTEXT, Service

POLL_SECONDS = 0.5
"""How often a process looks whether its models are alive, and one of several processes whether its parent is."""
LOGGER = logging.getLogger("server")
FILES_LOG_SECONDS = 60.0
FULL_SPEED_POLL_SECONDS = 0.2
DRAIN_POLL_SECONDS = 0.02


async def serve(app: web.Application, service: Service, sock: socket.socket, *, ready_fd: int | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, or until a model cannot be loaded; then finish the admitted requests.

    A second signal ends the process at once.

    Args:
        ready_fd: for one of several processes: it writes a byte there when its models are ready, and ends when one of
            them or its parent has died.
    """
    parent = os.getppid()
    asyncio.get_running_loop().set_exception_handler(LoopErrors())
    begin = time.monotonic()
    stop = stop_on_signals()
    limits = service.limits
    async with start_listening(
        app,
        sock,
        connections=limits.connections,
        idle_seconds=limits.idle_seconds,
        fast_path=partial(refuse_overload, service),
    ):
        await _wait_for_any(service.loading_done, stop)
        if service.status == "ready":
            reload_on_hangup(service, stop)
            _print_ready(service, begin)
            full_speed = asyncio.create_task(_print_full_speed(service, begin))
            if ready_fd is None:
                say(startup_message(url_of(sock)))
            else:
                os.write(ready_fd, b"r")
            # A server that can only answer 503 ends, for a supervisor, or for the processes of other devices.
            while service.status != "dead" and not stop.is_set() and (ready_fd is None or os.getppid() == parent):
                await _wait_for_any(stop, timeout=POLL_SECONDS)
            service.has_failed = service.status == "dead"
            full_speed.cancel()
        # New connections are still accepted, and told that the server is shutting down.
        service.draining = True
        while service.admitted and service.status == "draining":
            await asyncio.sleep(DRAIN_POLL_SECONDS)


class LoopErrors:
    """Logs what goes wrong in the event loop; once a minute that no file may be opened, which is tried every second.

    A try that asyncio has put off until after the port is closed is no error.
    """

    def __init__(self) -> None:
        self._said_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, ValueError) and "_start_serving" in context.get("message", ""):
            return
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - self._said_at > FILES_LOG_SECONDS:
            self._said_at = loop.time()
            LOGGER.error(
                "no connection can be accepted: %s; raise the limit (ulimit -n) or lower --max_connections",
                error.strerror,
            )


def stop_on_signals() -> asyncio.Event:
    """An event that SIGTERM and Ctrl-C set; a second one of them ends the process."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, handle)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(handle))
    return stop


def reload_on_hangup(service: Service, stop: asyncio.Event) -> None:
    """Let SIGHUP reload the models; that of a terminal which is closed stops the server."""
    if not hasattr(signal, "SIGHUP"):
        return
    from_terminal = sys.stdin is not None and sys.stdin.isatty()

    def handle() -> None:
        if from_terminal:
            stop.set()
        elif service.supervisor is not None and not service.draining:
            service.supervisor.reload_all()

    with contextlib.suppress(NotImplementedError):  # as on Windows, where POST /admin/reload does it
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, handle)


async def _wait_for_any(*events: asyncio.Event, timeout: float | None = None) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def startup_message(url: str) -> str:
    """The address, and how to try it from a shell and from cmd.exe (which does not send UTF-8)."""
    body = {"context": WARM_UP_CONTEXT, "maxlength": DEFAULT_LENGTH, "samples": DEFAULT_SAMPLES}
    escaped = json.dumps(body).replace('"', '\\"')
    return (
        f"serving on {url} (Ctrl-C stops); open it in a browser, or try\n"
        f"  Linux, macOS:  curl {url}/generate -d '{json.dumps(body, ensure_ascii=False)}'\n"
        f'  Windows (cmd): curl {url}/generate -d "{escaped}"'
    )


def _print_ready(service: Service, begin: float) -> None:
    seconds = time.monotonic() - begin
    for model in service.models:
        speed = " at full speed" if model.at_full_speed else ""
        remark(f"{model.name} is ready{speed} on {service.device}, {seconds:.1f} s after the start")


async def _print_full_speed(service: Service, begin: float) -> None:
    """Say when the final decoder has taken over from PyTorch, which decodes while that is compiled."""
    for model in [model for model in service.models if not model.at_full_speed]:
        while not model.at_full_speed:
            await asyncio.sleep(FULL_SPEED_POLL_SECONDS)
        remark(f"{model.name} is at full speed, {time.monotonic() - begin:.1f} s after the start")
