"""What completes texts, as its callers see it: requests become tickets, whoever decodes them; torch is not needed."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from gpt2_chinese.decoding.completion import (
    MAX_LOGPROBS,
    Completion,
    EngineFull,
    EngineStopped,
    Prompt,
    Settings,
    TextDelta,
    TokenLogprob,
)
from gpt2_chinese.text.tokenizer import Tokenizer
from gpt2_chinese.text.vocabulary import MASK_ID

Self = TypeVar("Self", bound="CompletionBackend")


@dataclass(eq=False)
class Request:
    """A request that was taken; `future` gets its completions, in the order of the samples.

    `first_token_at` is when the first token of any sample was drawn, in seconds of `time.monotonic()`. It is there with
    the completions; `prompt_logprobs` are there before any piece.
    """

    prompt: Prompt
    samples: int
    length: int
    settings: Settings
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    scored: bool
    on_delta: Callable[[TextDelta], None] | None
    future: Future[list[Completion]] = field(default_factory=Future)
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    first_token_at: float | None = None

    def cancel(self, sample: int | None = None) -> None:
        """Give up the places at the next step, or one sample's; what has not ended ends as it is, as "cancelled"."""
        raise NotImplementedError


class CompletionBackend(ABC):
    """A model that takes requests and decodes them elsewhere: in a thread (Engine) or a process (EngineProcess).

    Attributes:
        tokenizer: the model's.
        n_ctx: tokens that the model sees at once.
        max_waiting: sequences that may wait for a row.
        device: where the model is, as PyTorch calls it.
        error: why the model has stopped.
        prompt_tokens: tokens of the prompts that were prefilled so far.
        generated_tokens: tokens that were drawn so far, in all samples.
    """

    tokenizer: Tokenizer
    n_ctx: int
    max_waiting: int
    device: str
    error: BaseException | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __enter__(self: Self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def start(self) -> None:
        """Begin to take requests."""

    @abstractmethod
    def close(self) -> None:
        """Stop after the step under way; requests that have not ended get EngineStopped."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the model runs and takes requests."""

    @property
    @abstractmethod
    def at_full_speed(self) -> bool:
        """Whether the decoder is the one that stays: none is being compiled."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Sequences being decoded."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Sequences that wait for a row."""

    @abstractmethod
    def _queue(self, **request: Any) -> Request:
        """Make the Request of a request whose values are right, and queue it; errors are those of `submit`."""

    def prompt(self, context: str, length: int) -> Prompt:
        """Give the ids of a context; one longer than n_ctx is cut from the left, with room left for `length` tokens.

        Raises:
            ValueError: the context holds half of a surrogate pair, which is no character.
        """
        try:
            context.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start + 1} is half of a surrogate pair (U+{ord(context[error.start]):04X}), "
                "not a character; send the text as UTF-8"
            ) from None
        return self._fitted(context, [MASK_ID, *self.tokenizer.encode(context)], length, implied=1)

    def prompt_of_ids(self, ids: Sequence[int], length: int) -> Prompt:
        """The same for a context that is given as ids, at least one; `[MASK]` is put before them where it is not there.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        implied = [] if ids[0] == MASK_ID else [MASK_ID]
        return self._fitted(self.tokenizer.decode(ids), [*implied, *ids], length, implied=len(implied))

    def _fitted(self, context: str, ids: list[int], length: int, *, implied: int) -> Prompt:
        if len(ids) <= self.n_ctx:
            return Prompt(context, tuple(ids), 0, implied)
        kept = max(self.n_ctx - length, self.n_ctx // 2, 1)
        return Prompt(context, tuple(ids[-kept:]), len(ids) - kept)

    def submit(
        self,
        prompt: Prompt,
        *,
        samples: int,
        length: int,
        settings: Settings | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        scored: bool = False,
        on_delta: Callable[[TextDelta], None] | None = None,
    ) -> Request:
        """Queue a request and return at once.

        Args:
            prompt: from `prompt()`, or of ids alone.
            samples: how many completions, at least 1.
            length: tokens a completion has at most, at least 1; 0 is possible with `scored`.
            settings: how tokens are drawn.
            seed: 64 bits; the same seed gives the same texts. None takes a random one.
            stop: the first of these strings in a continuation ends it, and is cut off.
            logprobs: how many alternatives of each token are wanted, 0 to MAX_LOGPROBS; None reports no logprobs.
            scored: report the prompt's own tokens too, as `prompt_logprobs` of the ticket, there before any piece.
            on_delta: called in another thread with each piece of text; must be quick and not raise.

        Raises:
            EngineFull: too many sequences wait.
            EngineStopped: the engine is closed, or the model has died.
        """
        if samples < 1 or length < (0 if scored else 1):
            raise ValueError(f"samples and length must be 1 or more, they are {samples} and {length}")
        if scored and logprobs is None:
            raise ValueError("a prompt is scored where logprobs are wanted; say how many")
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must be from 0 to {MAX_LOGPROBS}, it is {logprobs}")
        if not 1 <= len(prompt.ids) <= self.n_ctx:
            raise ValueError(f"a prompt must have 1 to {self.n_ctx} ids, this one has {len(prompt.ids)}")
        return self._queue(
            prompt=prompt,
            samples=samples,
            length=length,
            settings=settings or Settings(),
            seed=secrets.randbits(63) if seed is None else seed,
            stop=tuple(stop),
            logprobs=logprobs,
            scored=scored,
            on_delta=on_delta,
        )

    def has_room(self, samples: int) -> bool:
        """Whether so many more sequences can wait.

        A request larger than the limit is taken when nothing waits: it is the caller who limits samples.
        """
        waiting = self.waiting
        return not waiting or waiting + samples <= self.max_waiting

    def check_room(self, samples: int) -> None:
        """Raise EngineFull if so many more sequences cannot wait."""
        if not self.has_room(samples):
            raise EngineFull(self.why_full())

    def why_full(self) -> str:
        return f"{self.waiting} sequences wait already; try again later"

    def complete(
        self,
        context: str,
        *,
        samples: int = 5,
        length: int = 50,
        settings: Settings | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """Complete a context and wait for the texts; each begins with the context exactly as it is given."""
        ticket = self.submit(self.prompt(context, length), samples=samples, length=length, settings=settings, seed=seed)
        return [completion.text for completion in ticket.future.result()]

    def _why_stopped(self) -> str:
        if self.error is None:
            return "the engine is closed"
        return f"the model has stopped: {self.error if isinstance(self.error, EngineStopped) else repr(self.error)}"
