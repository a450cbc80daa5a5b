"""The text of documents that a run keeps as token IDs, decoded one by one, and sampled where it is too much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2_chinese.text.pieces import document_begins
from gpt2_chinese.text.tokenizers import Tokenizer

UNKNOWN_CHARACTER = "\ufffd"
"""Stands in the text for an `[UNK]`."""

Integers = npt.NDArray[np.int64]

_TOKENS_AT_ONCE = 1 << 19
_TRIAL_DOCUMENTS, _TRIAL_TOKENS = 200, 10_000  # they tell how many characters a token has


class CorpusText:
    """The texts of documents, or of a random sample of them.

    Nothing is kept but where documents begin (8 bytes a document); a text is decoded when it is asked for.

    Args:
        tokens: documents one after the other, each with its marks; may be mapped from the disk.
        lengths: of the stretches of `tokens` that do not belong together though no document begins between them, such
            as slices of long documents; they add up to `len(tokens)`. None is one stretch.
        max_characters: of the sample, to within a document; None takes all documents. A document that is longer than
            what is left is cut off there.
        seed: of the sample.

    Attributes:
        documents: how many there are.
        chosen: which of them are in the sample, in ascending order, counted from 0.
        is_sample: whether that is not all of their text.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        tokenizer: Tokenizer,
        *,
        lengths: tuple[int, ...] | None = None,
        max_characters: int | None = None,
        seed: int = 0,
    ) -> None:
        self._tokens, self._tokenizer = tokens, tokenizer
        marks = tokenizer.marks
        self._marks = [mark for mark in (marks.begin, marks.end) if mark is not None]
        self._begins = document_starts(tokens, tokenizer, lengths)
        self._ends = np.append(self._begins[1:], len(tokens))
        self.documents = len(self._begins)
        self.chosen: Integers = np.arange(self.documents)
        self._max_characters = max_characters
        self._max_tokens: int | None = None  # of a document that is in the sample
        self.is_sample = False
        if max_characters is not None and self.documents:
            self._sample(max_characters, np.random.default_rng(seed))

    def _sample(self, max_characters: int, random: np.random.Generator) -> None:
        order = random.permutation(self.documents)
        trial = [self._decoded(document, limit=_TRIAL_TOKENS) for document in order[:_TRIAL_DOCUMENTS].tolist()]
        sizes = np.minimum(self._ends - self._begins, _TRIAL_TOKENS)[order[:_TRIAL_DOCUMENTS]]
        budget = int(max_characters * sizes.sum() / max(1, sum(map(len, trial))))
        if len(self._tokens) <= budget:
            return
        lengths = (self._ends - self._begins)[order]
        self.chosen = np.sort(order[np.cumsum(lengths) - lengths < budget])
        self.is_sample, self._max_tokens = True, 2 * budget

    def text(self, document: int) -> str:
        """The text of one document, counted from 0; a line break is one character, so is an `[UNK]`."""
        return self._decoded(document)

    def ids(self, document: int) -> Integers:
        """The IDs of one document, with its marks."""
        return np.asarray(self._tokens[self._begins[document] : self._ends[document]]).astype(np.int64)

    def _decoded(self, document: int, limit: int | None = None) -> str:
        """The text of a document, or of so many of its first tokens; some at a time, since it may be millions."""
        begin, end = int(self._begins[document]), int(self._ends[document])
        end = end if limit is None else min(end, begin + limit)
        joiner, unknown = self._tokenizer.joiner(), self._tokenizer.marks.unknown
        texts: list[str] = []
        for first in range(begin, end, _TOKENS_AT_ONCE):
            ids = np.asarray(self._tokens[first : min(end, first + _TOKENS_AT_ONCE)])
            ids = ids[~np.isin(ids, self._marks)]
            if unknown is not None and (ids == unknown).any():
                pieces = [joiner.push(id_) + (UNKNOWN_CHARACTER if id_ == unknown else "") for id_ in ids.tolist()]
            else:
                pieces = [joiner.push(id_) for id_ in ids.tolist()]
            texts.append("".join(pieces))
        return "".join(texts)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Documents of the sample: their numbers from 0, and their texts."""
        left = self._max_characters
        for document in self.chosen.tolist():
            text = self._decoded(document, self._max_tokens)
            if self.is_sample and left is not None:
                text = text[:left]
                left -= len(text)
            if text:
                yield document, text
            if self.is_sample and not left:
                return

    def code_points(self) -> tuple[npt.NDArray[np.uint32], Integers]:
        """The texts of the sample as one array of code points, and the length of each."""
        parts: list[npt.NDArray[np.uint32]] = []
        lengths: list[int] = []
        for _, text in self:
            parts.append(as_code_points(text))
            lengths.append(len(text))
        return np.concatenate(parts) if parts else np.empty(0, np.uint32), np.array(lengths, np.int64)


def as_code_points(text: str) -> npt.NDArray[np.uint32]:
    """The characters of a text as numbers."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def document_starts(tokens: npt.NDArray[Any], tokenizer: Tokenizer, lengths: tuple[int, ...] | None = None) -> Integers:
    """Where documents begin, in ascending order; the first begins at 0 whatever stands there.

    Memory is that of a block of tokens, and 8 bytes a document.

    Args:
        lengths: as for `CorpusText`.
    """
    found: list[Integers] = [np.zeros(min(1, len(tokens)), np.int64)]
    marks, inside = tokenizer.marks, False
    for begin in range(0, len(tokens), _TOKENS_AT_ONCE):
        block = np.asarray(tokens[begin : begin + _TOKENS_AT_ONCE])
        found.append(document_begins(block, marks, inside=inside) + begin)
        if marks.begin == marks.end:
            inside ^= bool(np.count_nonzero(block == marks.begin) % 2)
    if lengths is not None and len(tokens):
        stretches = np.cumsum([0, *lengths])
        found.append(stretches[stretches < len(tokens)])
    return np.unique(np.concatenate(found))
