"""The words of many documents at once, compiled: what a tokenizer's `words` gives, as numbers.

Every word that the segmenter cuts gets a number when it is first seen, so that a batch of documents becomes an array of
numbers, and the work on a word (folding, looking up, spelling) is done in Python once for each different word.
The tests hold this module to `WordTokenizer` and `CharTokenizer`, which say in Python what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from gpt2_chinese.compiled import load_function
from gpt2_chinese.text.word_tokenizer import Rules, clean_bert_character

# What a character is for the compiled code.
WIDE, SPACED, VANISHES, SPACE, DROPPED, UNSEEN = (
    np.uint8(0),
    np.uint8(1),
    np.uint8(2),
    np.uint8(3),
    np.uint8(4),
    np.uint8(255),
)

# What the compiled code can do, the types of the arrays that each takes, and the most arrays and numbers there are.
CLEAN, NUMBER, FILL_SLOTS, COUNT, COPY_WORDS, SPELL, FORMAT = range(7)
ARRAYS = {
    CLEAN: "u4 i8 u1 u4 i8 i8 i8",
    NUMBER: "u4 i8 i8 u1 u1 i4 u8 i8 u1 u4 i4",
    FILL_SLOTS: "i4 u8",
    COUNT: "i4 i8 i4",
    COPY_WORDS: "i4 i8 u4 u4",
    SPELL: "u4 i8 i4 u8 i8 u4 i4 i8 i8",
    FORMAT: "i4 i8 i8 i4 u1 u1 u1",
}
MAX_TABLES, MAX_VALUES = 11, 5

# What stands in a sequence of word numbers besides words.
DOCUMENT_END = np.int32(-1)
LINE_BREAK_WORD = np.int32(-2)

NO_ENDS: np.ndarray = np.zeros(0, dtype=np.int64)
NO_FLAGS: np.ndarray = np.zeros(0, dtype=np.uint8)
NO_CLASSES: np.ndarray = np.full(0x110000, WIDE, dtype=np.uint8)

EXAMPLES = 3  # of each kind of change
MAX_WORDS = 2_000_000  # the table is begun anew when it has more, so that memory stays flat


@dataclass(frozen=True)
class CountedWords:
    """Different words of a text in the order of first appearance, and how often each stands there.

    Attributes:
        text: the code points of all words, uint32.
        ends: where each word ends in the text, int64.
        touching: whether each touches a spaced character before it, bool.
        counts: int64.
    """

    text: np.ndarray
    ends: np.ndarray
    touching: np.ndarray
    counts: np.ndarray


class WordStore:
    """Different words, numbered from 0 in the order in which they came: a hash table that compiled code fills.

    A word is a pair: its text, and whether it touches a spaced character before it.
    """

    def __init__(self) -> None:
        self.count = 0
        self.slots = np.full(1 << 16, -1, dtype=np.int32)
        self.keys = np.zeros(1 << 15, dtype=np.uint64)
        self.starts: np.ndarray = np.zeros((1 << 15) + 1, dtype=np.int64)
        self.touching = np.zeros(1 << 15, dtype=np.uint8)
        self.arena = np.zeros(1 << 18, dtype=np.uint32)

    @classmethod
    def of(cls, words: Sequence[str]) -> WordStore:
        """A store of different words that touch nothing; their numbers are their places."""
        store = cls()
        text = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        store.number(text, ends, NO_CLASSES, touching=np.zeros(len(words), dtype=np.uint8))
        assert store.count == len(words), "the words are different"
        return store

    def _grow(self) -> None:
        """Make room where the compiled code has found none."""
        if 4 * self.count > len(self.slots):
            self.slots = np.full(2 * len(self.slots), -1, dtype=np.int32)
            run(FILL_SLOTS, [self.count], self.slots, self.keys)
        self.keys = _doubled(self.keys)
        self.touching = _doubled(self.touching)
        self.starts = np.concatenate((self.starts, np.zeros(len(self.starts) - 1, dtype=np.int64)))
        self.arena = _doubled(self.arena)

    def number(
        self,
        text: np.ndarray,
        ends: np.ndarray,
        classes: np.ndarray,
        *,
        document_ends: np.ndarray = NO_ENDS,
        touching: np.ndarray = NO_FLAGS,
    ) -> np.ndarray:
        """Give the numbers of the words of a text, which end at `ends`; see number_words in the kernel."""
        sequence = np.empty(len(ends), dtype=np.int32)
        done = filled = document = touches = 0
        while True:
            done, filled, document, touches, self.count = run(
                NUMBER, [done, filled, document, touches, self.count], text, ends, document_ends, touching, classes,
                self.slots, self.keys, self.starts, self.touching, self.arena, sequence,
            )  # fmt: skip
            if done == len(ends):
                return sequence[:filled]
            self._grow()

    def read_one(self, number: int) -> tuple[str, bool]:
        """Give the word with a number."""
        text = self.arena[self.starts[number] : self.starts[number + 1]].tobytes().decode("utf-32-le", "surrogatepass")
        return text, bool(self.touching[number])

    def read(self, first: int) -> list[tuple[str, bool]]:
        """Give the words from number `first` on."""
        starts = self.starts[first : self.count + 1].tolist()
        base = starts[0]
        text = self.arena[base : starts[-1]].tobytes().decode("utf-32-le", "surrogatepass")
        flags = self.touching[first : self.count].tolist()
        return [
            (text[start - base : end - base], flag)
            for start, end, flag in zip(starts[:-1], starts[1:], flags, strict=True)
        ]


@dataclass(frozen=True)
class SpelledWords:
    """The ids of words: those of word n are ids[starts[n] : ends[n]], and unknown where ends[n] is -1."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def spell_plain_words(vocabulary: WordStore, longest: int, words: WordStore, first: int) -> SpelledWords:
    """Look up the words from `first` on that are of ideographs alone; see spell_ideographs in the kernel.

    `longest` is the number of characters of the vocabulary's longest word.
    """
    count = words.count - first
    ids: np.ndarray = np.empty(words.starts[words.count] - words.starts[first], dtype=np.int32)
    starts, ends = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    filled = run(
        SPELL, [first, words.count, longest], words.arena, words.starts, vocabulary.slots, vocabulary.keys,
        vocabulary.starts, vocabulary.arena, ids, starts, ends,
    )[0]  # fmt: skip
    return SpelledWords(ids[:filled], starts, ends)


class WordCounter:
    """Adds up counts of words; they stay in the order of first appearance."""

    def __init__(self) -> None:
        self._store = WordStore()
        self._totals = np.zeros(1 << 15, dtype=np.int64)

    def add(self, words: CountedWords) -> None:
        numbers = self._store.number(words.text, words.ends, NO_CLASSES, touching=words.touching)
        while len(self._totals) < self._store.count:
            self._totals = _doubled(self._totals)
        self._totals[numbers] += words.counts  # each word is there once

    def items(self) -> Iterator[tuple[tuple[str, bool], int]]:
        return zip(self._store.read(0), self._totals[: self._store.count].tolist(), strict=True)


@dataclass(frozen=True)
class Cleaning:
    """What cleaning has changed in some documents.

    Attributes:
        dropped: control characters that were left out.
        spaces: characters of white space that did not stay as they are.
        dropped_examples, spaces_examples: the first of them, with the text around.
    """

    dropped: int = 0
    spaces: int = 0
    dropped_examples: Sequence[str] = ()
    spaces_examples: Sequence[str] = ()


def _surroundings(text: str, place: int) -> str:
    """Some characters of the line around a place, quoted and escaped as Python does."""
    begin = max(text.rfind("\n", 0, place) + 1, place - 8)
    end = text.find("\n", place)
    return repr(text[begin : min(end, place + 9)])


class Segments(Protocol):
    """What cuts cleaned text into words: `segmenter.Segmenter` or `char_tokenizer.CharSegmenter`."""

    def segment(self, code_points: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


def class_by_rules(character: str, rules: Rules) -> np.uint8:
    """What a character is for words, as their rules have it."""
    kept = rules.clean_character(character)
    if not kept:
        return DROPPED
    if kept == " " or character.isspace():
        return SPACE
    if not (folded := rules.fold(character)):
        return VANISHES
    return SPACED if rules.is_spaced(folded[-1]) else WIDE


def class_by_bert(character: str) -> np.uint8:
    """What a character is for WordPiece, which knows no spaces between words."""
    kept = clean_bert_character(character)
    if not kept:
        return DROPPED
    return SPACE if kept == " " else WIDE


class WordTable:
    """Numbers the words of documents. A word is the segmenter's as it stands in the cleaned text; see `WordStore`.

    Args:
        segmenter: cuts the cleaned text.
        class_of: what a character is, WIDE, SPACED, VANISHES, SPACE or DROPPED.

    Attributes:
        words: numbered in the order in which they are first seen.
        generation: raised each time the table forgets its words.
        cleaning: what cleaning has changed in the last batch.
    """

    def __init__(self, segmenter: Segments, class_of: Callable[[str], np.uint8]) -> None:
        self._segmenter = segmenter
        self._class_of = class_of
        self._classes = np.full(0x110000, UNSEEN, dtype=np.uint8)
        self.words = WordStore()
        self.generation = 0
        self.cleaning = Cleaning()

    def number(self, documents: Sequence[str]) -> np.ndarray:
        """Give the number of each word of the documents in its order, int32.

        `DOCUMENT_END` stands behind each document, and `LINE_BREAK_WORD` between its lines.

        The table forgets all words before it starts on a batch if there are more than `MAX_WORDS`; numbers of earlier
        batches are void then, and `generation` is raised.
        """
        if self.words.count > MAX_WORDS:
            self.generation += 1
            self.words = WordStore()
        text = "\n".join(documents) + "\n"
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ends = np.cumsum(np.fromiter(map(len, documents), np.int64, len(documents)) + 1) - 1

        # 1) Clean, and cut into words; every document's end stays a line break.
        cleaned = np.empty(len(code_points), dtype=np.uint32)
        cleaned_ends = np.empty_like(ends)
        while True:
            dropped_at, spaces_at = (np.full(EXAMPLES, -1, dtype=np.int64) for _ in range(2))
            length, dropped, spaces, *_ = run(
                CLEAN, [], code_points, ends, self._classes, cleaned, cleaned_ends, dropped_at, spaces_at
            )
            if length >= 0:
                break
            self._classify(code_points)
        self.cleaning = Cleaning(
            dropped,
            spaces,
            [
                f"U+{ord(text[place]):04X} in {_surroundings(text, place)}"
                for place in dropped_at.tolist()
                if place >= 0
            ],
            [_surroundings(text, place) for place in spaces_at.tolist() if place >= 0],
        )
        text_cut, word_ends = self._segmenter.segment(cleaned[:length])
        assert len(text_cut) == length, "white space is folded already"

        # 2) Number the words.
        return self.words.number(text_cut, word_ends.astype(np.int64), self._classes, document_ends=cleaned_ends)

    def count(self, sequence: np.ndarray) -> CountedWords:
        """Count the words of a sequence that `number` has just given."""
        words = self.words
        order, counts = self.occurrences(sequence)
        ends = np.cumsum(words.starts[order + 1] - words.starts[order])
        text = np.empty(ends[-1] if len(ends) else 0, dtype=np.uint32)
        run(COPY_WORDS, [], order, words.starts, words.arena, text)
        return CountedWords(text, ends, words.touching[order], counts[order])

    def occurrences(self, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count the word numbers of a sequence.

        Returns:
            The numbers that stand there, int32, as they first come; and how often each number of the table does, int64.
        """
        counts = np.zeros(self.words.count, dtype=np.int64)
        order: np.ndarray = np.empty(self.words.count, dtype=np.int32)
        return order[: run(COUNT, [], sequence, counts, order)[0]], counts

    def _classify(self, code_points: np.ndarray) -> None:
        """Learn what the characters of a text are."""
        unseen = code_points[self._classes[code_points] == UNSEEN]
        for code in set(unseen.tolist()):
            self._classes[code] = self._class_of(chr(code))


def _doubled(array: np.ndarray) -> np.ndarray:
    return np.concatenate((array, np.zeros_like(array)))


def with_room(array: np.ndarray, size: int) -> np.ndarray:
    """The array if its last axis is at least so long, or one that is twice as long or more and begins with it."""
    length = array.shape[-1]
    if length >= size:
        return array
    larger = np.zeros((*array.shape[:-1], max(size, 2 * length)), dtype=array.dtype)
    larger[..., :length] = array
    return larger


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., None]:
    kernel = Path(__file__).with_name("word_table_kernel.py")
    sources = [Path(__file__), kernel, kernel.with_name("segmenter_kernel.py")]
    return load_function("gpt2_chinese.text.word_table_kernel", sources, arguments=3)


def run(operation: int, values: Sequence[int], *arrays: np.ndarray) -> list[int]:
    """Run compiled code: see the function of that name in the kernel; gives the numbers that it gives."""
    assert [f"{array.dtype.kind}{array.dtype.itemsize}" for array in arrays] == ARRAYS[operation].split()
    assert all(array.flags.c_contiguous for array in arrays)
    numbers = np.zeros(MAX_VALUES, dtype=np.int64)
    numbers[: len(values)] = values
    tables = np.array([(array.ctypes.data, array.size) for array in arrays], dtype=np.int64)
    _compiled()(operation, numbers.ctypes.data, tables.ctypes.data)
    return list(numbers.tolist())
