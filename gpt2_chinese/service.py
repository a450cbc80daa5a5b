"""The model as the handlers of server.py see it: its state, and requests on their way into the engine and back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gpt2_chinese.api import Limits, Refusal, Wish
from gpt2_chinese.completion import Completion, EngineFull, Piece, Prompt, TokenLogprob
from gpt2_chinese.prometheus import Metrics

if TYPE_CHECKING:  # the port answers before torch is imported
    from gpt2_chinese.engine import Engine, Ticket

WARM_UP = "你好"


@dataclass
class Service:
    """What the handlers share: the model in its states, and counts.

    `load` gives an engine that has not started; it runs in a thread of its own while the port answers already.
    """

    load: Callable[[], Engine]
    name: str
    limits: Limits
    keys: tuple[bytes, ...] = ()
    device: str | None = None
    engine: Engine | None = None
    error: BaseException | None = None
    draining: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """The model is ready or has failed to load."""
    admitted: int = 0
    """Requests that will be finished before the server stops."""
    arriving: int = 0
    """Sequences of requests that are being tokenized: they will wait for the engine in a moment."""
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizing"))

    @property
    def status(self) -> str:
        if self.error is not None or (self.engine is not None and not self.engine.alive):
            return "dead"
        return "draining" if self.draining else "loading" if self.engine is None else "ready"

    async def prompt(self, context: str | tuple[int, ...], length: int) -> Prompt:
        """The ids of a context, in a thread of their own: a long text takes its time."""
        engine = self.ready_engine()
        make: Callable[[Any, int], Prompt] = engine.prompt if isinstance(context, str) else engine.prompt_of_ids
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, make, context, length)

    def ready_engine(self) -> Engine:
        """Raise a Refusal unless requests are taken."""
        if self.status == "ready" and self.engine is not None:
            return self.engine
        messages = {
            "loading": "the model is being loaded; try again in a few seconds",
            "draining": "the server is shutting down",
            "dead": "the model has stopped; the server must be started again",
        }
        code = "engine_stopped" if self.status == "dead" else self.status
        raise Refusal(503, code, messages[self.status])


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """Load the model while requests are answered with "loading" already; stop it at the end."""
    loop = asyncio.get_running_loop()

    def load() -> None:
        engine: Engine | None = None
        error: BaseException | None = None
        try:
            engine = service.load()
            engine.__enter__()
            # The first use loads the segmenter's model and compiles: before the first client, not for it.
            prompt = service.tokenizing.submit(engine.prompt, WARM_UP, 1).result()
            engine.submit(prompt, samples=1, length=2, seed=0).future.result()
        except BaseException as fault:
            error = fault
        with suppress(RuntimeError):  # the server has stopped meanwhile
            loop.call_soon_threadsafe(settle, engine, error)

    def settle(engine: Engine | None, error: BaseException | None) -> None:
        service.engine, service.error = engine, error
        service.settled.set()

    # A daemon, so that a server that is stopped while it loads need not wait for the end of it.
    threading.Thread(target=load, name="loading", daemon=True).start()
    yield
    service.tokenizing.shutdown(wait=False, cancel_futures=True)
    if service.engine is not None:
        await asyncio.to_thread(service.engine.close)


class Arrivals:
    """Pieces on their way from the model's thread to a handler, which is woken once however many there are."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[tuple[int, Piece | None]] = deque()
        self._event = asyncio.Event()
        self._woken = False

    def put(self, place: int, piece: Piece | None) -> None:
        """Called in the model's thread with the place of the prompt; None says that its request has ended."""
        self._pieces.append((place, piece))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: no one waits any more
                self._loop.call_soon_threadsafe(self._event.set)

    def end(self, place: int, _: Future[list[Completion]]) -> None:
        self.put(place, None)

    async def get(self) -> list[tuple[int, Piece | None]]:
        await self._event.wait()
        self._event.clear()
        self._woken = False
        return [self._pieces.popleft() for _ in range(len(self._pieces))]


@dataclass
class Asked:
    """A wish in the engine: a prompt and a ticket for each context, what arrives, and when its time is over."""

    wish: Wish
    prompts: list[Prompt]
    tickets: list[Ticket]
    arrivals: Arrivals | None
    arrived: float
    deadline: float

    @property
    def cut(self) -> int:
        """Tokens of the longest context that did not fit the model."""
        return max(prompt.cut for prompt in self.prompts)

    def echoed(
        self, place: int, logprobs: tuple[TokenLogprob, ...], *, begun: bool = False
    ) -> tuple[TokenLogprob, ...]:
        """Logprobs of a completion of a context, as they stand behind the context's own where it is scored.

        Args:
            begun: the context's own have been given already.
        """
        if not self.wish.scored:
            return logprobs
        moved = len(self.prompts[place].context)
        own = () if begun else self.tickets[place].prompt_logprobs or ()
        return (*own, *(replace(one, offset=one.offset + moved) for one in logprobs))


@asynccontextmanager
async def asked(service: Service, wish: Wish) -> AsyncIterator[Asked]:
    """Hand a wish to the engine; when the block is left, whatever is left of it is cancelled.

    Raises:
        Refusal: no requests are taken, or too many sequences wait.
    """
    engine = service.ready_engine()
    arrived = time.monotonic()
    arrivals = Arrivals() if wish.stream else None
    result = Asked(wish, [], [], arrivals, arrived, arrived + service.limits.request_seconds)
    service.admitted += 1
    try:
        try:
            # A request that will be refused need not be tokenized first.
            sequences = wish.samples * len(wish.contexts)
            engine.check_room(sequences + service.arriving)
            service.arriving += sequences
            try:
                result.prompts = [await service.prompt(context, wish.length) for context in wish.contexts]
            finally:
                service.arriving -= sequences
            for place, prompt in enumerate(result.prompts):
                ticket = engine.submit(
                    prompt,
                    samples=wish.samples,
                    length=wish.length,
                    settings=wish.settings,
                    seed=wish.seed,
                    stop=wish.stop,
                    logprobs=wish.logprobs,
                    scored=wish.scored,
                    on_piece=None if arrivals is None else partial(arrivals.put, place),
                )
                result.tickets.append(ticket)
                if arrivals is not None:
                    ticket.future.add_done_callback(partial(arrivals.end, place))
        except EngineFull as error:
            raise Refusal(429, "full", str(error)) from None
        yield result
    finally:
        for ticket in result.tickets:
            ticket.cancel()  # frees its rows if the client has gone or the time is over
        service.admitted -= 1


def out_of_time(limits: Limits, length: str) -> Refusal:
    message = f"no answer within {limits.request_seconds:g} seconds; ask for fewer samples or a smaller {length}"
    return Refusal(504, "timeout", message)


async def completions_of(service: Service, asked: Asked, length: str) -> list[list[Completion]]:
    """Wait for all completions, in the order of the prompts; `length` is the name of the field."""
    completions = []
    for ticket in asked.tickets:
        left = max(0.0, asked.deadline - time.monotonic())
        try:
            completions.append(await asyncio.wait_for(asyncio.wrap_future(ticket.future), left))
        except asyncio.TimeoutError:
            raise out_of_time(service.limits, length) from None
    observe(service, asked, completions)
    return completions


def observe(service: Service, asked: Asked, completions: Sequence[Sequence[Completion]]) -> None:
    first = [ticket.first_token_at for ticket in asked.tickets if ticket.first_token_at is not None]
    longest = max(len(completion.ids) for group in completions for completion in group)
    if first:
        service.metrics.observe_completion(asked.arrived, min(first), time.monotonic(), longest)


def tokens_of(completions: Sequence[Sequence[Completion]]) -> int:
    return sum(len(completion.ids) for group in completions for completion in group)


def stopped() -> Refusal:
    return Refusal(503, "engine_stopped", "the model has stopped; the server must be started again")
