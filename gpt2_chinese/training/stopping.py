"""Ctrl-C and SIGTERM as a request that the training loop grants where a run can go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """A signal has come within `StopSignal.interrupts`."""


class StopSignal:
    """Records Ctrl-C and SIGTERM; a second Ctrl-C raises KeyboardInterrupt.

    An update is always finished. What may be broken off, because it can be done again, is put into `interrupts`.
    """

    def __init__(self) -> None:
        self.number = 0
        self._interrupts = False

    @property
    def requested(self) -> bool:
        return self.number > 0

    @property
    def exit_status(self) -> int:
        """That of a process which a signal has ended; another rank may have had it."""
        return 128 + (self.number or signal.SIGINT)

    def handle(self, number: int, _: object) -> None:
        """The signal handler."""
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self._interrupts:
            raise Interrupted

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """Within it a signal raises `Interrupted`, at once or between two operations of PyTorch."""
        if self.requested:
            raise Interrupted
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """A StopSignal that hears the signals of this process."""
    stop = StopSignal()
    with signal_handlers({signal.SIGINT: stop.handle, signal.SIGTERM: stop.handle}):
        yield stop


@contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Install handlers and put the old ones back; nothing in a thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
