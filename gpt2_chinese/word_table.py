"""The words of many documents at once, compiled: what `WordSplitter` gives, as numbers.

Every word that THULAC cuts gets a number when it is first seen, so that a batch of documents becomes an array of
numbers, and the work on a word (folding, looking up, spelling) is done in Python once for each different word.
The tests hold this module to `WordSplitter` and `Tokenizer`, which say in Python what it does.
"""

from __future__ import annotations

from collections.abc import Sequence

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

# What stands in a sequence of word numbers besides words.
DOCUMENT_END = np.int32(-1)
LINE_BREAK_WORD = np.int32(-2)

MAX_WORDS = 2_000_000  # the table is begun anew when it has more, so that memory stays flat


class WordTable:
    """Numbers the words of documents. A word is a pair: THULAC's word as it stands in the cleaned text, and whether
    it touches a spaced character before it.

    Attributes:
        words: the pairs in the order of their numbers.
        generation: raised each time the table forgets its words.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._classes = np.full(0x110000, UNSEEN, dtype=np.uint8)
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self.words: list[tuple[str, bool]] = []
        self._slots = np.full(1 << 16, -1, dtype=np.int32)
        self._hashes = np.zeros(1 << 15, dtype=np.uint64)
        self._starts: np.ndarray = np.zeros((1 << 15) + 1, dtype=np.int64)
        self._touching = np.zeros(1 << 15, dtype=np.bool_)
        self._arena = np.zeros(1 << 18, dtype=np.uint32)

    def number(self, documents: Sequence[str]) -> np.ndarray:
        """Give the number of each word of the documents in its order, int32.

        `DOCUMENT_END` stands behind each document, and `LINE_BREAK_WORD` between its lines.

        The table forgets all words before it starts on a batch if there are more than `MAX_WORDS`; numbers of earlier
        batches are void then, and `generation` is raised.
        """
        if len(self.words) > MAX_WORDS:
            self.generation += 1
            self._clear()
        text = "\n".join(documents) + "\n"
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ends = np.cumsum(np.fromiter((len(document) + 1 for document in documents), np.int64, len(documents))) - 1
        self._classify(code_points)

        # 1) Clean, and cut into THULAC's words; every document's end stays a line break.
        cleaned = np.empty(len(code_points), dtype=np.uint32)
        length = clean_documents(code_points, ends, self._classes, cleaned)
        text_cut, word_ends = self._segmenter.segment(cleaned[:length])
        assert len(text_cut) == length, "white space is folded already"

        # 2) Number the words; the table grows when it is full, and the loop goes on where it was.
        sequence = np.empty(len(word_ends), dtype=np.int32)
        first_new = count = len(self.words)
        done = filled = 0
        document = 0
        touching = False
        while True:
            done, filled, document, touching, count = number_words(
                text_cut, word_ends, ends, self._classes, self._slots, self._hashes, self._starts, self._touching,
                self._arena, sequence, done, filled, document, touching, count,
            )  # fmt: skip
            if done == len(word_ends):
                break
            self._grow(count)
        self._read_new_words(first_new, count)
        return sequence[:filled]

    def _classify(self, code_points: np.ndarray) -> None:
        unseen = np.unique(code_points[self._classes[code_points] == UNSEEN])
        for code in unseen.tolist():
            character = chr(code)
            kept = clean_character(character)
            if not kept:
                class_ = DROPPED
            elif kept == " ":
                class_ = SPACE
            elif character.isspace():
                class_ = SPACE
            elif not (folded := fold(character)):
                class_ = VANISHES
            else:
                class_ = SPACED if is_spaced(folded[-1]) else WIDE
            self._classes[code] = class_

    def _grow(self, count: int) -> None:
        if 4 * count > len(self._slots):
            self._slots = np.full(2 * len(self._slots), -1, dtype=np.int32)
            fill_slots(self._slots, self._hashes, count)
        self._hashes = _doubled(self._hashes)
        self._touching = _doubled(self._touching)
        self._starts = np.concatenate((self._starts, np.zeros(len(self._starts) - 1, dtype=np.int64)))
        self._arena = _doubled(self._arena)

    def _read_new_words(self, first: int, count: int) -> None:
        starts = self._starts[first : count + 1].tolist()
        text = self._arena[starts[0] : starts[-1]].tobytes().decode("utf-32-le", "surrogatepass")
        flags = self._touching[first:count].tolist()
        base = starts[0]
        self.words += [
            (text[start - base : end - base], flag)
            for start, end, flag in zip(starts[:-1], starts[1:], flags, strict=True)
        ]


def _doubled(array: np.ndarray) -> np.ndarray:
    return np.concatenate((array, np.zeros_like(array)))


@njit(cache=True)
def clean_documents(code_points: np.ndarray, ends: np.ndarray, classes: np.ndarray, cleaned: np.ndarray) -> int:
    """Drop and fold characters as `clean` and `str.split` do line by line; give the length of what is left."""
    length = 0
    document = 0
    pending = False  # a space that is written when something else of the line follows
    blank = True  # nothing of the line is written yet
    for index in range(len(code_points)):
        code = code_points[index]
        if code == LINE_BREAK_CODE:
            cleaned[length] = code
            length += 1
            if document < len(ends) and index == ends[document]:
                ends[document] = length - 1
                document += 1
            pending = False
            blank = True
            continue
        class_ = classes[code]
        if class_ == DROPPED:
            continue
        if class_ == SPACE:
            pending = not blank
            continue
        if pending:
            cleaned[length] = SPACE_CODE
            length += 1
            pending = False
        cleaned[length] = code
        length += 1
        blank = False
    return length


@njit(cache=True)
def number_words(
    text: np.ndarray,
    word_ends: np.ndarray,
    document_ends: np.ndarray,
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
    """Number words from word `done` on until the end or until the table is full."""
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
def format_ids(
    sequence: np.ndarray,
    id_starts: np.ndarray,
    ids: np.ndarray,
    decimal: np.ndarray,
    decimal_starts: np.ndarray,
    first_id: int,
    last_id: int,
    line_break_id: int,
    output: np.ndarray,
) -> tuple[int, int, int, int]:
    """Write documents of word numbers as ids in decimal, each `first_id` ids `last_id`, a space behind every id.

    A document without any id is left out.

    Args:
        id_starts, ids: word n has ids[id_starts[n] : id_starts[n + 1]].
        decimal, decimal_starts: the digits and the space of every id, likewise.
        output: uint8, as long as the text can become.

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
        length = append_id(first_id, decimal, decimal_starts, output, length)
        inner = 0
        for position in range(begin, index):
            number = sequence[position]
            if number == LINE_BREAK_WORD:
                length = append_id(line_break_id, decimal, decimal_starts, output, length)
                inner += 1
                continue
            for place in range(id_starts[number], id_starts[number + 1]):
                length = append_id(ids[place], decimal, decimal_starts, output, length)
            inner += id_starts[number + 1] - id_starts[number]
        begin = index + 1
        if inner == 0:
            length = document_start
            empty += 1
            continue
        length = append_id(last_id, decimal, decimal_starts, output, length)
        total += inner + 2
        documents += 1
    return length, total, documents, empty


@njit(cache=True)
def append_id(id_: int, decimal: np.ndarray, decimal_starts: np.ndarray, output: np.ndarray, length: int) -> int:
    for place in range(decimal_starts[id_], decimal_starts[id_ + 1]):
        output[length] = decimal[place]
        length += 1
    return length
