"""The words of many documents at once, compiled: what `WordSplitter` gives, as numbers.

Every word that THULAC cuts gets a number when it is first seen, so that a batch of documents becomes an array of
numbers, and the work on a word (folding, looking up, spelling) is done in Python once for each different word.
The tests hold this module to `WordSplitter` and `Tokenizer`, which say in Python what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from gpt2_chinese.segmenter import Segmenter
from gpt2_chinese.tokenizer import clean_character, fold, is_spaced

# What a character is for the compiled code.
WIDE, SPACED, VANISHES, SPACE, DROPPED, UNSEEN = (
    np.uint8(0),
    np.uint8(1),
    np.uint8(2),
    np.uint8(3),
    np.uint8(4),
    np.uint8(255),
)
LINE_BREAK_CODE = np.uint32(10)
SPACE_CODE = np.uint32(32)

# The block of CJK Unified Ideographs: no case, no accents, no spaces between.
FIRST_IDEOGRAPH = np.uint32(0x4E00)
LAST_IDEOGRAPH = np.uint32(0x9FFF)

# What stands in a sequence of word numbers besides words.
DOCUMENT_END = np.int32(-1)
LINE_BREAK_WORD = np.int32(-2)

NO_ENDS: np.ndarray = np.zeros(0, dtype=np.int64)
NO_FLAGS: np.ndarray = np.zeros(0, dtype=np.bool_)
NO_CLASSES: np.ndarray = np.full(0x110000, WIDE, dtype=np.uint8)

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
        self.hashes = np.zeros(1 << 15, dtype=np.uint64)
        self.starts: np.ndarray = np.zeros((1 << 15) + 1, dtype=np.int64)
        self.touching = np.zeros(1 << 15, dtype=np.bool_)
        self.arena = np.zeros(1 << 18, dtype=np.uint32)

    @classmethod
    def of(cls, words: Sequence[str]) -> WordStore:
        """A store of different words that touch nothing; their numbers are their places."""
        store = cls()
        text = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        store.number(text, ends, NO_CLASSES, touching=np.zeros(len(words), dtype=np.bool_))
        assert store.count == len(words), "the words are different"
        return store

    def _grow(self) -> None:
        """Make room where the compiled code has found none."""
        if 4 * self.count > len(self.slots):
            self.slots = np.full(2 * len(self.slots), -1, dtype=np.int32)
            fill_slots(self.slots, self.hashes, self.count)
        self.hashes = _doubled(self.hashes)
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
        """Give the numbers of the words of a text, which end at `ends`; see `number_words`."""
        sequence = np.empty(len(ends), dtype=np.int32)
        done = filled = document = 0
        touches = False
        while True:
            done, filled, document, touches, self.count = number_words(
                text, ends, document_ends, touching, classes, self.slots, self.hashes, self.starts, self.touching,
                self.arena, sequence, done, filled, document, touches, self.count,
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
    """Look up the words from `first` on that are of ideographs alone; see `spell_ideographs`.

    `longest` is the number of characters of the vocabulary's longest word.
    """
    count = words.count - first
    ids: np.ndarray = np.empty(words.starts[words.count] - words.starts[first], dtype=np.int32)
    starts, ends = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    filled = spell_ideographs(
        words.arena, words.starts, first, words.count, longest, vocabulary.slots, vocabulary.hashes,
        vocabulary.starts, vocabulary.arena, ids, starts, ends,
    )  # fmt: skip
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


class WordTable:
    """Numbers the words of documents. A word is THULAC's as it stands in the cleaned text; see `WordStore`.

    Attributes:
        words: numbered in the order in which they are first seen.
        generation: raised each time the table forgets its words.
        dropped_characters: those that cleaning has left out so far.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._classes = np.full(0x110000, UNSEEN, dtype=np.uint8)
        self.words = WordStore()
        self.generation = 0
        self.dropped_characters = 0

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

        # 1) Clean, and cut into THULAC's words; every document's end stays a line break.
        cleaned = np.empty(len(code_points), dtype=np.uint32)
        cleaned_ends = np.empty_like(ends)
        while True:
            length, dropped = clean_documents(code_points, ends, self._classes, cleaned, cleaned_ends)
            if length >= 0:
                break
            self._classify(code_points)
        self.dropped_characters += dropped
        text_cut, word_ends = self._segmenter.segment(cleaned[:length])
        assert len(text_cut) == length, "white space is folded already"

        # 2) Number the words.
        return self.words.number(text_cut, word_ends, self._classes, document_ends=cleaned_ends)

    def count(self, sequence: np.ndarray) -> CountedWords:
        """Count the words of a sequence that `number` has just given."""
        words = self.words
        counts = np.zeros(words.count, dtype=np.int64)
        order: np.ndarray = np.empty(words.count, dtype=np.int32)
        order = order[: count_sequence(sequence, counts, order)]
        ends = np.cumsum(words.starts[order + 1] - words.starts[order])
        text = np.empty(ends[-1] if len(ends) else 0, dtype=np.uint32)
        copy_words(order, words.starts, words.arena, text)
        return CountedWords(text, ends, words.touching[order], counts[order])

    def _classify(self, code_points: np.ndarray) -> None:
        """Learn what the characters of a text are."""
        there = np.zeros(len(self._classes), dtype=np.bool_)
        there[code_points] = True
        for code in np.flatnonzero(there & (self._classes == UNSEEN)).tolist():
            character = chr(code)
            kept = clean_character(character)
            if not kept:
                class_ = DROPPED
            elif kept == " " or character.isspace():
                class_ = SPACE
            elif not (folded := fold(character)):
                class_ = VANISHES
            else:
                class_ = SPACED if is_spaced(folded[-1]) else WIDE
            self._classes[code] = class_


def _doubled(array: np.ndarray) -> np.ndarray:
    return np.concatenate((array, np.zeros_like(array)))


@njit(cache=True)
def clean_documents(
    code_points: np.ndarray, ends: np.ndarray, classes: np.ndarray, cleaned: np.ndarray, cleaned_ends: np.ndarray
) -> tuple[int, int]:
    """Drop and fold characters as `clean` and `str.split` do line by line.

    Returns:
        The length of what is left and the number of characters dropped; -1 for the length if a character's class is
        not known.
    """
    length = 0
    dropped = 0
    document = 0
    pending = False  # a space that is written when something else of the line follows
    blank = True  # nothing of the line is written yet
    for index in range(len(code_points)):
        code = code_points[index]
        if code == LINE_BREAK_CODE:
            cleaned[length] = code
            length += 1
            if document < len(ends) and index == ends[document]:
                cleaned_ends[document] = length - 1
                document += 1
            pending = False
            blank = True
            continue
        class_ = classes[code]
        if class_ == WIDE or class_ == SPACED or class_ == VANISHES:
            if pending:
                cleaned[length] = SPACE_CODE
                length += 1
                pending = False
            cleaned[length] = code
            length += 1
            blank = False
        elif class_ == SPACE:
            pending = not blank
        elif class_ == DROPPED:
            dropped += 1
        else:
            return -1, 0
    return length, dropped


@njit(cache=True)
def number_words(
    text: np.ndarray,
    word_ends: np.ndarray,
    document_ends: np.ndarray,
    given_touching: np.ndarray,
    classes: np.ndarray,
    slots: np.ndarray,
    hashes: np.ndarray,
    starts: np.ndarray,
    touching_of: np.ndarray,
    arena: np.ndarray,
    sequence: np.ndarray,
    done: int,
    filled: int,
    document: int,
    touching: bool,
    count: int,
) -> tuple[int, int, int, bool, int]:
    """Number words from word `done` on until the end or until the table is full.

    Whether a word touches a spaced character before it is in `given_touching`, or found here where that is empty. (One
    long function: a call for each word would count references to every array.)
    """
    start = word_ends[done - 1] if done else 0
    mask = np.uint64(len(slots) - 1)
    while done < len(word_ends):
        end = word_ends[done]
        if end - start == 1:
            code = text[start]
            if code == LINE_BREAK_CODE:
                if document < len(document_ends) and start == document_ends[document]:
                    document += 1
                    sequence[filled] = DOCUMENT_END
                else:
                    sequence[filled] = LINE_BREAK_WORD
                filled += 1
                touching = False
                start = end
                done += 1
                continue
            if code == SPACE_CODE:
                touching = False
                start = end
                done += 1
                continue
        if count + 1 >= len(hashes) or 2 * (count + 1) > len(slots) or starts[count] + end - start > len(arena):
            break
        if len(given_touching):
            touching = given_touching[done]

        # FNV-1a over the code points, with a last mix so that the low bits depend on all of them.
        value = np.uint64(14695981039346656037) ^ np.uint64(touching)
        for index in range(start, end):
            value = (value ^ np.uint64(text[index])) * np.uint64(1099511628211)
        value ^= value >> np.uint64(29)
        slot = value & mask
        while True:
            number = slots[slot]
            if number < 0:
                number = count
                slots[slot] = number
                hashes[number] = value
                touching_of[number] = touching
                offset = starts[number]
                for index in range(start, end):
                    arena[offset + index - start] = text[index]
                starts[number + 1] = offset + end - start
                count += 1
                break
            if hashes[number] == value and touching_of[number] == touching:
                offset = starts[number]
                if starts[number + 1] - offset == end - start:
                    same = True
                    for index in range(start, end):
                        if arena[offset + index - start] != text[index]:
                            same = False
                            break
                    if same:
                        break
            slot = (slot + np.uint64(1)) & mask
        sequence[filled] = number
        filled += 1

        # Whether the next word touches a spaced character: the last character of this one that folding leaves.
        index = end - 1
        while index >= start:
            class_ = classes[text[index]]
            if class_ == VANISHES:
                index -= 1
                continue
            touching = class_ == SPACED
            break
        start = end
        done += 1
    return done, filled, document, touching, count


@njit(cache=True)
def fill_slots(slots: np.ndarray, hashes: np.ndarray, count: int) -> None:
    """Put the words that a table has into its new, larger slots."""
    mask = np.uint64(len(slots) - 1)
    for number in range(count):
        slot = hashes[number] & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = number


@njit(cache=True)
def count_sequence(sequence: np.ndarray, counts: np.ndarray, order: np.ndarray) -> int:
    """Count word numbers into `counts` (zero before); give how many different ones, in `order` as they first come."""
    different = 0
    for number in sequence:
        if number >= 0:
            if counts[number] == 0:
                order[different] = number
                different += 1
            counts[number] += 1
    return different


@njit(cache=True)
def copy_words(order: np.ndarray, starts: np.ndarray, arena: np.ndarray, text: np.ndarray) -> None:
    """Write the text of the words with these numbers one behind the other."""
    length = 0
    for number in order:
        for place in range(starts[number], starts[number + 1]):
            text[length] = arena[place]
            length += 1


@njit(cache=True)
def find_word(
    text: np.ndarray,
    start: int,
    end: int,
    slots: np.ndarray,
    hashes: np.ndarray,
    starts: np.ndarray,
    arena: np.ndarray,
) -> int:
    """The number of the word text[start:end] in a store of words that touch nothing, or -1."""
    value = np.uint64(14695981039346656037)
    for index in range(start, end):
        value = (value ^ np.uint64(text[index])) * np.uint64(1099511628211)
    value ^= value >> np.uint64(29)
    mask = np.uint64(len(slots) - 1)
    slot = value & mask
    while slots[slot] >= 0:
        number = slots[slot]
        offset = starts[number]
        if hashes[number] == value and starts[number + 1] - offset == end - start:
            same = True
            for index in range(start, end):
                if arena[offset + index - start] != text[index]:
                    same = False
                    break
            if same:
                return int(number)
        slot = (slot + np.uint64(1)) & mask
    return -1


@njit(cache=True)
def spell_ideographs(
    text: np.ndarray,
    word_starts: np.ndarray,
    first: int,
    count: int,
    longest: int,
    slots: np.ndarray,
    hashes: np.ndarray,
    starts: np.ndarray,
    arena: np.ndarray,
    ids: np.ndarray,
    id_starts: np.ndarray,
    id_ends: np.ndarray,
) -> int:
    """Look up the words from `first` to `count` - 1 that are of CJK Unified Ideographs alone, as `Tokenizer` does.

    A word that is not in the vocabulary becomes its longest parts from the left. Of other words, and of those with a
    character that the vocabulary has not, `id_ends` is set to -1.

    Args:
        slots, hashes, starts, arena: the vocabulary's `WordStore`, where a number is an id.
        ids: as long as the words together.

    Returns:
        How many ids were written.
    """
    filled = 0
    for number in range(first, count):
        begin = word_starts[number]
        end = word_starts[number + 1]
        id_starts[number - first] = filled
        id_ends[number - first] = -1
        plain = True
        for index in range(begin, end):
            if text[index] < FIRST_IDEOGRAPH or text[index] > LAST_IDEOGRAPH:
                plain = False
                break
        if not plain:
            continue
        position = begin
        written = filled
        while position < end:
            stop = end if position == begin else min(end, position + longest)
            id_ = -1
            while stop > position:
                id_ = find_word(text, position, stop, slots, hashes, starts, arena)
                if id_ >= 0:
                    break
                stop -= 1
            if id_ < 0:
                break
            ids[written] = id_
            written += 1
            position = stop
        if position == end:
            filled = written
            id_ends[number - first] = filled
    return filled


@njit(cache=True)
def format_ids(
    sequence: np.ndarray,
    id_starts: np.ndarray,
    id_ends: np.ndarray,
    ids: np.ndarray,
    decimal: np.ndarray,
    decimal_lengths: np.ndarray,
    first_id: int,
    last_id: int,
    line_break_id: int,
    output: np.ndarray,
) -> tuple[int, int, int, int]:
    """Write documents of word numbers as ids in decimal, each `first_id` ids `last_id`, a space behind every id.

    A document without any id is left out.

    Args:
        id_starts, id_ends, ids: word n has ids[id_starts[n] : id_ends[n]].
        decimal, decimal_lengths: the digits and the space of every id, in eight bytes, and how many they are.
        output: uint8, as long as the text can become and eight bytes more.

    Returns:
        The length of the text, its number of ids, its documents, and the documents left out.
    """
    length = 0
    total = 0
    documents = 0
    empty = 0
    begin = 0
    for index in range(len(sequence)):
        if sequence[index] != DOCUMENT_END:
            continue
        if begin == index:
            empty += 1
            begin = index + 1
            continue
        document_start = length
        length = append_id(first_id, decimal, decimal_lengths, output, length)
        inner = 0
        for position in range(begin, index):
            number = sequence[position]
            if number == LINE_BREAK_WORD:
                length = append_id(line_break_id, decimal, decimal_lengths, output, length)
                inner += 1
                continue
            for place in range(id_starts[number], id_ends[number]):
                length = append_id(ids[place], decimal, decimal_lengths, output, length)
            inner += id_ends[number] - id_starts[number]
        begin = index + 1
        if inner == 0:
            length = document_start
            empty += 1
            continue
        length = append_id(last_id, decimal, decimal_lengths, output, length)
        total += inner + 2
        documents += 1
    return length, total, documents, empty


@njit(cache=True)
def append_id(id_: int, decimal: np.ndarray, lengths: np.ndarray, output: np.ndarray, length: int) -> int:
    """Write an id's eight bytes, of which those behind its digits and space are written over by the next."""
    # All are read before the first is written, so that the compiler makes one load and one store of them.
    a, b, c, d = decimal[id_, 0], decimal[id_, 1], decimal[id_, 2], decimal[id_, 3]
    e, f, g, h = decimal[id_, 4], decimal[id_, 5], decimal[id_, 6], decimal[id_, 7]
    output[length], output[length + 1], output[length + 2], output[length + 3] = a, b, c, d
    output[length + 4], output[length + 5], output[length + 6], output[length + 7] = e, f, g, h
    return length + lengths[id_]
