"""One process for each device, all accepting connections on one listening socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gpt2_chinese.command_line import say
from gpt2_chinese.serving.connections import url_of
from gpt2_chinese.serving.keys import hide_keys
from gpt2_chinese.serving.lifecycle import startup_message

POLL_SECONDS = 0.1


def run_for_each_device(script: Path, argv: Sequence[str], devices: Sequence[str], sock: socket.socket) -> int:
    """Run `script` once per device until a signal; if one process ends, the others are stopped.

    Args:
        script: server.py.
        argv: its flags; the device and the socket are added.

    Returns:
        The exit status: 0 if all processes ended with 0.
    """
    if sys.platform == "win32":
        raise ValueError("--device: several devices are not possible on Windows; start one server per --port instead")
    url = url_of(sock)
    ready, ready_fd = os.pipe()
    os.set_blocking(ready, False)
    children = [_start_child(script, argv, device, devices, sock, ready_fd) for device in devices]
    sock.close()  # the children have it; kept open here, it would accept connections that no child serves
    os.close(ready_fd)
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            child.terminate()

    def reload(*_: object) -> None:
        for child in children:
            child.send_signal(signal.SIGHUP)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if not sys.stdin or not sys.stdin.isatty():
        signal.signal(signal.SIGHUP, reload)
    not_ready = len(devices)
    while any(child.poll() is None for child in children):
        ended = [child for child in children if child.poll() is not None]
        if ended and not stopping:
            status = ended[0].returncode
            print(f"error: the process of device {devices[children.index(ended[0])]} has ended", file=sys.stderr)
            stop()
            for child in children:
                child.wait()
            return status or 1
        with suppress(BlockingIOError):
            if not_ready and (arrived := len(os.read(ready, not_ready))):
                not_ready -= arrived
                if not not_ready:
                    say(startup_message(url))
        time.sleep(POLL_SECONDS)
    os.close(ready)
    return max((abs(child.returncode) for child in children), default=0)


def _start_child(
    script: Path, argv: Sequence[str], device: str, devices: Sequence[str], sock: socket.socket, ready_fd: int
) -> subprocess.Popen[bytes]:
    argv, keys = hide_keys(argv)
    environment = {**os.environ, **keys}
    if all(one == "cpu" for one in devices):  # they share the processor's cores
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))
    flags = ["--device", device, "--listen_fd", str(sock.fileno()), "--ready_fd", str(ready_fd)]
    command = [sys.executable, str(script), *argv, *flags]
    # In a session of its own, Ctrl-C in the terminal reaches it through `stop` alone, and so once.
    return subprocess.Popen(command, pass_fds=[sock.fileno(), ready_fd], env=environment, start_new_session=True)
