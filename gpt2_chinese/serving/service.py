"""The models as the handlers of server.py see them: their states, and requests on their way there and back."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from gpt2_chinese.decoding.backend import CompletionBackend, Request
from gpt2_chinese.decoding.completion import Completion, EngineFull, Prompt, TextDelta, TokenLogprob
from gpt2_chinese.serving.api import ApiError, CompletionRequest, Limits
from gpt2_chinese.serving.prometheus import Timings

WARM_UP = "你好"
STOPPED = "the model has stopped; the server must be started again"
SHORT = 200  # characters, or ids


@dataclass(eq=False)
class ServedModel:
    """A model in its states; `load` gives what completes, not yet started, and is called in a thread of its own."""

    name: str
    load: Callable[[], CompletionBackend]
    engine: CompletionBackend | None = None
    error: BaseException | None = None
    arriving: int = 0
    """Sequences of requests that are being tokenized: they will wait for the engine in a moment."""
    last: int = 1
    """Sequences of the request that came last; the next one will hardly want fewer."""
    full: bool = False
    """Whether the last request was refused for want of room."""
    timings: Timings = field(default_factory=Timings)
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizing"))
    tokenizer_taken: threading.Lock = field(default_factory=threading.Lock)

    @property
    def status(self) -> str:
        if self.error is not None or (self.engine is not None and not self.engine.alive):
            return "dead"
        return "loading" if self.engine is None else "ready"

    @property
    def running(self) -> int:
        """Sequences being decoded."""
        return self.engine.running if self.engine else 0

    @property
    def waiting(self) -> int:
        """Sequences that wait for a row."""
        return self.engine.waiting if self.engine else 0

    @property
    def at_full_speed(self) -> bool:
        return self.engine is not None and self.engine.at_full_speed

    @property
    def vocab_size(self) -> int | None:
        """Tokens of its vocabulary; None while it is being loaded."""
        return len(self.engine.tokenizer) if self.engine else None

    async def prompts(self, contexts: Sequence[str | tuple[int, ...]], length: int) -> list[Prompt]:
        """The ids of contexts; a long text takes its time, and gets a thread of its own for it."""
        engine = self.engine
        assert engine is not None

        def make() -> list[Prompt]:
            return [
                engine.prompt(context, length) if isinstance(context, str) else engine.prompt_from_ids(context, length)
                for context in contexts
            ]

        def make_in_turn() -> list[Prompt]:
            with self.tokenizer_taken:
                return make()

        # What a person types takes less time than another thread takes to hear of it.
        if sum(map(len, contexts)) <= SHORT and self.tokenizer_taken.acquire(blocking=False):
            try:
                return make()
            finally:
                self.tokenizer_taken.release()
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, make_in_turn)


@dataclass
class Service:
    """What the handlers share: the models, of which the first answers who names none, and the limits of them all."""

    models: Sequence[ServedModel]
    limits: Limits
    keys: tuple[bytes, ...] = ()
    device: str | None = None
    draining: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """Every model is ready, or one has failed to load."""
    admitted: int = 0
    """Requests that will be finished before the server stops."""
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Answers by route and status."""
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.by_name = {model.name: model for model in self.models}

    @property
    def status(self) -> str:
        """What the worst of the models is, or "draining"."""
        states = {model.status for model in self.models}
        if "dead" in states:
            return "dead"
        return "draining" if self.draining else "loading" if "loading" in states else "ready"

    @property
    def error(self) -> BaseException | None:
        """Why a model could not be loaded."""
        return next((model.error for model in self.models if model.error is not None), None)

    def model(self, name: str | None) -> ServedModel:
        """The model of a name, or the first.

        Raises:
            ApiError: there is none of that name.
        """
        if name is None:
            return self.models[0]
        if name not in self.by_name:
            there = ", ".join(self.by_name)
            raise ApiError(404, "model_not_found", f"there is no such model; this server has {there}", "model")
        return self.by_name[name]

    def refusal(self) -> ApiError | None:
        """Why a request would be refused whatever it is: no model is ready, or those that are have no room.

        Notes of each model whether it had room.
        """
        refusals = []
        for model in self.models:
            try:
                engine = self.ready_engine(model)
            except ApiError as refusal:
                refusals.append(refusal)
                continue
            # For another like the last one; but one that was large must not keep the small ones out. Where there was no
            # room there will be for several, for to take them one at a time costs more.
            some = max(1, engine.max_waiting // 8)
            wanted = some if model.full else min(model.last, some)
            model.full = not engine.has_room(wanted + model.arriving)
            if not model.full:
                return None
            refusals.append(ApiError(429, "full", engine.why_full()))
        return min(refusals, key=lambda refusal: refusal.status)  # "try again later" rather than "never"

    def ready_engine(self, model: ServedModel) -> CompletionBackend:
        """Raise a ApiError unless requests for a model are taken."""
        status = "draining" if self.draining and model.status != "dead" else model.status
        if status == "ready" and model.engine is not None:
            return model.engine
        messages = {
            "loading": "the model is being loaded; try again in a few seconds",
            "draining": "the server is shutting down",
            "dead": STOPPED,
        }
        raise ApiError(503, "engine_stopped" if status == "dead" else status, messages[status])


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """Load the models while requests are answered with "loading" already; stop them at the end."""
    loop = asyncio.get_running_loop()

    def load(model: ServedModel) -> None:
        engine: CompletionBackend | None = None
        error: BaseException | None = None
        try:
            starting = model.load()
            starting.start()
            engine = starting
            # The first use loads the segmenter's model and compiles: before the first client, not for it.
            prompt = model.tokenizing.submit(engine.prompt, WARM_UP, 1).result()
            engine.submit(prompt, samples=1, length=2, seed=0).future.result()
        except BaseException as fault:
            error = fault
        with suppress(RuntimeError):  # the server has stopped meanwhile
            loop.call_soon_threadsafe(settle, model, engine, error)

    def settle(model: ServedModel, engine: CompletionBackend | None, error: BaseException | None) -> None:
        model.engine, model.error = engine, error
        if engine is not None:
            service.device = engine.device
        # What is there now stays; a collection that looked at all of it would halt every answer.
        gc.collect()
        gc.freeze()
        if error is not None or all(model.status != "loading" for model in service.models):
            service.settled.set()

    def load_all() -> None:
        for model in service.models:
            load(model)

    # A daemon, so that a server that is stopped while it loads need not wait for the end of it.
    threading.Thread(target=load_all, name="loading", daemon=True).start()
    yield
    for model in service.models:
        model.tokenizing.shutdown(wait=False, cancel_futures=True)
        if model.engine is not None:
            await asyncio.to_thread(model.engine.close)


class DeltaQueue:
    """Pieces on their way from the model's thread to a handler, which is woken once however many there are."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[tuple[int, TextDelta | None]] = deque()
        self._event = asyncio.Event()
        self._woken = False

    def put(self, place: int, piece: TextDelta | None) -> None:
        """Called in the model's thread with the place of the prompt; None says that its request has ended."""
        self._pieces.append((place, piece))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: no one waits any more
                self._loop.call_soon_threadsafe(self._event.set)

    def end(self, place: int, _: Future[list[Completion]]) -> None:
        self.put(place, None)

    async def get(self) -> list[tuple[int, TextDelta | None]]:
        await self._event.wait()
        self._event.clear()
        self._woken = False
        return [self._pieces.popleft() for _ in range(len(self._pieces))]


@dataclass
class RunningRequest:
    """A wish in a model's engine: a prompt and a ticket for each context, what arrives, and when its time is over."""

    model: ServedModel
    wish: CompletionRequest
    prompts: list[Prompt]
    tickets: list[Request]
    arrivals: DeltaQueue | None
    arrived: float
    deadline: float

    @property
    def cut(self) -> int:
        """Tokens of the longest context that did not fit the model."""
        return max(prompt.truncated for prompt in self.prompts)

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
async def asked(service: Service, wish: CompletionRequest) -> AsyncIterator[RunningRequest]:
    """Hand a wish to the engine; when the block is left, whatever is left of it is cancelled.

    Raises:
        ApiError: no requests are taken, or too many sequences wait.
    """
    model = service.model(wish.model)
    engine = service.ready_engine(model)
    arrived = time.monotonic()
    arrivals = DeltaQueue() if wish.stream else None
    result = RunningRequest(model, wish, [], [], arrivals, arrived, arrived + service.limits.request_seconds)
    service.admitted += 1
    try:
        try:
            # A request that will be refused need not be tokenized first.
            sequences = model.last = wish.samples * len(wish.contexts)
            engine.check_room(sequences + model.arriving)
            model.arriving += sequences
            try:
                result.prompts = await model.prompts(wish.contexts, wish.length)
            finally:
                model.arriving -= sequences
            for place, prompt in enumerate(result.prompts):
                ticket = engine.submit(
                    prompt,
                    samples=wish.samples,
                    length=wish.length,
                    sampling_params=wish.settings,
                    seed=wish.seed,
                    stop=wish.stop,
                    logprobs=wish.logprobs,
                    score_prompt=wish.scored,
                    on_delta=None if arrivals is None else partial(arrivals.put, place),
                )
                result.tickets.append(ticket)
                if arrivals is not None:
                    ticket.future.add_done_callback(partial(arrivals.end, place))
        except EngineFull as error:
            raise ApiError(429, "full", str(error)) from None
        yield result
    finally:
        for ticket in result.tickets:
            ticket.cancel()  # frees its rows if the client has gone or the time is over
        service.admitted -= 1


def timeout_error(limits: Limits, length: str) -> ApiError:
    message = f"no answer within {limits.request_seconds:g} seconds; ask for fewer samples or a smaller {length}"
    return ApiError(504, "timeout", message)


async def completions_of(limits: Limits, asked: RunningRequest, length: str) -> list[list[Completion]]:
    """Wait for all completions, in the order of the prompts; `length` is the name of the field."""
    completions = []
    for ticket in asked.tickets:
        left = max(0.0, asked.deadline - time.monotonic())
        try:
            completions.append(await asyncio.wait_for(asyncio.wrap_future(ticket.future), left))
        except asyncio.TimeoutError:
            raise timeout_error(limits, length) from None
    observe(asked, completions)
    return completions


def observe(asked: RunningRequest, completions: Sequence[Sequence[Completion]]) -> None:
    first = [ticket.first_token_at for ticket in asked.tickets if ticket.first_token_at is not None]
    longest = max(len(completion.ids) for group in completions for completion in group)
    if first:
        asked.model.timings.observe_completion(asked.arrived, min(first), time.monotonic(), longest)


def tokens_of(completions: Sequence[Sequence[Completion]]) -> int:
    return sum(len(completion.ids) for group in completions for completion in group)


def stopped() -> ApiError:
    return ApiError(503, "engine_stopped", STOPPED)
