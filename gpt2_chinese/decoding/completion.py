"""What the engine is asked and what it answers, and the text of a continuation as it grows; torch is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2_chinese.text.tokenizer import TextJoiner, Tokenizer

PRECISIONS = ("auto", "fp32", "bf16", "int8")
"""How a CPU may keep the weights; "auto" is bf16. On a GPU "auto" is the model's own precision, int8 is not there."""

SETTING_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_k": (0, 1_000_000),
    "top_p": (0, 1),
    "repetition_penalty": (0.1, 10),
    "seed": (-(2**63), 2**63 - 1),
}
"""What a caller may ask for, both ends included."""

MAX_LOGPROBS = 5
"""Alternatives of a token that a caller may ask for."""


@dataclass(frozen=True)
class Settings:
    """How tokens are drawn; values within SETTING_LIMITS.

    temperature 0 takes the greatest logit; top_k 0 and top_p 0 (or 1) are off; repetition_penalty 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 30
    top_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A context as the model gets it: `[MASK]` (the beginning of a document) and its ids, at most n_ctx of them.

    `cut` counts the tokens that were cut from the left because the context is longer than the model's; `implied` those
    at the beginning of `ids` that the caller has not given: 1 for a `[MASK]` that was put there, else 0.
    """

    context: str
    ids: tuple[int, ...]
    cut: int
    implied: int = 0


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a continuation or a context, as the vocabulary has it, and how likely the model held it to be.

    `logprob` is the log-softmax of the raw logits, before any setting; `top` has the likeliest tokens and this one.
    Both are None for a token that nothing stands before. `offset` counts the characters of the continuation, or of the
    context, before it.
    """

    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


@dataclass(frozen=True)
class TextDelta:
    """What one step adds to a sample's text; `finish_reason` stands in a sample's last piece."""

    sample: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """A finished sample: its context and continuation, the ids that were drawn, and why it ended.

    `finish_reason` is "stop" ([CLS], the end of a document, or a stop string, which is cut off), "length" or
    "cancelled". `logprobs` are those of the tokens whose text stands in the continuation, if they were asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()


class EngineStopped(RuntimeError):
    """The engine takes no more requests: it was closed, or its thread has died of an error."""


class EngineFull(RuntimeError):
    """More sequences wait already than `max_waiting` allows."""


class IncrementalDetokenizer:
    """The text behind a prompt, token by token, up to the first stop string.

    A space stands in between only where the tokenizer joins with one, and none behind a context that ends with one
    already. The stop string that is complete first ends the text, whatever the tokens' borders; `text` is cut before
    it.

    Example:
        >>> text = IncrementalDetokenizer(tokenizer, prompt, stop=["。"])
        >>> [text.push(id_) for id_ in tokenizer.encode("好的。谢")], text.text, text.stopped
        (['好', '的', '', ''], '好的', True)
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._vocabulary = tokenizer.vocabulary
        self._joiner = TextJoiner(compat=tokenizer.compat)
        for id_ in prompt.ids[-4:]:  # the joiner remembers one token, or the four bytes of one character
            self._joiner.push(self._vocabulary[id_])
        self._behind_space = prompt.context[-1:].isspace()
        self._stop = stop
        self._longest = max((len(one) for one in stop), default=0)
        self.given = 0  # characters of `text` that push() and rest() have returned

    def push(self, *ids: int) -> str:
        """Add tokens; give the text that is settled by them, without what may yet become a stop string."""
        if self._stop:
            return "".join([self._push([id_]) for id_ in ids])
        return self._push(ids)

    def _push(self, ids: Sequence[int]) -> str:
        """Several tokens only where no stop string could end within them."""
        if self.stopped:
            return ""
        new = "".join([self._joiner.push(self._vocabulary[id_]) for id_ in ids])
        if new and self._behind_space and not self.text:
            new = new.removeprefix(" ")
            self._behind_space = False
        before = len(self.text)
        self.text += new
        held = 0
        if self._stop:
            begin = max(0, before - self._longest + 1)
            found = [
                (place + len(one), place) for one in self._stop if (place := self.text.find(one, begin)) >= self.given
            ]
            if found:
                self.text = self.text[: min(found)[1]]
                self.stopped = True
            else:
                held = max(self._beginning_of(one) for one in self._stop)
        return self._give(len(self.text) - held)

    def rest(self) -> str:
        """What push() held back, once it is known that no more tokens come."""
        return self._give(len(self.text))

    def _beginning_of(self, stop: str) -> int:
        """How many of the last characters are the beginning of this stop string."""
        return next((size for size in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:size])), 0)

    def _give(self, end: int) -> str:
        text = self.text[self.given : end]
        self.given = max(self.given, end)
        return text
