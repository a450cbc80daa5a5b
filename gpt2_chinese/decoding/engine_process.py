"""An engine in a process of its own, so that what decodes and what answers never wait for the same Python lock.

`EngineProcess` is this side of it: it does not need torch, and a model that takes its process down, for want of memory
say, leaves the server there to say so. `main` is the other side. They send each other frames, a length and a pickle,
through the pipes of the child's stdin and stdout:

    to the child    first EngineOptions; then ("submit", number, request) and ("cancel", number, sample or None)
    from the child  first Ready or the error; then (State, messages), and of the messages each is ("scored", number,
                    logprobs), ("piece", number, piece), ("done", number, completions, logprobs, first_token_at) or
                    ("stopped", number)

A child whose stdin ends has nobody to decode for, and ends too.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from gpt2_chinese.decoding.backend import CompletionBackend, Request
from gpt2_chinese.decoding.completion import EngineStopped
from gpt2_chinese.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # needs torch
    from gpt2_chinese.decoding.engine import Engine

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
LENGTH = struct.Struct("<I")
SECONDS_TO_END = 10.0
"""For which a child that has been told to end is waited for."""


@dataclass(frozen=True)
class EngineOptions:
    """What to load, and how to decode; see checkpoint.load_weights, engine.choose_device and Engine."""

    folder: str
    vocab_file: str | None = None
    device: str = "auto"
    rows: int = 32
    precision: str | None = "auto"


class Ready(NamedTuple):
    """What the engine is that the child has started."""

    vocabulary: list[str]
    compat: bool
    n_ctx: int
    device: str
    at_full_speed: bool


class State(NamedTuple):
    """How far the engine has come."""

    alive: bool
    error: str | None
    at_full_speed: bool
    running: int
    left_queue: int
    prompt_tokens: int
    generated_tokens: int


def frame(value: Any) -> bytes:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def frames(file: IO[bytes]) -> Iterator[Any]:
    """The values of the frames of a pipe, until it ends."""
    while len(head := file.read(LENGTH.size)) == LENGTH.size:
        data = file.read(*LENGTH.unpack(head))
        if len(data) < LENGTH.unpack(head)[0]:
            return  # the writer has died in the middle
        yield pickle.loads(data)


# This side.


@dataclass(eq=False)
class _Ticket(Request):
    """A ticket whose request is in the child."""

    on_cancel: Callable[[int | None], None] = lambda _: None

    def cancel(self, sample: int | None = None) -> None:
        if not self.future.done():
            self.on_cancel(sample)


class EngineProcess(CompletionBackend):
    """An Engine in a child process; `with EngineProcess(...) as engine:` starts it and waits until it is loaded.

    Args:
        options: what the child loads.
        max_waiting: sequences that may wait for a row.

    Raises (at the start):
        ValueError, OSError: as checkpoint.load_weights and Engine do.
        EngineStopped: the child has died while it loaded.
    """

    def __init__(self, options: EngineOptions, *, max_waiting: int = 1024) -> None:
        self.options = options
        self.max_waiting = max_waiting
        self._numbers = itertools.count()
        self._tickets: dict[int, _Ticket] = {}
        self._queued = 0  # sequences so far
        self._state = State(False, None, False, 0, 0, 0, 0)
        self._closing = False
        self._lock = threading.Lock()

    def start(self) -> None:
        # Ctrl-C and a SIGTERM to all processes of a server are for this one to obey.
        code = (
            "import signal, sys\n"
            "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
            f"sys.path[0] = {str(ROOT)!r}; from gpt2_chinese.decoding.engine_process import main; main()"
        )
        # Not in a session of its own: Linux divides the processors among sessions first.
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._outbox = SendQueue(self._process.stdin)
        self._outbox.send(frame(self.options))
        arriving = frames(self._process.stdout)
        first = next(arriving, None)
        if not isinstance(first, Ready):
            self._end()
            self._process.stdout.close()
            raise first or EngineStopped(f"the model's process has ended with status {self._process.returncode}")
        self.tokenizer = Tokenizer(first.vocabulary, compat=first.compat)
        self.n_ctx, self.device = first.n_ctx, first.device
        self._state = self._state._replace(alive=True, at_full_speed=first.at_full_speed)
        self._thread = threading.Thread(target=self._listen, args=(arriving,), name="engine-process", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closing = True
        self._end()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _end(self) -> None:
        """End the child, and wait for it."""
        self._outbox.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def alive(self) -> bool:
        return self._state.alive and not self._closing

    @property
    def at_full_speed(self) -> bool:
        return self._state.at_full_speed

    @property
    def running(self) -> int:
        return self._state.running

    @property
    def waiting(self) -> int:
        return self._queued - self._state.left_queue

    def _queue(self, **request: Any) -> Request:
        number = next(self._numbers)

        def cancel(sample: int | None) -> None:
            self._outbox.send(frame(("cancel", number, sample)))

        ticket = _Ticket(**request, on_cancel=cancel)
        ticket.future.set_running_or_notify_cancel()  # from here on only the engine ends it
        with self._lock:
            if not self.alive:
                raise EngineStopped(self._why_stopped())
            self.check_room(ticket.samples)
            self._tickets[number] = ticket
            self._queued += ticket.samples
            self._outbox.send(frame(("submit", number, request | {"on_delta": ticket.on_delta is not None})))
        return ticket

    def _listen(self, arriving: Iterator[tuple[State, list[tuple[Any, ...]]]]) -> None:
        """Hand what the child says to the tickets, until it ends."""
        try:
            for state, messages in arriving:
                self._take(state)
                for kind, number, *rest in messages:
                    self._hear(kind, number, rest)
        except Exception:  # no one would hear of the others any more
            LOGGER.exception("what the model's process says is not understood")
            self._process.kill()
        status = self._process.wait()
        with self._lock:
            if not self._closing and self.error is None:
                self.error = EngineStopped(f"the model's process has ended with status {status}")
                LOGGER.error("%s", self.error)
            self._state = self._state._replace(alive=False, running=0, left_queue=self._queued)
            left = list(self._tickets)
        for number in left:
            self._hear("stopped", number, [])

    def _take(self, state: State) -> None:
        if state.error is not None and self.error is None:
            self.error = EngineStopped(state.error)
        self._state = state
        self.prompt_tokens, self.generated_tokens = state.prompt_tokens, state.generated_tokens

    def _hear(self, kind: str, number: int, rest: list[Any]) -> None:
        ticket = self._tickets[number]
        if kind == "piece":
            assert ticket.on_delta is not None
            ticket.on_delta(rest[0])
        elif kind == "scored":
            ticket.prompt_logprobs = rest[0]
        else:
            with self._lock:
                del self._tickets[number]
            if kind == "done":
                completions, ticket.prompt_logprobs, ticket.first_token_at = rest
                ticket.future.set_result(completions)
            else:
                ticket.future.set_exception(EngineStopped(self._why_stopped()))


class SendQueue:
    """Frames on their way into a pipe: written at once while it has room, else by a thread, as long as there are any.

    So whoever sends never waits, even for a reader that has come to a halt.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._left = bytearray()
        with suppress(AttributeError, OSError):  # Windows, before Python 3.12: there it waits
            os.set_blocking(pipe.fileno(), False)

    def close(self) -> None:
        """Close the pipe; what it had no room for is lost."""
        with self._lock:
            self._left.clear()
            self._pipe.close()

    def send(self, data: bytes) -> None:
        """Nothing happens where the pipe is closed or its reader has gone: who listens to that one learns of it."""
        with self._lock:
            if self._pipe.closed:
                return
            idle = not self._left
            self._left += data
            if idle and not self._write():
                threading.Thread(target=self._write_on, name="outbox", daemon=True).start()

    def _write(self) -> bool:
        """Write what there is room for; whether that is all."""
        try:
            while self._left:
                del self._left[: os.write(self._pipe.fileno(), self._left)]
        except BlockingIOError:
            return False
        except OSError:
            self._left.clear()
        return True

    def _write_on(self) -> None:
        done = False
        while not done:
            try:
                select.select([], [self._pipe], [], 1.0)
            except (OSError, ValueError):
                time.sleep(0.01)  # it has been closed meanwhile, or this is Windows, which selects sockets only
            with self._lock:
                done = self._write()


# The other side.


class RequestHandler:
    """Takes the requests of the other process to an engine, and sends back what comes of them, once a turn.

    Args:
        write: sends bytes to the other process.
    """

    engine: Engine

    def __init__(self, write: Callable[[bytes], Any]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._tickets: dict[int, Request] = {}
        self._unscored: set[int] = set()  # of them, those whose prompt's logprobs are still to be sent
        self._messages: deque[tuple[Any, ...]] = deque()
        self._told: State | None = None

    def hear(self, kind: str, number: int, what: Any) -> None:
        """A frame of the other process."""
        if kind == "submit":
            self._submit(number, what)
        elif ticket := self._tickets.get(number):
            ticket.cancel(what)

    def _submit(self, number: int, request: dict[str, Any]) -> None:
        on_delta = (lambda piece: self._messages.append(("piece", number, piece))) if request["on_delta"] else None
        try:
            with self._lock:  # no turn before the ticket is known
                ticket = self._tickets[number] = self.engine.submit(**request | {"on_delta": on_delta})
                if ticket.scored:
                    self._unscored.add(number)
        except EngineStopped:
            self._messages.append(("stopped", number))
        else:
            ticket.future.add_done_callback(lambda _: self._end(number, ticket))
            if not ticket.future.done():
                return  # it will be, and a turn be made, in the engine's thread
        self.turn()

    def _end(self, number: int, ticket: Request) -> None:
        if ticket.future.exception() is None:
            done = (ticket.future.result(), ticket.prompt_logprobs, ticket.first_token_at)
            self._messages.append(("done", number, *done))
        else:
            self._messages.append(("stopped", number))

    def turn(self) -> None:
        """Send what has come since the last turn, if it is anything."""
        with self._lock:
            messages: list[tuple[Any, ...]] = []
            for _ in range(len(self._messages)):
                message = self._messages.popleft()
                number = message[1]
                if number in self._unscored:
                    self._unscored.remove(number)
                    messages.append(("scored", number, self._tickets[number].prompt_logprobs))
                if message[0] != "piece":
                    self._tickets.pop(number, None)
                messages.append(message)
            state = state_of(self.engine)
            if messages or self._told is None or self._told[:5] != state[:5]:  # a count of tokens alone can wait
                self._told = state
                self._write(frame((state, messages)))


def state_of(engine: Engine) -> State:
    return State(
        alive=engine.alive,
        error=None if engine.error is None else repr(engine.error),
        at_full_speed=engine.at_full_speed,
        running=engine.running,
        left_queue=engine.left_queue,
        prompt_tokens=engine.prompt_tokens,
        generated_tokens=engine.generated_tokens,
    )


def load(options: EngineOptions, on_step_end: Callable[[], None]) -> Engine:
    from gpt2_chinese.decoding.engine import Engine, choose_device
    from gpt2_chinese.model_folder import load_weights

    model, tokenizer = load_weights(options.folder, device=choose_device(options.device), vocab_file=options.vocab_file)
    return Engine(
        model,
        tokenizer,
        rows=options.rows,
        max_waiting=sys.maxsize,  # the other side counts
        precision=options.precision,
        wait=False,
        on_step_end=on_step_end,
    )


def main() -> None:
    """The child."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    to_parent = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints in here, the pipe is for frames
    arriving = frames(sys.stdin.buffer)
    options = next(arriving, None)
    if options is None:
        return  # the parent has gone already

    def write(data: bytes) -> None:
        try:
            to_parent.write(data)
            to_parent.flush()
        except OSError:
            os._exit(0)  # the parent has gone

    desk = RequestHandler(write)

    def listen() -> None:
        try:
            for message in arriving:
                desk.hear(*message)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # whether it is loading or decoding: no one waits for it any more

    listening = threading.Thread(target=listen, name="listening")
    listening.start()
    try:
        engine = desk.engine = load(options, desk.turn)
        engine.start()
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        write(frame(sendable(error)))
    else:
        tokenizer = engine.tokenizer
        gc.collect()
        gc.freeze()  # what is there now stays; a collection that looked at all of it would halt every text
        ready = Ready(tokenizer.vocabulary, tokenizer.compat, engine.n_ctx, engine.device, engine.at_full_speed)
        write(frame(ready))
    listening.join()


def sendable(error: Exception) -> Exception:
    """The error, or another one that says the same where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
