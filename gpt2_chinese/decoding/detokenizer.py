"""The text of a sample while it is decoded, up to the first stop string. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gpt2_chinese.decoding.completion import Prompt
from gpt2_chinese.text.tokenizers import Tokenizer

CONTEXT_TOKENS = 5
"""Tokens of the prompt on which the text of the next one may depend: the last token, or byte tokens, of which a
character has up to four and a space one."""


SENTENCE_END = re.compile("[。！？!?]+[”’」』）)\\]\"']*|\\n|\\.(?=\\s)")
"""An end mark with the quotes and brackets that it closes, a line break, or a full stop before white space."""
QUOTES = (("“", "”"), ("「", "」"), ("『", "』"))
MAX_QUOTE_CONTEXT = 200
"""Characters of the context in which a quote may have been opened."""


def end_of_sentence(text: str, begin: int, context: str = "") -> int | None:
    """Where the first sentence of a text ends, None if it goes on; a line break is not part of it.

    Args:
        begin: where to look for the end from.
        context: what precedes the text; a sentence does not end within a quote that was opened there.

    Example:
        >>> end_of_sentence("他说：“好。”然后", 0)
        7
    """
    before = context[-MAX_QUOTE_CONTEXT:].rpartition("\n")[2]
    for match in SENTENCE_END.finditer(text, begin):
        if match[0] == "\n":
            if text[: match.start()].strip():
                return match.start()
            continue
        so_far = before + text[: match.end()]
        if all(so_far.count(opening) <= so_far.count(closing) for opening, closing in QUOTES):
            return match.end()
    return None


class IncrementalDetokenizer:
    """Turns sampled tokens into the text after a prompt, one token after the other, and looks for stop strings.

    A space separates two tokens only where the tokenizer joins with one, and never follows a context that ends with
    white space. Of several stop strings, the one that is completed first ends the text, wherever the tokens begin and
    end; `text` is cut off before it. With `until_sentence` the text ends with its first sentence.

    Attributes:
        text: the text so far.
        stopped: whether a stop string, or the end of the sentence, was found.
        num_emitted: characters of `text` that `push` and `flush` have returned.

    Example:
        >>> detokenizer = IncrementalDetokenizer(tokenizer, prompt, stop=["。"])
        >>> [detokenizer.push(id_) for id_ in tokenizer.encode("好的。谢")], detokenizer.text, detokenizer.stopped
        (['好', '的', '', ''], '好的', True)
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Prompt, stop: Sequence[str] = (), *, until_sentence: bool = False
    ) -> None:
        self.text = ""
        self.stopped = False
        self.num_emitted = 0
        self._joiner = tokenizer.joiner()
        for id_ in prompt.ids[-CONTEXT_TOKENS:]:
            self._joiner.push(id_)
        self._strip_space = prompt.context[-1:].isspace()
        self._stop = stop
        self._context = prompt.context
        self._until_sentence = until_sentence
        self._max_stop_length = max((len(one) for one in stop), default=0)

    def push(self, *ids: int) -> str:
        """Add tokens; return the text that is settled by them, without an end that may still become a stop string."""
        if self._stop or self._until_sentence:
            # One at a time, since the text may end with any of them.
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
        if self._until_sentence and not self.stopped:
            end = end_of_sentence(self.text, max(0, before - 1), self._context)
            if end is not None:
                self.text = self.text[:end]
                self.stopped = True
                held_back = 0
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
