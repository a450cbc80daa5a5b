"""What a completion backend is asked for and what it answers. Needs no torch, so that server.py can use it without."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("auto", "fp32", "bf16", "int8")
"""Precisions of the weights. "auto" is bf16 on a CPU and the model's own on a GPU; int8 is for CPUs only."""

PRECISION_HELP = (
    "precision of the weights. On a CPU: fp32; bf16, half the memory; int8, a quarter of the memory and the fastest, "
    "but less exact; auto is bf16. On a GPU: fp32 or bf16; auto is the model's own"
)

SAMPLING_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_k": (0, 1_000_000),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.1, 10),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "no_repeat_ngram_size": (0, 1000),
    "min_tokens": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
}
"""The least and the greatest value of each sampling parameter; both are allowed."""

MAX_LOGPROBS = 5
"""Alternatives of a token that a request may ask for."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled; values within SAMPLING_LIMITS.

    Temperature 0 is greedy; top_k 0, top_p 0 (or 1), repetition_penalty 1 and a 0 of the others are off.

    Attributes:
        min_p: keep tokens of at least this share of the likeliest one's probability.
        repetition_penalty: of the tokens of prompt and completion, multiplied.
        presence_penalty, frequency_penalty: subtracted from the logits of the completion's tokens, once, and once for
            each time that it has the token.
        no_repeat_ngram_size: no n-gram of so many tokens occurs twice in prompt and completion.
        logit_bias: token ids with what is added to their logits.
        bad_words: texts that a completion never has.
        min_tokens: tokens before a completion may end by the model's will or by `stop_token_ids`.
        ignore_eos: the token that ends a document is never sampled.
        stop_token_ids: tokens that end a completion; they are not part of it.
    """

    temperature: float = 1.0
    top_k: int = 30
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


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
    """What one decode step adds to the text of a sample; the last delta of a sample has a `finish_reason`.

    It also has the `score` of the sample, where that was asked for.
    """

    sample: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    score: float | None = None


@dataclass(frozen=True)
class Completion:
    """A finished sample.

    Attributes:
        text: the context and its continuation.
        ids: the sampled tokens, without the `[CLS]` at the end.
        finish_reason: "stop" (`[CLS]`, the end of a document, or a stop string, which is cut off), "length" or
            "cancelled".
        logprobs: those of the tokens whose text is in the continuation; empty unless they were asked for.
        score: the mean log-probability of the sampled tokens, that which ends a document included, by the model's raw
            logits; None unless it was asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()
    score: float | None = None


MISSING = "missing"
"""The `finish_reason` of a sample that has no text: the model has fewer texts than were asked for."""


class EngineStopped(RuntimeError):
    """The engine takes no requests any more: it was closed, or its thread or process has failed."""


class EngineFull(RuntimeError):
    """The queue has no room for a request: `max_waiting` sequences would be exceeded."""
