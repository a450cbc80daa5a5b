"""A request on its way through a model: submitted, streamed or awaited, and cancelled when its handler ends."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from gpt2_chinese.decoding.backend import CompletionBackend, Request
from gpt2_chinese.decoding.completion import Completion, EngineFull, Prompt, TextDelta
from gpt2_chinese.serving.answer_size import check_answer_size, how_to_shrink, largest_answer
from gpt2_chinese.serving.api import CompletionRequest, Limits
from gpt2_chinese.serving.errors import ApiError, timeout_error
from gpt2_chinese.serving.service import ServedModel, Service


class DeltaQueue:
    """Text deltas on their way from the model's thread to a handler, which wakes once for all that have arrived."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._deltas: deque[tuple[int, TextDelta | None]] = deque()
        self._event = asyncio.Event()
        self._wake_scheduled = False

    def put(self, prompt_index: int, delta: TextDelta | None) -> None:
        """Called in the model's thread; None says that the request of this prompt has ended."""
        self._deltas.append((prompt_index, delta))
        if not self._wake_scheduled:
            self._wake_scheduled = True
            with suppress(RuntimeError):  # the loop is closed: nothing waits any more
                self._loop.call_soon_threadsafe(self._event.set)

    def put_end(self, prompt_index: int, _: Future[list[Completion]]) -> None:
        self.put(prompt_index, None)

    async def get(self) -> list[tuple[int, TextDelta | None]]:
        """Wait for at least one, and give all."""
        await self._event.wait()
        self._event.clear()
        self._wake_scheduled = False
        return [self._deltas.popleft() for _ in range(len(self._deltas))]


@dataclass
class RunningRequest:
    """A completion request in a model's engine.

    Attributes:
        prompts: one for each context.
        requests: the engine's request of each prompt.
        delta_queue: what the model generates, None if it is not streamed.
        arrived: seconds of `time.monotonic()`.
        unfinished: streamed requests whose end has not come through the queue.
        answer_bytes: the most that the answer can have.
    """

    model: ServedModel
    engine: CompletionBackend
    limits: Limits
    completion_request: CompletionRequest
    delta_queue: DeltaQueue | None
    arrived: float
    prompts: list[Prompt] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    unfinished: int = 0
    answer_bytes: int = 0

    @property
    def cut_tokens(self) -> int:
        """Tokens of the longest context that did not fit into the model's window."""
        return max(prompt.truncated for prompt in self.prompts)

    @property
    def seconds_left(self) -> float:
        """Seconds until the request times out; negative after that."""
        return self.arrived + self.limits.request_seconds - time.monotonic()

    async def completions(self) -> list[list[Completion]]:
        """Wait for all completions, by prompt and sample.

        Raises:
            ApiError: they are not there in time.
            EngineStopped: the model has stopped.
        """
        for request in self.requests:
            try:
                await asyncio.wait_for(asyncio.wrap_future(request.future), max(0.0, self.seconds_left))
            except asyncio.TimeoutError:
                raise self._timeout_error() from None
        return self.finished_completions()

    @property
    def num_missing(self) -> int:
        """Completions of an ended request that the model has no different texts for."""
        asked = self.completion_request.samples * len(self.prompts)
        return asked - sum(len(group) for group in self.finished_completions(observe=False))

    async def next_deltas(self, timeout: float) -> list[tuple[int, TextDelta]] | None:
        """Wait for the next deltas of a streamed request, each with the index of its prompt.

        Returns:
            None at the end; an empty list if nothing has come within `timeout` seconds.

        Raises:
            ApiError: the whole request has timed out.
        """
        assert self.delta_queue is not None
        while self.unfinished:
            seconds_left = self.seconds_left
            try:
                arrived = await asyncio.wait_for(self.delta_queue.get(), max(0.0, min(seconds_left, timeout)))
            except asyncio.TimeoutError:
                if seconds_left <= timeout:
                    raise self._timeout_error() from None
                return []
            self.unfinished -= sum(delta is None for _, delta in arrived)
            if deltas := [(index, delta) for index, delta in arrived if delta is not None]:
                return deltas
        return None

    def finished_completions(self, *, observe: bool = True) -> list[list[Completion]]:
        """All completions of a request that has ended, as it orders them; with `observe` its times go to /metrics.

        Raises:
            EngineStopped: the model has stopped.
        """
        completions = [request.future.result() for request in self.requests]
        first_tokens = [request.first_token_at for request in self.requests if request.first_token_at is not None]
        longest = max((len(completion.ids) for group in completions for completion in group), default=0)
        if first_tokens and observe:
            self.model.timings.observe_request(self.arrived, min(first_tokens), time.monotonic(), longest)
        return [self._ranked(group) for group in completions]

    def _ranked(self, group: list[Completion]) -> list[Completion]:
        """The likeliest of a prompt's completions, if more were decoded, or all in the order that was asked for."""
        request = self.completion_request
        if not request.sort_likely and request.sequences == request.samples:
            return group
        return sorted(group, key=lambda one: -(one.score or 0.0))[: request.samples]

    def _timeout_error(self) -> ApiError:
        return timeout_error(self.limits.request_seconds, self.completion_request.length_field)


@asynccontextmanager
async def submit(service: Service, completion_request: CompletionRequest) -> AsyncIterator[RunningRequest]:
    """Tokenize a request and queue it; when the block is left, what is unfinished is cancelled.

    Raises:
        ApiError: the model accepts no requests, or its queue is full.
    """
    model = service.model(completion_request.model)
    engine = service.ready_engine(model)
    size = largest_answer(completion_request, model.token_bytes, engine.n_ctx)
    check_answer_size(size, service.limits, how_to_shrink(completion_request), completion_request.length_field)
    running = RunningRequest(
        model,
        engine,
        service.limits,
        completion_request,
        DeltaQueue() if completion_request.stream else None,
        arrived=time.monotonic(),
    )
    running.answer_bytes = size
    with service.admit(engine, size):
        try:
            await _queue(running)
            yield running
        finally:
            for request in running.requests:
                request.cancel()  # frees its slots if the client has disconnected or the request has timed out


async def _queue(running: RunningRequest) -> None:
    model, completion_request, queue = running.model, running.completion_request, running.delta_queue
    engine = running.engine  # the model may get another one meanwhile
    sequences = model.last_sequences = completion_request.sequences * len(completion_request.contexts)
    try:
        # Checked before tokenizing too, which a refused request need not pay for.
        engine.check_room(sequences + model.tokenizing_sequences)
        model.tokenizing_sequences += sequences
        try:
            running.prompts = await model.tokenize(engine, completion_request.contexts, completion_request.length)
        finally:
            model.tokenizing_sequences -= sequences
        for index, prompt in enumerate(running.prompts):
            request = engine.submit(
                prompt,
                samples=completion_request.sequences,
                length=completion_request.length,
                sampling_params=completion_request.settings,
                seed=completion_request.seed,
                stop=completion_request.stop,
                logprobs=completion_request.logprobs,
                score_prompt=completion_request.scored,
                distinct=completion_request.distinct,
                until_sentence=completion_request.until_sentence,
                scores=completion_request.needs_scores,
                on_delta=None if queue is None else partial(queue.put, index),
            )
            running.requests.append(request)
            if queue is not None:
                running.unfinished += 1
                request.future.add_done_callback(partial(queue.put_end, index))
    except EngineFull as error:
        raise ApiError(429, "full", str(error)) from None


def count_tokens(completions: Sequence[Sequence[Completion]]) -> int:
    """Tokens generated in all completions."""
    return sum(len(completion.ids) for group in completions for completion in group)
