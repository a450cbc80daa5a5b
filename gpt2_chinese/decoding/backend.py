"""What Engine (a thread) and EngineProcess (a process) have in common: requests go in, completions come out.

Needs no torch, so that a server whose models run in processes of their own starts fast.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from gpt2_chinese.decoding.completion import (
    MAX_LOGPROBS,
    Completion,
    EngineFull,
    EngineStopped,
    Prompt,
    SamplingParams,
    TextDelta,
    TokenLogprob,
)
from gpt2_chinese.text.tail import encode_tail
from gpt2_chinese.text.tokenizers import Tokenizer

MIN_TOP_P = 1e-30
"""The smallest top-p that keeps its meaning in float32."""
TAIL_CHARACTERS = 8
"""Characters of a context for each token of n_ctx, beyond which only its end is tokenized."""

Self = TypeVar("Self", bound="CompletionBackend")


@dataclass(eq=False)
class Request:
    """A submitted request; `CompletionBackend.submit` describes its fields.

    Attributes:
        future: gets the completions, in the order of the samples; fewer than `samples` if the model has no more
            different ones.
        prompt_logprobs: set before the first delta if `score_prompt` is.
        first_token_at: when the first token of any sample was sampled, in seconds of `time.monotonic()`; set before
            `future`.
    """

    prompt: Prompt
    samples: int
    length: int
    sampling_params: SamplingParams
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    score_prompt: bool
    on_delta: Callable[[TextDelta], None] | None
    distinct: bool = False
    until_sentence: bool = False
    scores: bool = False
    future: Future[list[Completion]] = field(default_factory=Future)
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    first_token_at: float | None = None

    def cancel(self, sample: int | None = None) -> None:
        """End the request, or one of its samples, before the next decode step, with finish_reason "cancelled"."""
        raise NotImplementedError


class PrefixCacheState(NamedTuple):
    """What a decoder's prefix cache has done and holds; all is 0 where a decoder has none.

    Attributes:
        hits: prompts of which a beginning was reused.
        reused_tokens: tokens of these beginnings.
        used_bytes: of the keys and values that are kept.
        capacity_bytes: the most that `used_bytes` can become.
    """

    hits: int = 0
    reused_tokens: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0


class CompletionBackend(ABC):
    """A model that decodes requests outside of the caller's thread, until it is closed or fails.

    Attributes:
        tokenizer: the model's.
        n_ctx: the model's context length in tokens.
        max_waiting: sequences that may wait in the queue for a batch slot.
        device: the model's device, as PyTorch names it.
        error: why the model has stopped, or None.
        prompt_tokens: tokens of prompts so far, reused ones included.
        generated_tokens: tokens sampled so far, in all sequences.
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
        """Start decoding; requests may be submitted from now on."""

    @abstractmethod
    def close(self) -> None:
        """Stop after the current decode step; unfinished requests fail with EngineStopped."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the model runs and takes requests."""

    @property
    @abstractmethod
    def at_full_speed(self) -> bool:
        """False while a faster decoder is still being compiled in the background."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Sequences in the batch."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Sequences in the queue, which wait for a batch slot."""

    @property
    @abstractmethod
    def prefix_cache(self) -> PrefixCacheState:
        """What the prefix cache has done and holds."""

    @abstractmethod
    def _enqueue(self, **fields: Any) -> Request:
        """Queue a request of valid fields; raises as `submit` does."""

    def prompt(self, context: str, length: int) -> Prompt:
        """Tokenize a context; one that exceeds n_ctx is truncated from the left, with room left for `length` tokens.

        Raises:
            ValueError: the context contains half of a surrogate pair, which is not a character.
        """
        try:
            context.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start + 1} is half of a surrogate pair (U+{ord(context[error.start]):04X}), "
                "not a character; send the text as UTF-8"
            ) from None
        left_out = 0
        if len(context) > TAIL_CHARACTERS * self.n_ctx:
            ids, left_out = encode_tail(self.tokenizer, context, self.n_ctx + 1)
        else:
            ids = self.tokenizer.encode(context)
        if not left_out:
            return self._truncate(context, [self.tokenizer.marks.begin, *ids], length, added=1)
        prompt = self._truncate(context, ids, length, added=0)
        estimate = round(left_out * len(ids) / (len(context) - left_out))
        return replace(prompt, truncated=prompt.truncated + max(1, estimate))

    def prompt_from_ids(self, ids: Sequence[int], length: int) -> Prompt:
        """The same for a context of one or more ids; `[MASK]` is added at the beginning unless it is there.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        begin = self.tokenizer.marks.begin
        added = [] if ids[0] == begin else [begin]
        return self._truncate(self.tokenizer.decode(ids), [*added, *ids], length, added=len(added))

    def _truncate(self, context: str, ids: list[int], length: int, *, added: int) -> Prompt:
        if len(ids) <= self.n_ctx:
            return Prompt(context, tuple(ids), 0, added)
        kept = max(self.n_ctx - length, self.n_ctx // 2, 1)
        return Prompt(context, tuple(ids[-kept:]), len(ids) - kept)

    def submit(
        self,
        prompt: Prompt,
        *,
        samples: int,
        length: int,
        sampling_params: SamplingParams | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        score_prompt: bool = False,
        on_delta: Callable[[TextDelta], None] | None = None,
        distinct: bool = False,
        until_sentence: bool = False,
        scores: bool = False,
    ) -> Request:
        """Queue a request and return at once.

        Args:
            prompt: from `prompt` or `prompt_from_ids`.
            samples: completions of the prompt, at least 1.
            length: most tokens of a completion, at least 1; 0 is allowed with `score_prompt`.
            sampling_params: the defaults if None.
            seed: 64 bits; the same seed gives the same texts. None takes a random one.
            stop: strings that end a completion; the one that is found first is cut off.
            logprobs: alternatives reported for each token, 0 to MAX_LOGPROBS; None reports no log-probabilities.
            score_prompt: report the log-probabilities of the prompt's own tokens too (`Request.prompt_logprobs`).
            on_delta: called in another thread with every TextDelta; it must be quick and must not raise.
            distinct: no two samples have the same text.
            until_sentence: a completion ends with its first sentence.
            scores: report the mean log-probability of each sample.

        Raises:
            EngineFull: the queue has no room for so many sequences.
            EngineStopped: the engine is closed, or the model has failed.
            ValueError: a value is out of its range.
        """
        if samples < 1 or length < (0 if score_prompt else 1):
            raise ValueError(f"samples and length must be 1 or more, they are {samples} and {length}")
        if score_prompt and logprobs is None:
            raise ValueError("score_prompt needs logprobs: give the number of alternatives, 0 or more")
        if not all(stop):
            raise ValueError("a stop string must not be empty")
        if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must be from 0 to {MAX_LOGPROBS}, it is {logprobs}")
        if not 1 <= len(prompt.ids) <= self.n_ctx:
            raise ValueError(f"a prompt must have 1 to {self.n_ctx} ids, this one has {len(prompt.ids)}")
        params = sampling_params or SamplingParams()
        if 0 < params.top_p < MIN_TOP_P:  # as a float32 it could be 0, which is off
            params = replace(params, top_p=MIN_TOP_P)
        for id_ in (*params.stop_token_ids, *(id_ for id_, _ in params.logit_bias)):
            if not 0 <= id_ < len(self.tokenizer):
                raise ValueError(f"token id {id_} is not in the vocabulary of {len(self.tokenizer)} tokens")
        if distinct and (params.temperature == 0 or params.top_k == 1):
            samples = 1  # there is only one text
        return self._enqueue(
            prompt=prompt,
            samples=samples,
            length=length,
            sampling_params=params,
            seed=secrets.randbits(63) if seed is None else seed,
            stop=tuple(stop),
            logprobs=logprobs,
            score_prompt=score_prompt,
            on_delta=on_delta,
            distinct=distinct,
            until_sentence=until_sentence,
            scores=scores,
        )

    def has_room(self, samples: int) -> bool:
        """Whether the queue has room for so many more sequences.

        An empty queue takes a request of any size: limiting its samples is left to the caller.
        """
        waiting = self.waiting
        return not waiting or waiting + samples <= self.max_waiting

    def check_room(self, samples: int) -> None:
        """Raise EngineFull unless the queue has room for so many more sequences."""
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
        sampling_params: SamplingParams | None = None,
        seed: int | None = None,
        distinct: bool = False,
    ) -> list[str]:
        """Complete a context and wait for the texts; each begins with the context exactly as it was given."""
        prompt = self.prompt(context, length)
        request = self.submit(
            prompt, samples=samples, length=length, sampling_params=sampling_params, seed=seed, distinct=distinct
        )
        return [completion.text for completion in request.future.result()]

    def _why_stopped(self) -> str:
        if self.error is None:
            return "the engine is closed"
        return f"the model has stopped: {self.error if isinstance(self.error, EngineStopped) else repr(self.error)}"
