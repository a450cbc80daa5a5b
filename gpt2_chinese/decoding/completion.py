"""What a completion backend is asked for and what it answers. Needs no torch, so that server.py can use it without."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("auto", "fp32", "bf16", "int8")
"""Precisions of the weights. "auto" is bf16 on a CPU and the model's own on a GPU; int8 is for CPUs only."""

SAMPLING_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_k": (0, 1_000_000),
    "top_p": (0, 1),
    "repetition_penalty": (0.1, 10),
    "seed": (-(2**63), 2**63 - 1),
}
"""The least and the greatest value of each sampling parameter; both are allowed."""

MAX_LOGPROBS = 5
"""Alternatives of a token that a request may ask for."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled; values within SAMPLING_LIMITS.

    Temperature 0 is greedy; top_k 0, top_p 0 (or 1) and repetition_penalty 1 are off.
    """

    temperature: float = 1.0
    top_k: int = 30
    top_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A context as the model gets it.

    Attributes:
        context: the text as it was given.
        ids: `[MASK]` (the beginning of a document) and the context's ids, 1 to n_ctx in all.
        truncated: tokens that were cut off from the left, since the context did not fit; of a very long context, whose
            end alone is tokenized, an estimate.
        added: special tokens at the beginning of `ids` that the caller did not give: 1 for an added `[MASK]`, else 0.
    """

    context: str
    ids: tuple[int, ...]
    truncated: int
    added: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a completion or of a prompt, with its log-probability.

    Attributes:
        token: as the vocabulary spells it.
        logprob: log-softmax of the raw logits, before any sampling parameter; None for the first token of a prompt.
        top: the same of the likeliest tokens and of this one; None where `logprob` is None.
        offset: characters of the completion (or of the prompt's context) before the token.
    """

    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """What one decode step adds to the text of a sample; the last delta of a sample has a `finish_reason`."""

    sample: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """A finished sample.

    Attributes:
        text: the context and its continuation.
        ids: the sampled tokens, without the `[CLS]` at the end.
        finish_reason: "stop" (`[CLS]`, the end of a document, or a stop string, which is cut off), "length" or
            "cancelled".
        logprobs: those of the tokens whose text is in the continuation; empty unless they were asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()


class EngineStopped(RuntimeError):
    """The engine takes no requests any more: it was closed, or its thread or process has failed."""


class EngineFull(RuntimeError):
    """The queue has no room for a request: `max_waiting` sequences would be exceeded."""
