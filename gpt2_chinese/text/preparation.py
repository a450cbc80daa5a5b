"""The work of stages 2 and 3 on one batch of documents, as functions that worker processes run.

What a task returns depends on the task alone, so the stages' outputs do not depend on how many workers there are or
on which machine they run. A worker keeps what it has learned about words for its next task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from gpt2_chinese.text.segmenter import Segmenter
from gpt2_chinese.text.tokenizer import LINE_BREAK, Tokenizer, dropped_characters, fold_word
from gpt2_chinese.text.vocabulary import CLS_ID, MASK_ID, SEP_ID, UNK_ID
from gpt2_chinese.text.word_table import (
    DOCUMENT_END,
    FORMAT,
    LINE_BREAK_WORD,
    CountedWords,
    WordCounter,
    WordStore,
    WordTable,
    run,
    spell_plain_words,
)

BATCH_CHARACTERS = 1 << 20
ID_BYTES = 8  # digits and a space: vocabularies are smaller than ten million


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Cut documents into batches of about a million characters."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def shared_segmenter() -> Segmenter:
    """One segmenter a process; forked workers use their parent's."""
    return Segmenter()


@lru_cache(maxsize=1)
def _shared_table() -> WordTable:
    return WordTable(shared_segmenter())


def count_batch(documents: list[str]) -> CountedWords:
    """Count the words that the tokenizer will look up, before they are folded."""
    table = _shared_table()
    return table.count(table.number(documents))


def count_batch_of_reference(documents: list[str]) -> dict[str, int]:
    """Count THULAC's words of the documents as they are."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(shared_segmenter().cut(document))
    del counts[LINE_BREAK]
    return counts


def fold_counts(batches: Iterable[CountedWords]) -> dict[str, int]:
    """Add up counts of `count_batch` as those of the folded words, in the order of first appearance."""
    counter = WordCounter()
    for batch in batches:
        counter.add(batch)
    folded: dict[str, int] = {}
    for (word, touching), count in counter.items():
        for part in fold_word(word, touching)[0]:
            folded[part] = folded.get(part, 0) + count
    return folded


@dataclass(frozen=True)
class Tokenizing:
    """How documents become ids; equal ones share a worker's tables."""

    vocabulary: tuple[str, ...]
    compat: bool
    min_length: int


@dataclass
class PieceReport:
    """What became of documents; reports add up."""

    documents: int = 0
    too_short: int = 0
    empty: int = 0
    tokens: int = 0
    words: int = 0
    spelled_words: int = 0
    unknown_tokens: int = 0
    dropped_characters: int = 0
    unknown_words: Counter[str] = field(default_factory=Counter)

    def add(self, other: PieceReport) -> None:
        for name, value in vars(other).items():
            if name == "unknown_words":
                self.unknown_words.update(value)
            else:
                setattr(self, name, getattr(self, name) + value)


def measured_length(document: str, *, compat: bool) -> int:
    """The length that --min_length speaks of: the reference measures a line break as " [SEP] "."""
    return len(document) + document.count("\n") * (len(" [SEP] ") - 1) if compat else len(document)


def tokenize_batch(task: tuple[Tokenizing, list[str]]) -> tuple[bytes, PieceReport]:
    """Give the text of `[MASK] ids [CLS]` of the documents that are long enough, and the report."""
    tokenizing, documents = task
    kept = [d for d in documents if measured_length(d, compat=tokenizing.compat) > tokenizing.min_length]
    report = PieceReport(too_short=len(documents) - len(kept))
    if not kept:
        return b"", report
    ids_of = _ids_of(tokenizing)
    return (ids_of.format_reference if tokenizing.compat else ids_of.format)(kept, report), report


@lru_cache(maxsize=1)
def _ids_of(tokenizing: Tokenizing) -> _IdTable:
    return _IdTable(tokenizing)


class _IdTable:
    """The ids of every word of a `WordTable`, and what the reports need of it."""

    def __init__(self, tokenizing: Tokenizing) -> None:
        segmenter = None if tokenizing.compat else shared_segmenter()
        self._tokenizer = Tokenizer(tokenizing.vocabulary, compat=tokenizing.compat, segmenter=segmenter)
        self._table = None if tokenizing.compat else _shared_table()
        if self._table is not None:
            self._vocabulary = WordStore.of(tokenizing.vocabulary)
            self._longest = max(map(len, tokenizing.vocabulary))
        decimal = [b"%d " % id_ for id_ in range(len(tokenizing.vocabulary))]
        assert len(decimal[-1]) <= ID_BYTES
        self._decimal = np.frombuffer(b"".join(text.ljust(ID_BYTES) for text in decimal), np.uint8).reshape(
            -1, ID_BYTES
        )
        self._decimal_lengths = np.fromiter(map(len, decimal), np.int64, len(decimal))
        self._clear()

    def _clear(self) -> None:
        self._generation = self._table.generation if self._table is not None else 0
        # Of every word: where its ids begin and end, its parts, parts of several tokens, unknown tokens, those parts.
        self._starts: np.ndarray = np.zeros(0, dtype=np.int64)
        self._ends: np.ndarray = np.zeros(0, dtype=np.int64)
        self._ids: np.ndarray = np.zeros(0, dtype=np.int32)
        self._figures: np.ndarray = np.zeros((3, 0), dtype=np.int64)
        self._unknown: dict[int, list[str]] = {}

    def _learn(self, words: WordStore) -> None:
        """Take in the words that have come since the last call."""
        first = self._figures.shape[1]
        if words.count == first:
            return
        # 1) Nearly all words, in compiled code.
        spelled = spell_plain_words(self._vocabulary, self._longest, words, first)
        starts, ends, ids = spelled.starts, spelled.ends, spelled.ids.tolist()
        figures = np.ones((3, words.count - first), dtype=np.int64)
        figures[1] = ends - starts > 1
        figures[2] = 0
        # 2) The others, as the tokenizer says.
        for number in np.flatnonzero(ends < 0).tolist():
            parts = fold_word(*words.read_one(first + number))[0]
            starts[number] = len(ids)
            several = 0
            for part in parts:
                part_ids = self._tokenizer.word_ids(part)
                ids += part_ids
                several += len(part_ids) > 1
                if UNK_ID in part_ids:
                    self._unknown.setdefault(first + number, []).append(part)
            ends[number] = len(ids)
            figures[:, number] = len(parts), several, ids[starts[number] :].count(UNK_ID)
        self._starts = np.concatenate((self._starts, starts + len(self._ids)))
        self._ends = np.concatenate((self._ends, ends + len(self._ids)))
        self._ids = np.concatenate((self._ids, np.asarray(ids, dtype=np.int32)))
        self._figures = np.concatenate((self._figures, figures), axis=1)

    def format(self, documents: list[str], report: PieceReport) -> bytes:
        """The ids of documents in decimal; adds to the report."""
        assert self._table is not None
        dropped_before = self._table.dropped_characters
        sequence = self._table.number(documents)
        report.dropped_characters += self._table.dropped_characters - dropped_before
        if self._table.generation != self._generation:
            self._clear()
        self._learn(self._table.words)

        counts = np.bincount(sequence[sequence >= 0], minlength=self._figures.shape[1])
        words, spelled, unknown = (int(counts @ figure) for figure in self._figures)
        line_breaks = int(np.count_nonzero(sequence == LINE_BREAK_WORD))
        report.words += words
        report.spelled_words += spelled
        report.unknown_tokens += unknown
        for number, parts in self._unknown.items():
            if counts[number]:
                for part in parts:
                    report.unknown_words[part] += int(counts[number])

        marks = 2 * int(np.count_nonzero(sequence == DOCUMENT_END)) + line_breaks
        most_ids = int(counts @ (self._ends - self._starts)) + marks
        output = np.empty((most_ids + 1) * ID_BYTES, dtype=np.uint8)
        length, tokens, kept, empty, *_ = run(
            FORMAT, [MASK_ID, CLS_ID, SEP_ID], sequence, self._starts, self._ends, self._ids, self._decimal,
            self._decimal_lengths, output,
        )  # fmt: skip
        report.tokens += tokens
        report.documents += kept
        report.empty += empty
        return output[:length].tobytes()

    def format_reference(self, documents: list[str], report: PieceReport) -> bytes:
        """The reference's ids; it keeps a document of which nothing is left."""
        lines: list[str] = []
        for document in documents:
            ids = [MASK_ID]
            for word in self._tokenizer.words(document):
                word_ids = self._tokenizer.word_ids(word)
                ids += word_ids
                report.words += 1
                report.spelled_words += len(word_ids) > 1
                if UNK_ID in word_ids:
                    report.unknown_words[word] += 1
                    report.unknown_tokens += word_ids.count(UNK_ID)
            ids.append(CLS_ID)
            report.documents += 1
            report.dropped_characters += dropped_characters(document)
            report.tokens += len(ids)
            lines.append(" ".join(map(str, ids)) + " ")
        return "".join(lines).encode("ascii")
