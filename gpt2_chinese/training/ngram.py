"""What counting alone can do: an n-gram model of characters, the yardstick beside a model's bits per character.

Interpolated Kneser-Ney smoothing with three discounts for each order ("modified"; Chen and Goodman, An Empirical Study
of Smoothing Techniques for Language Modeling, 1998, section 3). With h a context of n - 1 characters, h' the same
without its first one, and w a character:

    p(w | h) = max(0, a(hw) - D(a(hw))) / T(h) + g(h) p(w | h')
    T(h) = sum of a(hw) over w;  g(h) = sum of D(a(hw)) over the different hw / T(h)

At the highest order a is the count. Below it is the number of different characters that stand before, save for
n-grams at a document's beginning, before which nothing can stand: there it is the count (as KenLM has it). D is D1, D2
or D3 for a = 1, 2, and 3 or more, estimated for each order from how many n-grams have a = 1, 2, 3 and 4. Below the
order 1 is the uniform distribution over the 0x110000 code points and a document's end, so a character that training
text does not have costs what is left for it there. A context that was never seen leaves everything to the shorter one.

A document is a sequence of characters, a line break among them, between a beginning and an end. The end is predicted
as a model predicts its end-of-document token; the beginning is context only. The bits of ends count, ends are no
characters: the unit is that of `evaluation.bits_per_character`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpt2_chinese.text.tokenizers import Tokenizer
from gpt2_chinese.training.corpus_text import UNKNOWN_CHARACTER, CorpusText
from gpt2_chinese.training.evaluation import UNKNOWN_BITS

ORDER = 7
MAX_CHARACTERS = 8_000_000
"""Of the training text that is counted, and of the held-out text; more is sampled by documents. A corpus of 1 GB takes
no more memory than this: `MAX_CHARACTERS * BYTES_A_CHARACTER` is 0.8 GB."""
BYTES_A_CHARACTER = 100

_BLOCK = 1 << 18
_OUTCOMES = 0x110000 + 1  # all code points, and the end of a document
_BEGIN, _END, _FIRST_CHARACTER = 0, 1, 2  # symbols
_MAX_SYMBOLS = 1 << 16  # so that n-gram, symbol and place fit into 64 bits; rarer characters count as not seen

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Yardstick:
    """
    Attributes:
        order: the n of the n-grams.
        bits_per_character: on the held-out text.
        characters: of the held-out text.
        counted_characters: of the training text.
        counted_documents, training_documents: how many were counted, of how many. Where these differ, or the text was
            cut, `is_sample` is true and more text would give a better figure.
    """

    order: int
    bits_per_character: float
    characters: int
    counted_characters: int
    counted_documents: int
    training_documents: int
    is_sample: bool


def measure_yardstick(
    training: npt.NDArray[Any],
    held_out: npt.NDArray[Any],
    tokenizer: Tokenizer,
    *,
    training_lengths: tuple[int, ...] | None = None,
    held_out_lengths: tuple[int, ...] | None = None,
    order: int = ORDER,
    max_characters: int = MAX_CHARACTERS,
) -> Yardstick | None:
    """Count the training text, and measure on the held-out text; both are IDs of documents with their marks.

    An `[UNK]` is a character of its own, and is charged as for a model (`evaluation.bits_per_character`).

    Args:
        training_lengths, held_out_lengths: of what belongs together, see `CorpusText`.

    Returns:
        None where one of the two has no text.
    """
    counted = CorpusText(training, tokenizer, lengths=training_lengths, max_characters=max_characters)
    measured = CorpusText(held_out, tokenizer, lengths=held_out_lengths, max_characters=max_characters)
    training_text, held_out_text = counted.code_points(), measured.code_points()
    characters = len(held_out_text[0])
    if not characters or not len(training_text[0]):
        return None
    bits = ngram_bits(training_text, held_out_text, order=order)
    bits += UNKNOWN_BITS * np.count_nonzero(held_out_text[0] == ord(UNKNOWN_CHARACTER))
    return Yardstick(
        order=order,
        bits_per_character=bits / characters,
        characters=characters,
        counted_characters=len(training_text[0]),
        counted_documents=len(training_text[1]),
        training_documents=counted.documents,
        is_sample=counted.is_sample,
    )


def ngram_bits(
    training: tuple[npt.NDArray[np.uint32], Integers],
    held_out: tuple[npt.NDArray[np.uint32], Integers],
    *,
    order: int = ORDER,
) -> float:
    """The bits that a model of n-grams needs for held-out documents, ends of documents included.

    Args:
        training, held_out: code points of documents one after the other, and the number of each document's characters.
        order: the n of the longest n-grams, at least 1.
    """
    alphabet = _alphabet(training[0])
    text, unseen = _Stream.of(*training, alphabet), _Stream.of(*held_out, alphabet)
    size = int(alphabet.max()) + 2  # a symbol more for all characters that are not in the alphabet
    level = _Level.of_symbols(text, size)
    found = np.where(unseen.symbols < size - 1, unseen.symbols, -1)
    contexts = np.where(unseen.left > 0, 0, -1)  # the empty one
    probability = np.full(len(unseen.symbols), 1.0 / _OUTCOMES)
    for n in range(1, order + 1):
        last = n == order
        above = None if last else level.longer(text, size)
        counts = level.counts if above is None else np.where(level.at_begin, level.counts, above.extensions(level))
        # n-grams that begin at each place of the held-out text predict the symbol n - 1 places behind
        begins = np.flatnonzero((unseen.left >= n) & (contexts >= 0))
        begins = begins[unseen.symbols[begins + n - 1] != _BEGIN]
        level.interpolate(counts, contexts[begins], found[begins], begins + n - 1, probability)
        if above is None or last:
            break
        contexts, found = found, above.find(found, unseen, size)
        level = above
    return float(-np.log2(probability[unseen.symbols != _BEGIN]).sum())


def _alphabet(code_points: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """The symbol of each code point: -1 for those that are not in the text (or, of more than `_MAX_SYMBOLS`, rare)."""
    counts = np.bincount(code_points, minlength=0x110000)
    there = np.flatnonzero(counts)
    most = _MAX_SYMBOLS - _FIRST_CHARACTER - 1
    if len(there) > most:
        there = np.sort(there[np.argsort(-counts[there], kind="stable")[:most]])
    symbols = np.full(0x110000, -1, np.int32)
    symbols[there] = np.arange(_FIRST_CHARACTER, _FIRST_CHARACTER + len(there))
    return symbols


class _Stream(NamedTuple):
    """Documents as symbols, each between its beginning and its end.

    Attributes:
        symbols: int32; one more than the last of the alphabet where a character is not in it.
        left: the number of symbols from each one to the end of its document, itself included; int32.
    """

    symbols: npt.NDArray[np.int32]
    left: npt.NDArray[np.int32]

    @classmethod
    def of(cls, code_points: npt.NDArray[np.uint32], lengths: Integers, alphabet: npt.NDArray[np.int32]) -> _Stream:
        ends = np.cumsum(lengths + 2)
        symbols = np.full(int(ends[-1]) if len(ends) else 0, _END, np.int32)
        symbols[ends - lengths - 2] = _BEGIN
        inside = np.ones(len(symbols), bool)
        inside[ends - 1] = inside[ends - lengths - 2] = False
        known = alphabet[code_points]
        symbols[inside] = np.where(known >= 0, known, int(alphabet.max()) + 1)
        left = np.repeat(ends.astype(np.int32), lengths + 2) - np.arange(len(symbols), dtype=np.int32)
        return cls(symbols, left)


class _Level(NamedTuple):
    """The different n-grams of one order, numbered in ascending order of (context, last symbol).

    Attributes:
        order: n.
        contexts: the number of each one's first n - 1 symbols among those of the order below, int32.
        keys: that number times the size of the alphabet, plus the last symbol; int64, ascending.
        counts: how often each stands in the text, int32.
        at_begin: whether each begins with the beginning of a document.
        numbers: which one begins at each place of the text, int32; -1 for none.
        suffixes: the number of each one's last n - 1 symbols among those of the order below, int32.
    """

    order: int
    contexts: npt.NDArray[np.int32]
    keys: Integers
    counts: npt.NDArray[np.int32]
    at_begin: npt.NDArray[np.bool_]
    numbers: npt.NDArray[np.int32]
    suffixes: npt.NDArray[np.int32]

    @classmethod
    def of_symbols(cls, text: _Stream, size: int) -> _Level:
        """The order 1, whose n-grams are all symbols; the beginning of a document is one that is never predicted."""
        counts = np.bincount(text.symbols, minlength=size).astype(np.int32)
        zeros = np.zeros(size, np.int32)
        at_begin = np.arange(size) == _BEGIN
        return cls(1, zeros, np.arange(size), counts, at_begin, text.symbols, zeros)

    def longer(self, text: _Stream, size: int) -> _Level:
        """The n-grams with a symbol more."""
        n = self.order + 1
        begins = np.flatnonzero(text.left >= n).astype(np.int32)
        # Sorting keys that carry their places is several times as fast as sorting places by their keys.
        bits = max(1, len(text.symbols)).bit_length()
        assert len(self.keys) * size << bits <= 1 << 64, "MAX_CHARACTERS and _MAX_SYMBOLS see to it"
        packed = np.empty(len(begins), np.uint64)
        for some in _blocks(len(begins)):
            packed[some] = self.numbers[begins[some]]
            packed[some] *= np.uint64(size)
            packed[some] += text.symbols[begins[some] + (n - 1)].astype(np.uint64)
            packed[some] <<= np.uint64(bits)
            packed[some] |= begins[some].astype(np.uint64)
        del begins
        packed.sort()
        numbers = np.full(len(text.symbols), -1, np.int32)
        places = np.empty(len(packed), np.int32)
        for some in _blocks(len(packed)):
            places[some] = packed[some] & np.uint64((1 << bits) - 1)
        packed >>= np.uint64(bits)
        is_first = np.ones(len(packed), bool)
        np.not_equal(packed[1:], packed[:-1], out=is_first[1:])
        numbers[places] = np.cumsum(is_first, dtype=np.int32) - 1
        first = np.flatnonzero(is_first)
        distinct = packed[first].astype(np.int64)
        del packed, is_first
        counts = np.diff(np.append(first, len(places))).astype(np.int32)
        contexts = (distinct // size).astype(np.int32)
        return _Level(n, contexts, distinct, counts, self.at_begin[contexts], numbers, self.numbers[places[first] + 1])

    def extensions(self, shorter: _Level) -> npt.NDArray[np.int32]:
        """How many different symbols stand before each n-gram of the order below; int32."""
        return np.bincount(self.suffixes, minlength=len(shorter.keys)).astype(np.int32)

    def find(self, contexts: npt.NDArray[Any], held_out: _Stream, size: int) -> Integers:
        """The n-gram that begins at each place of held-out text, or -1, given those of the order below."""
        begins = np.flatnonzero((held_out.left >= self.order) & (contexts >= 0))
        keys = contexts[begins].astype(np.int64) * size + held_out.symbols[begins + self.order - 1]
        places = np.searchsorted(self.keys, keys)
        places[places == len(self.keys)] = 0
        found = np.full(len(held_out.symbols), -1, np.int64)
        found[begins] = np.where(self.keys[places] == keys, places, -1) if len(self.keys) else -1
        return found

    def interpolate(
        self,
        counts: npt.NDArray[np.int32],
        contexts: Integers,
        ngrams: Integers,
        places: Integers,
        probability: npt.NDArray[np.float64],
    ) -> None:
        """Turn the probabilities of the order below into those of this one.

        Args:
            counts: a of each n-gram.
            contexts: the known contexts of the symbols to be predicted.
            ngrams: the context with the symbol, or -1 where it was never seen.
            places: of these symbols in `probability`, which is changed there.
        """
        if self.order == 1:
            counts = np.where(self.at_begin, 0, counts)
        discount = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
        number = int(self.contexts.max(initial=0)) + 1
        totals = np.bincount(self.contexts, counts, number)
        left = np.bincount(self.contexts, discount, number)
        # A context that ends a document, or stands where the text was cut, has nothing behind it.
        has = (contexts < number) & (totals[np.minimum(contexts, number - 1)] > 0)
        contexts, ngrams, places = contexts[has], ngrams[has], places[has]
        own = np.where(ngrams >= 0, (counts - discount)[ngrams], 0.0)
        probability[places] = (own + left[contexts] * probability[places]) / totals[contexts]


def _blocks(length: int) -> Iterator[slice]:
    """All places, some at a time, so that what is computed on the way takes little memory."""
    return (slice(begin, begin + _BLOCK) for begin in range(0, length, _BLOCK))


def discounts(counts: npt.NDArray[Any]) -> tuple[float, float, float]:
    """D1, D2 and D3 by how many n-grams have the counts 1 to 4; 0.5, 1 and 1.5 where the text is too small to tell."""
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].tolist()
    if not (n1 and n2 and n3):
        return 0.5, 1.0, 1.5
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if not all(0 < discount < number for number, discount in enumerate(found, start=1)):
        return 0.5, 1.0, 1.5
    assert all(map(math.isfinite, found))
    return found
