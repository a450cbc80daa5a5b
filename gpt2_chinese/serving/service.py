"""What the handlers of server.py share: the models with their states, and the admission of requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from gpt2_chinese.decoding.backend import CompletionBackend, PrefixCacheState
from gpt2_chinese.decoding.completion import Prompt
from gpt2_chinese.serving.api import Limits
from gpt2_chinese.serving.errors import ApiError, engine_stopped_error
from gpt2_chinese.serving.hosts import name_of
from gpt2_chinese.serving.timings import Timings

Result = TypeVar("Result")
WARM_UP_CONTEXT = "你好"
MAX_INLINE_LENGTH = 200
"""Characters or ids of contexts that are tokenized in the event loop; longer ones go to a thread."""
MAX_SHORT_LENGTH = 4096
"""Characters or ids of contexts that are tokenized apart from longer ones."""
MAX_TOKENIZE_REQUESTS = 32
"""Requests of /tokenize and /detokenize that are in work at once; further ones are answered with 429."""


class CanReload(Protocol):
    """What supervision.py does for handlers and signals."""

    def reload(self, model: ServedModel, folder: Path | None = None) -> None: ...
    def reload_all(self) -> None: ...


@dataclass(eq=False)
class ServedModel:
    """One model: loading, ready, restarting or dead.

    Attributes:
        load: gives the backend, not started yet; called in the thread that loads.
        folder: where the model is.
        load_from: as `load`, from another folder.
        restart: start the model again when its process has died.
        watched: the folder in which --watch looks for new models.
        restarts, reloads: how often the model was started again, and exchanged.
        deaths_in_a_row: those of engines that have not lived (`has_lived`).
        start_seconds: what the last start took.
        taken_at: when the engine began to serve, in seconds of `time.monotonic()`.
        past_prompt_tokens, past_generated_tokens, past_prefix_hits, past_reused_tokens: those of earlier engines.
        change_lock: held while the engine is being exchanged.
        engine: None until the model has been loaded.
        error: why loading has failed.
        token_bytes: the most bytes of JSON that a token's text has.
        tokenizing_sequences: sequences of requests that are being tokenized and not in the engine's queue yet.
        tokenize_requests: those of /tokenize and /detokenize that are in work.
        last_sequences: sequences of the latest request, an estimate for the next one.
        was_full: whether the queue had no room at the last look.
    """

    name: str
    load: Callable[[], CompletionBackend]
    folder: Path = Path()
    load_from: Callable[[str], CompletionBackend] | None = None
    restart: bool = False
    watched: Path | None = None
    restarts: int = 0
    reloads: int = 0
    deaths_in_a_row: int = 0
    start_seconds: float = 0.0
    taken_at: float = 0.0
    past_prompt_tokens: int = 0
    past_generated_tokens: int = 0
    past_prefix_hits: int = 0
    past_reused_tokens: int = 0
    change_lock: threading.Lock = field(default_factory=threading.Lock)
    engine: CompletionBackend | None = None
    error: BaseException | None = None
    token_bytes: int = 0
    tokenizing_sequences: int = 0
    tokenize_requests: int = 0
    last_sequences: int = 1
    was_full: bool = False
    timings: Timings = field(default_factory=Timings)
    tokenizer_threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] = field(
        default_factory=lambda: (ThreadPoolExecutor(1, "tokenizing"), ThreadPoolExecutor(1, "tokenizing-long"))
    )

    @property
    def status(self) -> str:
        if self.error is not None:
            return "dead"
        if self.engine is not None and not self.engine.alive:
            return "restarting" if self.restart else "dead"
        return "loading" if self.engine is None else "ready"

    def has_lived(self, now: float) -> bool:
        """Whether the engine has served for longer than its start took.

        One that lives so long may be started again at once: starts then take at most half of the time.
        """
        return now - self.taken_at > self.start_seconds

    @property
    def running(self) -> int:
        """Sequences being decoded."""
        return self.engine.running if self.engine else 0

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return self.engine.waiting if self.engine else 0

    @property
    def at_full_speed(self) -> bool:
        """Whether its final decoder decodes, not PyTorch while that is compiled."""
        return self.engine is not None and self.engine.at_full_speed

    @property
    def vocab_size(self) -> int | None:
        """Tokens of its vocabulary; None while it is loading."""
        return len(self.engine.tokenizer) if self.engine else None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts since the server started, reused ones included."""
        return self.past_prompt_tokens + (self.engine.prompt_tokens if self.engine else 0)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated since the server started."""
        return self.past_generated_tokens + (self.engine.generated_tokens if self.engine else 0)

    @property
    def prefix_cache(self) -> PrefixCacheState:
        """The size of the engine's prefix cache; its counters are since the server started."""
        state = self.engine.prefix_cache if self.engine else PrefixCacheState()
        return state._replace(
            hits=self.past_prefix_hits + state.hits, reused_tokens=self.past_reused_tokens + state.reused_tokens
        )

    async def tokenize(
        self, engine: CompletionBackend, contexts: Sequence[str | tuple[int, ...]], length: int
    ) -> list[Prompt]:
        """The prompts of contexts for an engine, each cut to leave room for `length` tokens."""

        def tokenize_all() -> list[Prompt]:
            return [
                engine.prompt(context, length) if isinstance(context, str) else engine.prompt_from_ids(context, length)
                for context in contexts
            ]

        return await self.with_tokenizer(tokenize_all, sum(map(len, contexts)))

    async def with_tokenizer(self, work: Callable[[], Result], size: int) -> Result:
        """Call a function that uses the tokenizer on so many characters or ids, in a thread if they are many."""
        # Tokenizers may be used by several threads at once, under Python's lock.
        if size <= MAX_INLINE_LENGTH:  # handing it to another thread would take longer
            return work()
        # Short contexts do not wait behind long ones: each kind has its own thread, which Python gives its turn.
        thread = self.tokenizer_threads[size > MAX_SHORT_LENGTH]
        return await asyncio.get_running_loop().run_in_executor(thread, work)

    async def answer_with_tokenizer(self, work: Callable[[], Result], size: int) -> Result:
        """As `with_tokenizer`, for a request that needs nothing else of the model.

        Raises:
            ApiError: too many such requests are in work.
        """
        if self.tokenize_requests >= MAX_TOKENIZE_REQUESTS:
            raise ApiError(429, "full", f"{self.tokenize_requests} texts are being tokenized; try again later")
        self.tokenize_requests += 1
        try:
            return await self.with_tokenizer(work, size)
        finally:
            self.tokenize_requests -= 1


@dataclass
class Service:
    """What all handlers share.

    Attributes:
        models: the first one answers requests that name no model.
        keys: the API keys; none means that no key is needed.
        device: where the models are, as PyTorch calls it; None until one has been loaded.
        draining: no new requests are accepted, those admitted are finished.
        loading_done: set when every model is ready or one could not be loaded.
        admitted: requests that will be finished before the server stops.
        response_counts: answers by route and status.
        started: when the server started, in seconds since 1970.
        pending_bytes: the most bytes that the answers to the admitted requests can have together.
        engine_users: how many requests use each engine.
        supervisor: while the models run.
        admin_keys: the keys of /admin/; none means that it does not exist.
        hosts: the names that the server answers to; None is any.
        has_failed: a model has died and is not started again.
        encoder_thread: turns large answers into JSON.
    """

    models: Sequence[ServedModel]
    limits: Limits
    keys: tuple[bytes, ...] = ()
    device: str | None = None
    draining: bool = False
    loading_done: asyncio.Event = field(default_factory=asyncio.Event)
    admitted: int = 0
    response_counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    started: int = field(default_factory=lambda: int(time.time()))
    pending_bytes: int = 0
    engine_users: Counter[CompletionBackend] = field(default_factory=Counter)
    supervisor: CanReload | None = None
    has_failed: bool = False
    admin_keys: tuple[bytes, ...] = ()
    hosts: frozenset[str] | None = None
    encoder_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))

    def __post_init__(self) -> None:
        self.by_name = {model.name: model for model in self.models}

    @property
    def status(self) -> str:
        """The worst status of the models: "dead", then "draining", "restarting", "loading", "ready"."""
        statuses = {model.status for model in self.models}
        if "dead" in statuses:
            return "dead"
        if self.draining:
            return "draining"
        return next((status for status in ("restarting", "loading") if status in statuses), "ready")

    @property
    def error(self) -> BaseException | None:
        """Why a model could not be loaded."""
        return next((model.error for model in self.models if model.error is not None), None)

    def model(self, name: str | None) -> ServedModel:
        """The model with this name; None is the first one.

        Raises:
            ApiError: there is no such model.
        """
        if name is None:
            return self.models[0]
        if name not in self.by_name:
            names = ", ".join(self.by_name)
            raise ApiError(404, "model_not_found", f"there is no such model; this server has {names}", "model")
        return self.by_name[name]

    def answers_to(self, host: str) -> bool:
        """Whether the name in a Host header is one of the server's."""
        return self.hosts is None or name_of(host) in self.hosts

    @contextmanager
    def admit(self, engine: CompletionBackend, size: int) -> Iterator[None]:
        """Count a request for an engine, whose answer has `size` bytes at most, until the block is left.

        Raises:
            ApiError: the answers to all requests together could be larger than the limit.
        """
        if self.pending_bytes + size > self.limits.pending_bytes:
            raise ApiError(429, "full", "the answers to the requests under way could be too large; try again later")
        self.admitted += 1
        self.pending_bytes += size
        self.engine_users[engine] += 1
        try:
            yield
        finally:
            self.admitted -= 1
            self.pending_bytes -= size
            self.engine_users[engine] -= 1
            if not self.engine_users[engine]:
                del self.engine_users[engine]

    def admission_error(self) -> ApiError | None:
        """Why any request would be refused now: no model is ready, or the queues of the ready ones are full.

        Sets `was_full` of the models.
        """
        errors = []
        for model in self.models:
            try:
                engine = self.ready_engine(model)
            except ApiError as error:
                errors.append(error)
                continue
            # The next request is expected to be as large as the last one, but at most an eighth of the queue, so that
            # a large request does not keep small ones out. A full queue must first have room for an eighth: admitting
            # one request at a time costs more.
            eighth = max(1, engine.max_waiting // 8)
            expected = eighth if model.was_full else min(model.last_sequences, eighth)
            model.was_full = not engine.has_room(expected + model.tokenizing_sequences)
            if not model.was_full:
                return None
            errors.append(ApiError(429, "full", engine.why_full()))
        return min(errors, key=lambda error: error.status)  # 429 before 503: one of the models will have room

    def ready_engine(self, model: ServedModel) -> CompletionBackend:
        """The engine of a model.

        Raises:
            ApiError: the model accepts no requests.
        """
        status = "draining" if self.draining and model.status != "dead" else model.status
        if status == "ready" and model.engine is not None:
            return model.engine
        if status == "dead":
            raise engine_stopped_error()
        messages = {
            "loading": "the model is loading; try again in a few seconds",
            "draining": "the server is shutting down",
            "restarting": "the model is being started again; try again in a few seconds",
        }
        raise ApiError(503, status, messages[status])
