"""The text of a sample while it is decoded, up to the first stop string. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2_chinese.decoding.completion import Prompt
from gpt2_chinese.text.tokenizers import Tokenizer

CONTEXT_TOKENS = 5
"""Tokens of the prompt on which the text of the next one may depend: the last token, or byte tokens, of which a
character has up to four and a space one."""


class IncrementalDetokenizer:
    """Turns sampled tokens into the text after a prompt, one token after the other, and looks for stop strings.

    A space separates two tokens only where the tokenizer joins with one, and never follows a context that ends with
    white space. Of several stop strings, the one that is completed first ends the text, wherever the tokens begin and
    end; `text` is cut off before it.

    Attributes:
        text: the text so far.
        stopped: whether a stop string was found.
        num_emitted: characters of `text` that `push` and `flush` have returned.

    Example:
        >>> detokenizer = IncrementalDetokenizer(tokenizer, prompt, stop=["。"])
        >>> [detokenizer.push(id_) for id_ in tokenizer.encode("好的。谢")], detokenizer.text, detokenizer.stopped
        (['好', '的', '', ''], '好的', True)
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self.num_emitted = 0
        self._joiner = tokenizer.joiner()
        for id_ in prompt.ids[-CONTEXT_TOKENS:]:
            self._joiner.push(id_)
        self._strip_space = prompt.context[-1:].isspace()
        self._stop = stop
        self._max_stop_length = max((len(one) for one in stop), default=0)

    def push(self, *ids: int) -> str:
        """Add tokens; return the text that is settled by them, without an end that may still become a stop string."""
        if self._stop:
            # One at a time, since a stop string may end with any of them.
            return "".join([self._push([id_]) for id_ in ids])
        return self._push(ids)

    def _push(self, ids: Sequence[int]) -> str:
        if self.stopped:
            return ""
        new = "".join([self._joiner.push(id_) for id_ in ids])
        if new and self._strip_space and not self.text:
            new = new.removeprefix(" ")
            self._strip_space = False
        before = len(self.text)
        self.text += new
        held_back = 0
        if self._stop:
            begin = max(0, before - self._max_stop_length + 1)
            matches = [
                (index + len(one), index)
                for one in self._stop
                if (index := self.text.find(one, begin)) >= self.num_emitted
            ]
            if matches:
                self.text = self.text[: min(matches)[1]]
                self.stopped = True
            else:
                held_back = max(self._partial_match(one) for one in self._stop)
        return self._emit(len(self.text) - held_back)

    def flush(self) -> str:
        """Return what `push` held back; no more tokens may follow."""
        return self._emit(len(self.text))

    def _partial_match(self, stop: str) -> int:
        """How many characters at the end of the text are the beginning of this stop string."""
        return next((size for size in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:size])), 0)

    def _emit(self, end: int) -> str:
        text = self.text[self.num_emitted : end]
        self.num_emitted = max(self.num_emitted, end)
        return text
