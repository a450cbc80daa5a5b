"""An engine in a child process, so that decoding and answering requests do not compete for one global lock.

`EngineProcess` is the parent's side. It does not need torch, and it survives a child that the system kills, for example
when memory runs out, so that a server can still report that. `run_child` is the child's side. They exchange frames, a
length and a pickle, through the child's stdin and stdout:

    to the child    first EngineOptions; then ("submit", number, fields) and ("cancel", number, sample or None)
    from the child  first None now and then while it loads, then Ready, or the exception that prevents it; then
                    (EngineState, messages), where a message is
                    ("prompt_logprobs", number, logprobs), ("delta", number, delta), ("logprobs", number, sample, part),
                    ("done", number, completions without logprobs, prompt logprobs, first_token_at) or
                    ("stopped", number)

`number` is that of a request. The child exits when its stdin ends, since its parent is gone then.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from gpt2_chinese.command_line import prepare_streams, set_quiet
from gpt2_chinese.decoding.backend import CompletionBackend, PrefixCacheState, Request
from gpt2_chinese.decoding.completion import EngineStopped, TextDelta, TokenLogprob
from gpt2_chinese.text.tokenizers import TokenizerSpec, spec_of

if TYPE_CHECKING:  # needs torch
    from gpt2_chinese.decoding.engine import Engine

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).resolve().with_name("child.py")
FRAME_LENGTH = struct.Struct("<I")
OUT_OF_MEMORY_SCORE = "500"  # thousandths of the memory that the kernel takes this process to have besides its own
HEARTBEAT_SECONDS = 1.0
"""A child that loads or decodes sends something at least so often, so that its parent can tell that it lives."""
WATCH_SECONDS = 0.5
FRAME_LOGPROBS = 256
"""Logprobs of a frame: while it is read, the other threads of the server's process wait."""
DONE_WEIGHT = 64
"""What a completed request counts in a frame, in logprobs."""
SHUTDOWN_SECONDS = 10.0
"""After which a child that was told to exit is killed."""


@dataclass(frozen=True)
class EngineOptions:
    """What to load and how to decode; see model_folder.load_weights, engine.choose_device and Engine.

    Attributes:
        quiet, language: of the notes that the child writes to stderr, see `command_line`.
    """

    folder: str
    vocab_file: str | None = None
    device: str = "auto"
    max_num_seqs: int = 32
    precision: str | None = "auto"
    document_marks: tuple[str, str] | None = None
    prefix_cache_bytes: int = 0
    quiet: bool = False
    language: str = "en"


class Ready(NamedTuple):
    """The properties of an engine that the child has started."""

    tokenizer: TokenizerSpec
    n_ctx: int
    device: str
    at_full_speed: bool


class EngineState(NamedTuple):
    """The state and the counters of the child's engine."""

    alive: bool
    error: str | None
    at_full_speed: bool
    running: int
    num_dequeued: int
    prompt_tokens: int
    generated_tokens: int
    prefix_cache: PrefixCacheState

    @property
    def without_token_counts(self) -> tuple[Any, ...]:
        return self[:5]


def encode_frame(value: Any) -> bytes:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return FRAME_LENGTH.pack(len(data)) + data


def read_frames(file: IO[bytes]) -> Iterator[Any]:
    """The values of the frames of a pipe, until it ends."""
    while len(head := file.read(FRAME_LENGTH.size)) == FRAME_LENGTH.size:
        (length,) = FRAME_LENGTH.unpack(head)
        data = file.read(length)
        if len(data) < length:
            return  # the writer has died within a frame
        yield pickle.loads(data)


# The parent's side.


@dataclass(eq=False)
class _ChildRequest(Request):
    """A request that the child decodes."""

    on_cancel: Callable[[int | None], None] = lambda _: None
    logprobs_of: dict[int, list[TokenLogprob]] = field(default_factory=dict)

    def cancel(self, sample: int | None = None) -> None:
        if not self.future.done():
            self.on_cancel(sample)


class EngineProcess(CompletionBackend):
    """An Engine in a child process; `with EngineProcess(...) as engine:` starts it and waits until it is loaded.

    Args:
        options: what the child loads.
        max_waiting: sequences that may wait in the queue.
        hang_timeout: seconds after which a child is killed that loads or has requests and sends nothing.

    Raises (by `start`):
        ValueError, OSError: as model_folder.load_weights and Engine do.
        EngineStopped: the child has died while it loaded.
    """

    def __init__(self, options: EngineOptions, *, max_waiting: int = 1024, hang_timeout: float | None = None) -> None:
        self.options = options
        self._hang_timeout = hang_timeout
        self._num_frames = 0
        self._ended = threading.Event()
        self.max_waiting = max_waiting
        self._numbers = itertools.count()
        self._requests: dict[int, _ChildRequest] = {}
        self._num_enqueued = 0  # sequences so far
        self._state = EngineState(False, None, False, 0, 0, 0, 0, PrefixCacheState())
        self._closing = False
        self._lock = threading.Lock()

    def start(self) -> None:
        command = [sys.executable, str(CHILD), str(ROOT)]
        # Not in a session of its own, since Linux divides the CPUs among sessions first.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._send_queue = SendQueue(self._process.stdin)
        self._send_queue.send(encode_frame(self.options))
        self._loading = True
        if self._hang_timeout is not None:
            threading.Thread(target=self._watch, args=(self._hang_timeout,), name="watchdog", daemon=True).start()
        frames = self._count(read_frames(self._process.stdout))
        first = next((frame for frame in frames if frame is not None), None)
        self._loading = False
        if not isinstance(first, Ready):
            self._ended.set()
            self._stop_child()
            self._process.stdout.close()
            raise first or self.error or EngineStopped(_ended(self._process.returncode) + " while it loaded")
        self.tokenizer = first.tokenizer.build()
        self.n_ctx, self.device = first.n_ctx, first.device
        self._state = self._state._replace(alive=True, at_full_speed=first.at_full_speed)
        self._thread = threading.Thread(target=self._listen, args=(frames,), name="engine-process", daemon=True)
        self._thread.start()

    def _count(self, frames: Iterator[Any]) -> Iterator[Any]:
        for frame in frames:
            self._num_frames += 1
            yield frame

    def _watch(self, timeout: float) -> None:
        """Kill the child when it has made no step for so long while there was work."""
        silent, frames, last = 0.0, -1, time.monotonic()
        while not self._ended.wait(WATCH_SECONDS):
            # A server that was suspended itself (Ctrl-Z) has not waited all that time.
            now = time.monotonic()
            passed, last = min(now - last, 2 * WATCH_SECONDS), now
            if self._num_frames != frames or not (self._loading or self._requests):
                silent, frames = 0.0, self._num_frames
                continue
            silent += passed
            if silent >= timeout:
                self.error = EngineStopped(f"the model's process has made no step for {timeout:g} seconds")
                LOGGER.error("%s: it is killed", self.error)
                self._process.kill()
                return

    def close(self) -> None:
        self._ended.set()
        with self._lock:
            self._closing = True
        self._stop_child()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _stop_child(self) -> None:
        """Close the child's stdin, which tells it to exit, and wait for it."""
        self._send_queue.close()
        try:
            self._process.wait(SHUTDOWN_SECONDS)
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
        return self._num_enqueued - self._state.num_dequeued

    @property
    def prefix_cache(self) -> PrefixCacheState:
        return self._state.prefix_cache

    def _enqueue(self, **fields: Any) -> Request:
        number = next(self._numbers)

        def cancel(sample: int | None) -> None:
            self._send_queue.send(encode_frame(("cancel", number, sample)))

        request = _ChildRequest(**fields, on_cancel=cancel)
        request.future.set_running_or_notify_cancel()  # from here on the future cannot be cancelled, see Engine
        with self._lock:
            if not self.alive:
                raise EngineStopped(self._why_stopped())
            self.check_room(request.samples)
            self._requests[number] = request
            self._num_enqueued += request.samples
            fields = fields | {"on_delta": request.on_delta is not None}
            self._send_queue.send(encode_frame(("submit", number, fields)))
        return request

    def _listen(self, frames: Iterator[tuple[EngineState, list[tuple[Any, ...]]]]) -> None:
        """Handle the messages of the child until it ends."""
        try:
            for frame in frames:
                if frame is None:  # the child was still loading
                    continue
                state, messages = frame
                self._update_state(state)
                for kind, number, *arguments in messages:
                    self._handle_message(kind, number, arguments)
        except Exception:  # without this thread, the other requests would wait for ever
            LOGGER.exception("a message of the model's process cannot be handled")
            self._process.kill()
        status = self._process.wait()
        self._ended.set()
        with self._lock:
            if not self._closing and self.error is None:
                self.error = EngineStopped(_ended(status))
                LOGGER.error("%s", self.error)
            self._state = self._state._replace(alive=False, running=0, num_dequeued=self._num_enqueued)
            unfinished = list(self._requests)
        for number in unfinished:
            self._handle_message("stopped", number, [])

    def _update_state(self, state: EngineState) -> None:
        if state.error is not None and self.error is None:
            self.error = EngineStopped(state.error)
        self._state = state
        self.prompt_tokens, self.generated_tokens = state.prompt_tokens, state.generated_tokens

    def _handle_message(self, kind: str, number: int, arguments: list[Any]) -> None:
        request = self._requests[number]
        if kind == "delta":
            assert request.on_delta is not None
            request.on_delta(arguments[0])
        elif kind == "prompt_logprobs":
            request.prompt_logprobs = arguments[0]
        elif kind == "logprobs":
            request.logprobs_of.setdefault(arguments[0], []).extend(arguments[1])
        else:
            with self._lock:
                del self._requests[number]
            if kind == "done":
                completions, request.prompt_logprobs, request.first_token_at = arguments
                for sample, logprobs in request.logprobs_of.items():
                    completions[sample] = replace(completions[sample], logprobs=tuple(logprobs))
                request.logprobs_of.clear()
                request.future.set_result(completions)
            else:
                request.future.set_exception(EngineStopped(self._why_stopped()))


def _ended(status: int) -> str:
    return f"the model's process has ended with status {status}"


class SendQueue:
    """Bytes to be written to a pipe: at once while it has room, else by a thread that ends when all are written.

    So the sender never blocks, even if the reader has stopped reading.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._unsent = bytearray()
        with suppress(AttributeError, OSError):  # Windows before Python 3.12: there `send` may block
            os.set_blocking(pipe.fileno(), False)

    def close(self) -> None:
        """Close the pipe; unsent bytes are lost."""
        with self._lock:
            self._unsent.clear()
            self._pipe.close()

    def send(self, data: bytes) -> None:
        """Send bytes. They are dropped if the pipe is closed or its reader is gone: `_listen` notices that."""
        with self._lock:
            if self._pipe.closed:
                return
            idle = not self._unsent
            self._unsent += data
            if idle and not self._write():
                threading.Thread(target=self._write_rest, name="send-queue", daemon=True).start()

    def _write(self) -> bool:
        """Write as much as the pipe has room for; returns whether that is all."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._pipe.fileno(), self._unsent)]
        except BlockingIOError:
            return False
        except OSError:
            self._unsent.clear()
        return True

    def _write_rest(self) -> None:
        done = False
        while not done:
            try:
                select.select([], [self._pipe], [], 1.0)
            except (OSError, ValueError):
                time.sleep(0.01)  # the pipe has been closed, or this is Windows, where select takes sockets only
            with self._lock:
                done = self._write()


# The child's side.


class RequestHandler:
    """Submits the parent's requests to an engine, and sends back their messages once in a decode step.

    Args:
        write: writes bytes to the parent.
    """

    engine: Engine

    def __init__(self, write: Callable[[bytes], Any]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._requests: dict[int, Request] = {}
        self._unsent_prompt_logprobs: set[int] = set()  # requests
        self._messages: deque[tuple[Any, ...]] = deque()
        self._is_ready = False
        self._sent_state: EngineState | None = None
        self._sent_at = 0.0

    def send_ready(self) -> None:
        """Tell the parent that the engine has started. No messages are sent before, even if a step ends."""
        engine, tokenizer = self.engine, self.engine.tokenizer
        ready = Ready(spec_of(tokenizer), engine.n_ctx, engine.device, engine.at_full_speed)
        with self._lock:
            self._write(encode_frame(ready))
            self._is_ready = True
        self.send_messages()

    def handle_message(self, kind: str, number: int, argument: Any) -> None:
        """Handle a message of the parent."""
        if kind == "submit":
            self._submit(number, argument)
        elif request := self._requests.get(number):
            request.cancel(argument)

    def _submit(self, number: int, fields: dict[str, Any]) -> None:
        def queue_delta(delta: TextDelta) -> None:
            self._messages.append(("delta", number, delta))

        try:
            with self._lock:  # so that no messages are sent before the request is known
                request = self.engine.submit(**fields | {"on_delta": queue_delta if fields["on_delta"] else None})
                self._requests[number] = request
                if request.score_prompt:
                    self._unsent_prompt_logprobs.add(number)
        except EngineStopped:
            self._messages.append(("stopped", number))
        else:
            request.future.add_done_callback(lambda _: self._queue_result(number, request))
            if not request.future.done():
                return  # the messages are sent at the end of a decode step
        self.send_messages()

    def _queue_result(self, number: int, request: Request) -> None:
        if request.future.exception() is None:
            completions = list(request.future.result())
            for sample, completion in enumerate(completions):
                for begin in range(0, len(completion.logprobs), FRAME_LOGPROBS):
                    part = completion.logprobs[begin : begin + FRAME_LOGPROBS]
                    self._messages.append(("logprobs", number, sample, part))
                completions[sample] = replace(completion, logprobs=())
            self._messages.append(("done", number, completions, request.prompt_logprobs, request.first_token_at))
        else:
            self._messages.append(("stopped", number))

    def send_messages(self) -> None:
        """Send the messages of a decode step, and the state; nothing if neither is new."""
        with self._lock:
            if not self._is_ready:
                return
            messages: list[tuple[Any, ...]] = []
            for _ in range(len(self._messages)):
                message = self._messages.popleft()
                kind, number = message[:2]
                if number in self._unsent_prompt_logprobs:
                    self._unsent_prompt_logprobs.remove(number)
                    messages.append(("prompt_logprobs", number, self._requests[number].prompt_logprobs))
                if kind not in ("delta", "logprobs"):
                    self._requests.pop(number, None)
                messages.append(message)
            state, sent = engine_state(self.engine), self._sent_state
            # New token counts alone are sent with the next message, or when the parent has heard nothing for a while.
            now = time.monotonic()
            is_new = sent is None or sent.without_token_counts != state.without_token_counts
            if messages or is_new or now - self._sent_at > HEARTBEAT_SECONDS:
                self._sent_state, self._sent_at = state, now
                for part in in_frames(messages):
                    self._write(encode_frame((state, part)))


def in_frames(messages: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """The messages of a step in parts that the parent reads in milliseconds; one of none, if there are none."""
    part: list[tuple[Any, ...]] = []
    weight = 0
    for message in messages:
        if part and weight >= FRAME_LOGPROBS:
            yield part
            part, weight = [], 0
        part.append(message)
        weight += {"logprobs": FRAME_LOGPROBS, "prompt_logprobs": FRAME_LOGPROBS, "done": DONE_WEIGHT}.get(
            message[0], 1
        )
    yield part


def engine_state(engine: Engine) -> EngineState:
    return EngineState(
        alive=engine.alive,
        error=None if engine.error is None else repr(engine.error),
        at_full_speed=engine.at_full_speed,
        running=engine.running,
        num_dequeued=engine.num_dequeued,
        prompt_tokens=engine.prompt_tokens,
        generated_tokens=engine.generated_tokens,
        prefix_cache=engine.prefix_cache,
    )


def load_engine(options: EngineOptions, on_step_end: Callable[[], None]) -> Engine:
    from gpt2_chinese.decoding.engine import Engine, choose_device
    from gpt2_chinese.model_folder import load_weights

    model, tokenizer = load_weights(
        options.folder,
        device=choose_device(options.device),
        vocab_file=options.vocab_file,
        document_marks=options.document_marks,
    )
    return Engine(
        model,
        tokenizer,
        max_num_seqs=options.max_num_seqs,
        max_waiting=sys.maxsize,  # the parent limits the queue
        precision=options.precision,
        wait=False,
        on_step_end=on_step_end,
        prefix_cache_bytes=options.prefix_cache_bytes,
    )


def die_first() -> None:
    """Let Linux end this process, and not its parent, where memory runs out: it can be started again."""
    with suppress(OSError):  # another system, or not allowed
        Path("/proc/self/oom_score_adj").write_text(OUT_OF_MEMORY_SCORE, encoding="ascii")


def run_child() -> None:
    """The child's main function."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    die_first()
    to_parent = os.fdopen(os.dup(1), "wb")
    write_lock = threading.Lock()
    loaded = threading.Event()
    os.dup2(2, 1)  # what any library prints goes to stderr: stdout is for frames
    frames = read_frames(sys.stdin.buffer)
    options = next(frames, None)
    if options is None:
        return  # the parent is gone already
    prepare_streams(options.language)
    set_quiet(options.quiet)

    def write(data: bytes) -> None:
        try:
            with write_lock:
                to_parent.write(data)
                to_parent.flush()
        except OSError:
            os._exit(0)  # the parent is gone

    handler = RequestHandler(write)

    def send_heartbeats() -> None:
        while not loaded.wait(HEARTBEAT_SECONDS):
            write(encode_frame(None))

    threading.Thread(target=send_heartbeats, name="heartbeat", daemon=True).start()

    def listen() -> None:
        try:
            for message in frames:
                handler.handle_message(*message)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # at once, even while the model is loaded or decodes

    listener = threading.Thread(target=listen, name="listener")
    listener.start()
    try:
        handler.engine = load_engine(options, handler.send_messages)
        handler.engine.start()
    except MemoryError:
        size = options.max_num_seqs
        loaded.set()
        write(encode_frame(ValueError(f"the memory does not suffice for {options.folder} and --batch_size {size}")))
    except Exception as error:
        loaded.set()
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        write(encode_frame(picklable(error)))
    else:
        gc.collect()
        loaded.set()
        gc.freeze()  # these objects stay; a collection that scans them all would interrupt every sequence
        handler.send_ready()
    listener.join()


def picklable(error: Exception) -> Exception:
    """The exception, or a RuntimeError of the same text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
