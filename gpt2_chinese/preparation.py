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

from gpt2_chinese.segmenter import Segmenter
from gpt2_chinese.tokenizer import LINE_BREAK, Tokenizer, dropped_characters, fold_word
from gpt2_chinese.vocabulary import CLS_ID, MASK_ID, SEP_ID, UNK_ID
from gpt2_chinese.word_table import DOCUMENT_END, LINE_BREAK_WORD, WordTable, count_sequence, format_ids

BATCH_CHARACTERS = 1 << 20


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


@dataclass
class WordCounts:
    """Different words of a batch in the order of first appearance, and how often each stands there.

    `words` is joined by line breaks, which no word has; with `compat` these are THULAC's words, without it a word that
    touches a spaced character before it ends with a tab.
    """

    words: str
    counts: np.ndarray

    def items(self) -> Iterator[tuple[str, int]]:
        if len(self.counts):
            yield from zip(self.words.split("\n"), self.counts.tolist(), strict=True)


def count_batch(documents: list[str]) -> WordCounts:
    """Count the words that the tokenizer will look up, before they are folded."""
    table = _shared_table()
    sequence = table.number(documents)
    counts = np.zeros(len(table.words), dtype=np.int64)
    order: np.ndarray = np.empty(len(table.words), dtype=np.int32)
    order = order[: count_sequence(sequence, counts, order)]
    words = [raw + "\t" if touching else raw for raw, touching in map(table.words.__getitem__, order.tolist())]
    return WordCounts("\n".join(words), counts[order])


def count_batch_of_reference(documents: list[str]) -> WordCounts:
    """Count THULAC's words of the documents as they are."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(shared_segmenter().cut(document))
    del counts[LINE_BREAK]
    return WordCounts("\n".join(counts), np.fromiter(counts.values(), np.int64, len(counts)))


def fold_counts(counts: dict[str, int]) -> dict[str, int]:
    """Turn counts of `count_batch` into those of the folded words, in the order of first appearance."""
    folded: dict[str, int] = {}
    for word, count in counts.items():
        touching = word.endswith("\t")
        for part in fold_word(word.removesuffix("\t"), touching)[0]:
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
    return len(document) + compat * document.count("\n") * (len(" [SEP] ") - 1)


def tokenize_batch(task: tuple[Tokenizing, list[str]]) -> tuple[bytes, PieceReport]:
    """Give the text of `[MASK] ids [CLS]` of the documents that are long enough, and the report."""
    tokenizing, documents = task
    kept = [d for d in documents if measured_length(d, compat=tokenizing.compat) > tokenizing.min_length]
    report = PieceReport(too_short=len(documents) - len(kept))
    report.dropped_characters = sum(map(dropped_characters, kept))
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
        decimal = [b"%d " % id_ for id_ in range(len(tokenizing.vocabulary))]
        self._decimal = np.frombuffer(b"".join(decimal), dtype=np.uint8)
        self._decimal_starts = np.cumsum([0, *map(len, decimal)], dtype=np.int64)
        self._clear()

    def _clear(self) -> None:
        self._generation = self._table.generation if self._table is not None else 0
        # Of every word: where its ids begin, its parts, parts of several tokens, unknown tokens, and those parts.
        self._starts = np.zeros(1, dtype=np.int64)
        self._ids: np.ndarray = np.zeros(0, dtype=np.int32)
        self._figures: np.ndarray = np.zeros((0, 3), dtype=np.int64)
        self._unknown: dict[int, list[str]] = {}

    def _learn(self, words: list[tuple[str, bool]]) -> None:
        ids: list[int] = []
        starts: list[int] = []
        figures: list[tuple[int, int, int]] = []
        base = len(self._figures)
        for number, (raw, touching) in enumerate(words, start=base):
            parts = fold_word(raw, touching)[0]
            before = len(ids)
            spelled = 0
            for part in parts:
                part_ids = self._tokenizer.word_ids(part)
                ids += part_ids
                spelled += len(part_ids) > 1
                if UNK_ID in part_ids:
                    self._unknown.setdefault(number, []).append(part)
            starts.append(len(ids))
            figures.append((len(parts), spelled, ids[before:].count(UNK_ID)))
        last = self._starts[-1]
        self._starts = np.concatenate((self._starts, last + np.asarray(starts, dtype=np.int64)))
        self._ids = np.concatenate((self._ids, np.asarray(ids, dtype=np.int32)))
        self._figures = np.concatenate((self._figures, np.asarray(figures, dtype=np.int64).reshape(-1, 3)))

    def format(self, documents: list[str], report: PieceReport) -> bytes:
        """The ids of documents in decimal; adds to the report."""
        assert self._table is not None
        sequence = self._table.number(documents)
        if self._table.generation != self._generation:
            self._clear()
        self._learn(self._table.words[len(self._figures) :])

        counts = np.bincount(sequence[sequence >= 0], minlength=len(self._figures))
        words, spelled, unknown = (counts @ self._figures).tolist()
        line_breaks = int(np.count_nonzero(sequence == LINE_BREAK_WORD))
        report.words += words
        report.spelled_words += spelled
        report.unknown_tokens += unknown
        for number, parts in self._unknown.items():
            if counts[number]:
                for part in parts:
                    report.unknown_words[part] += int(counts[number])

        marks = 2 * int(np.count_nonzero(sequence == DOCUMENT_END)) + line_breaks
        most_ids = int(counts @ np.diff(self._starts)) + marks
        longest = int(np.diff(self._decimal_starts).max())
        output = np.empty(most_ids * longest, dtype=np.uint8)
        length, tokens, kept, empty = format_ids(
            sequence, self._starts, self._ids, self._decimal, self._decimal_starts, MASK_ID, CLS_ID, SEP_ID, output
        )
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
            report.tokens += len(ids)
            lines.append(" ".join(map(str, ids)) + " ")
        return "".join(lines).encode("ascii")
