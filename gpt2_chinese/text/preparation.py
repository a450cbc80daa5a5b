"""The work of stages 2 and 3 on one batch of documents, as functions that worker processes run.

What a task returns depends on the task alone, so the stages' outputs do not depend on how many workers there are or
on which machine they run. A worker keeps what it has learned about words for its next task.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np

from gpt2_chinese.text.char_tokenizer import CharSegmenter, CharTokenizer
from gpt2_chinese.text.segmenter import Segmenter
from gpt2_chinese.text.tokenizers import TokenizerSpec
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS, Marks
from gpt2_chinese.text.word_table import (
    DOCUMENT_END,
    EXAMPLES,
    FORMAT,
    LINE_BREAK_WORD,
    CountedWords,
    WordCounter,
    WordStore,
    WordTable,
    class_by_bert,
    class_by_rules,
    run,
    spell_plain_words,
    with_room,
)
from gpt2_chinese.text.word_tokenizer import (
    IDEOGRAPHS,
    LINE_BREAK,
    RULES,
    RULES_VERSION,
    SPACE_TOKEN,
    WordTokenizer,
    clean_bert_character,
    fold_as_bert,
    fold_word,
    mark_spaces,
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


@lru_cache(maxsize=4)
def _shared_table(kind: str, rules: int = RULES_VERSION, digits: bool = False) -> WordTable:
    """A process's table of words, of the segmenter or of single characters."""
    if kind == "char":
        return WordTable(CharSegmenter(digits=digits), class_by_bert)
    return WordTable(shared_segmenter(), partial(class_by_rules, rules=RULES[rules]))


def count_batch(documents: list[str], rules: int = RULES_VERSION) -> CountedWords:
    """Count the words that the tokenizer will look up, before they are folded."""
    table = _shared_table("word", rules)
    return table.count(_number(table, documents, keep_spaces=RULES[rules].keeps_spaces))


def count_batch_of_characters(documents: list[str], keep_spaces: bool = False) -> CountedWords:
    """Count single characters and the runs of others between them, before they are folded."""
    table = _shared_table("char")
    return table.count(_number(table, documents, keep_spaces=keep_spaces))


def _number(table: WordTable, documents: list[str], *, keep_spaces: bool) -> np.ndarray:
    """The numbers of the words of documents, as `WordTable.number`; kept white space is a word."""
    if not keep_spaces:
        return table.number(documents)
    sequence = table.number([SPACE_TOKEN, *map(mark_spaces, documents)])
    space, sequence = sequence[0], sequence[2:]  # the first document's word and its end
    # The line breaks beside a space are those that mark_spaces has put there.
    is_space = sequence == space
    beside = np.zeros(len(sequence), dtype=np.bool_)
    beside[1:] |= is_space[:-1]
    beside[:-1] |= is_space[1:]
    return np.ascontiguousarray(sequence[~(beside & (sequence == LINE_BREAK_WORD))])


def count_batch_of_reference(documents: list[str]) -> dict[str, int]:
    """Count THULAC's words of the documents as they are."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(shared_segmenter().cut(document))
    del counts[LINE_BREAK]
    return counts


def fold_counts(batches: Iterable[CountedWords], rules: int = RULES_VERSION) -> dict[str, int]:
    """Add up counts of `count_batch` as those of the folded words, in the order of first appearance."""
    return _fold_counts(batches, lambda word, touching: fold_word(word, touching, RULES[rules])[0])


def fold_character_counts(batches: Iterable[CountedWords], fold: Callable[[str], list[str]]) -> dict[str, int]:
    """The same for single characters and runs of others, folded as `CharTokenizer` does."""
    return _fold_counts(batches, lambda word, _: fold(word))


def _fold_counts(batches: Iterable[CountedWords], fold: Callable[[str, bool], list[str]]) -> dict[str, int]:
    counter = WordCounter()
    for batch in batches:
        counter.add(batch)
    folded: dict[str, int] = {}
    for (word, touching), count in counter.items():
        if IDEOGRAPHS.fullmatch(word):  # nearly every word: it is its own
            folded[word] = folded.get(word, 0) + count
            continue
        for part in fold(word, touching):
            folded[part] = folded.get(part, 0) + count
    return folded


@dataclass(frozen=True)
class Tokenizing:
    """How documents become ids."""

    spec: TokenizerSpec
    min_length: int

    def __reduce__(self) -> tuple[Callable[[bytes, int], Tokenizing], tuple[bytes, int]]:
        # Every task of a Dask cluster has it: a vocabulary is pickled once, and unpickled once by each worker.
        return _tokenizing_of, (_pickled(self.spec), self.min_length)


@lru_cache(maxsize=1)
def _pickled(spec: TokenizerSpec) -> bytes:
    return pickle.dumps(spec)


@lru_cache(maxsize=1)
def _unpickled(spec: bytes) -> TokenizerSpec:
    return pickle.loads(spec)


def _tokenizing_of(spec: bytes, min_length: int) -> Tokenizing:
    return Tokenizing(_unpickled(spec), min_length)


KINDS_OF_CHANGE = ("case", "accents", "white_space", "control", "unknown")


@dataclass
class PieceReport:
    """What became of documents; reports add up.

    Attributes:
        case: letters whose case was changed.
        accents: characters that lost an accent or another mark, in vocabularies that are read as BERT does.
        white_space: its characters that did not stay as they are: beside Chinese, in runs, at the ends of lines.
        dropped_characters: control characters that were left out.
        examples: the first changes of each kind.
    """

    documents: int = 0
    too_short: int = 0
    empty: int = 0
    tokens: int = 0
    words: int = 0
    spelled_words: int = 0
    unknown_tokens: int = 0
    dropped_characters: int = 0
    case: int = 0
    accents: int = 0
    white_space: int = 0
    unknown_words: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def inner_tokens(self) -> int:
        """The tokens without those that begin and end a document."""
        return self.tokens - 2 * self.documents

    def add(self, other: PieceReport) -> None:
        for name, value in vars(other).items():
            if name == "unknown_words":
                self.unknown_words.update(value)
            elif name == "examples":
                for kind, examples in value.items():
                    self.add_examples(kind, examples)
            else:
                setattr(self, name, getattr(self, name) + value)

    def add_examples(self, kind: str, examples: Iterable[str]) -> None:
        """Keep the first few different examples of a kind of change."""
        kept = self.examples.setdefault(kind, [])
        for example in examples:
            if len(kept) < EXAMPLES and example not in kept:
                kept.append(example)

    def changes(self) -> dict[str, dict[str, Any]]:
        """How much of each kind was changed, dropped or unknown, with examples: JSON values."""
        counts = (self.case, self.accents, self.white_space, self.dropped_characters, self.unknown_tokens)
        # Equal counts in the order of the words, so that the list does not depend on how the work was shared out.
        unknown = sorted(self.unknown_words.items(), key=lambda item: (-item[1], item[0]))[:EXAMPLES]
        examples = {**self.examples, "unknown": [word for word, _ in unknown]}
        return {
            kind: {"count": count, "examples": examples.get(kind, [])}
            for kind, count in zip(KINDS_OF_CHANGE, counts, strict=True)
        }


def _case_and_accents(word: str, fold: Callable[[str], str]) -> tuple[int, int]:
    """How many letters of a word folding changes the case of, and from how many it takes a mark."""
    lowered = [character.lower() for character in word] if fold("A") == "a" else list(word)
    case = sum(character != low for character, low in zip(word, lowered, strict=True))
    return case, sum(fold(low) != low for low in lowered)


def measured_lengths(documents: Iterable[str], *, compat: bool) -> list[int]:
    """The lengths that --min_length speaks of: the reference measures a line break as " [SEP] "."""
    if not compat:
        return list(map(len, documents))
    return [len(document) + document.count("\n") * (len(" [SEP] ") - 1) for document in documents]


def tokenize_batch(tokenizing: Tokenizing, documents: list[str]) -> tuple[bytes, PieceReport]:
    """Give the ids of the documents that are long enough, each between its marks, as text; and the report."""
    lengths = measured_lengths(documents, compat=tokenizing.spec.compat)
    kept = [d for d, length in zip(documents, lengths, strict=True) if length > tokenizing.min_length]
    report = PieceReport(too_short=len(documents) - len(kept))
    if not kept:
        return b"", report
    return _formatter(tokenizing.spec).format(kept, report), report


@lru_cache(maxsize=1)
def _formatter(spec: TokenizerSpec) -> _Formatter:
    if spec.kind == "bpe":
        return _BpeFormatter(spec)
    return _ReferenceFormatter(spec) if spec.kind == "word" and spec.compat else _TableFormatter(spec)


class _Formatter(Protocol):
    """Writes the ids of documents in decimal and adds to the report."""

    def format(self, documents: list[str], report: PieceReport) -> bytes: ...


class _Decimal:
    """Writes ids in decimal, by compiled code."""

    def __init__(self, size: int) -> None:
        decimal = [b"%d " % id_ for id_ in range(size)]
        assert len(decimal[-1]) <= ID_BYTES
        self._digits = np.frombuffer(b"".join(text.ljust(ID_BYTES) for text in decimal), np.uint8).reshape(-1, ID_BYTES)
        self._lengths = np.fromiter(map(len, decimal), np.uint8, len(decimal))

    def write(
        self,
        sequence: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        ids: np.ndarray,
        count: int,
        marks: Marks,
        report: PieceReport,
        *,
        keep_empty: bool = False,
    ) -> bytes:
        """The text of a sequence of word numbers, `DOCUMENT_END` and `LINE_BREAK_WORD`, with `count` ids at most.

        Word n has ids[starts[n] : ends[n]].
        """
        output = np.empty((count + 1) * ID_BYTES, dtype=np.uint8)
        line_break = -1 if marks.line_break is None else marks.line_break
        length, tokens, kept, empty, *_ = run(
            FORMAT, [marks.begin, marks.end, line_break, int(keep_empty)], sequence, starts, ends, ids, self._digits,
            self._lengths, output,
        )  # fmt: skip
        report.tokens += tokens
        report.documents += kept
        report.empty += empty
        return output[:length].tobytes()


class _TableFormatter:
    """Words or characters: the ids of every word of a `WordTable`, and what the reports need of it."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec
        tokenizer = spec.build(segmenter=shared_segmenter() if spec.kind == "word" else None)
        assert isinstance(tokenizer, (WordTokenizer, CharTokenizer))
        self._tokenizer = tokenizer
        if isinstance(tokenizer, CharTokenizer):
            self._keeps_spaces = tokenizer.keeps_spaces
        else:
            self._keeps_spaces = tokenizer.rules.keeps_spaces
        self._table = _shared_table(spec.kind, spec.rules, spec.kind == "char" and spec.compat)
        # Of a token that stands there twice the last one counts; what is blank is no word.
        token_ids = {token: id_ for id_, token in enumerate(tokenizer.vocabulary) if token.strip(" \n")}
        self._vocabulary = WordStore.of(list(token_ids))
        self._token_ids = np.fromiter(token_ids.values(), np.int32, len(token_ids))
        self._longest = max(map(len, tokenizer.vocabulary))
        self._decimal = _Decimal(len(tokenizer))
        self._clear()

    def _clear(self) -> None:
        self._generation = self._table.generation
        self._learnt = self._used_ids = 0
        # Of every word learnt: where its ids begin and end. Of those that are not of ideographs alone: the parts, parts
        # of several tokens, unknown tokens, letters of another case, characters with a mark less; and the unknown
        # parts. The arrays have room for more words.
        self._starts: np.ndarray = np.zeros(0, dtype=np.int64)
        self._ends: np.ndarray = np.zeros(0, dtype=np.int64)
        self._ids: np.ndarray = np.zeros(0, dtype=np.int32)
        self._figures: np.ndarray = np.zeros((5, 0), dtype=np.int32)
        self._others: np.ndarray = np.zeros(0, dtype=np.int64)  # the words that are not of ideographs alone
        self._unknown: dict[int, list[str]] = {}

    def _parts(self, word: str, touching: bool) -> list[str]:
        if isinstance(self._tokenizer, CharTokenizer):
            return self._tokenizer.fold(word)
        return fold_word(word, touching, self._tokenizer.rules)[0]

    def _fold(self, text: str) -> str:
        if isinstance(self._tokenizer, CharTokenizer):
            return fold_as_bert(text) if self._tokenizer.lowercase else text
        return self._tokenizer.rules.fold(text)

    def _folded_examples(self, sequence: np.ndarray, figure: np.ndarray) -> list[str]:
        """The first words of a sequence that folding changes, and what they become."""
        numbers: dict[int, None] = {}
        start, step = 0, 1 << 12
        while start < len(sequence) and len(numbers) < EXAMPLES:
            some = sequence[start : start + step]
            some = some[some >= 0]
            numbers |= dict.fromkeys(some[figure[some] > 0].tolist())
            start, step = start + step, 2 * step
        words = [self._table.words.read_one(number)[0].strip() for number in list(numbers)[:EXAMPLES]]
        return [f"{word} → {self._fold(word)}" for word in words]

    def _learn(self, words: WordStore) -> None:
        """Take in the words that have come since the last call."""
        first = self._learnt
        if words.count == first:
            return
        unknown = self._tokenizer.marks.unknown
        # 1) Nearly all words, in compiled code.
        spelled = spell_plain_words(self._vocabulary, self._longest, words, first)
        starts, ends = spelled.starts, spelled.ends
        plain = self._token_ids[spelled.ids]
        others: list[int] = []
        figures = np.zeros((5, words.count - first), dtype=np.int32)  # of the others
        # 2) The others, as the tokenizer says.
        not_plain = np.flatnonzero(ends < 0)
        self._others = np.concatenate((self._others, first + not_plain))
        for number in not_plain.tolist():
            word, touching = words.read_one(first + number)
            parts = self._parts(word, touching)
            begin = len(others)
            several = 0
            for part in parts:
                part_ids = self._tokenizer.word_ids(part)
                others += part_ids
                several += len(part_ids) > 1
                if unknown is not None and unknown in part_ids:
                    self._unknown.setdefault(first + number, []).append(part)
            starts[number], ends[number] = len(plain) + begin, len(plain) + len(others)
            figures[:3, number] = len(parts), several, others[begin:].count(-1 if unknown is None else unknown)
            figures[3:, number] = _case_and_accents(word, self._fold)
        # 3) Behind the words that are known.
        used = self._used_ids
        self._used_ids += len(plain) + len(others)
        self._learnt = words.count
        self._ids = with_room(self._ids, self._used_ids)
        self._ids[used : used + len(plain)] = plain
        self._ids[used + len(plain) : self._used_ids] = others
        self._starts, self._ends = (with_room(array, words.count) for array in (self._starts, self._ends))
        self._starts[first : words.count] = starts + used
        self._ends[first : words.count] = ends + used
        self._figures = with_room(self._figures, words.count)
        self._figures[:, first : words.count] = figures

    def format(self, documents: list[str], report: PieceReport) -> bytes:
        if self._spec.compat and any(_is_special(document) for document in documents):
            return _ReferenceFormatter(self._spec, self._tokenizer).format(documents, report)
        sequence = _number(self._table, documents, keep_spaces=self._keeps_spaces)
        cleaning = self._table.cleaning
        report.dropped_characters += cleaning.dropped
        report.white_space += cleaning.spaces
        report.add_examples("control", cleaning.dropped_examples)
        report.add_examples("white_space", cleaning.spaces_examples)
        if self._table.generation != self._generation:
            self._clear()
        self._learn(self._table.words)

        present, counts = self._table.occurrences(sequence)
        times = counts[present]
        total = int(times.sum())
        line_breaks = len(sequence) - total - len(documents)
        ids_of = self._ends[present] - self._starts[present]
        # Of plain words, nearly all, the number of ids says everything.
        others = self._others[counts[self._others] > 0]
        figures = self._figures[:, others] @ counts[others]
        words, spelled, unknown, case, accents = map(int, figures)
        words += total - int(counts[others].sum())
        spelled += int(times[ids_of > 1].sum()) - int(
            counts[others[self._ends[others] - self._starts[others] > 1]].sum()
        )
        report.words += words
        report.spelled_words += spelled
        report.unknown_tokens += unknown
        report.case += case
        report.accents += accents
        for kind, changed, of_words in (("case", case, self._figures[3]), ("accents", accents, self._figures[4])):
            if changed:
                report.add_examples(kind, self._folded_examples(sequence, of_words))
        for number, parts in self._unknown.items():
            if counts[number]:
                for part in parts:
                    report.unknown_words[part] += int(counts[number])

        count = int(times @ ids_of) + line_breaks + 2 * len(documents)
        return self._decimal.write(
            sequence,
            self._starts,
            self._ends,
            self._ids,
            count,
            self._tokenizer.marks,
            report,
            keep_empty=self._spec.compat,
        )


def _is_special(document: str) -> bool:
    """Whether GPT2-Chinese finds special tokens in a text: their names, or white space alone."""
    return not document.strip() or any(token in document for token in SPECIAL_TOKENS)


class _ReferenceFormatter:
    """A document at a time, as the tokenizer itself does it; a document of which nothing is left is kept."""

    def __init__(self, spec: TokenizerSpec, tokenizer: WordTokenizer | CharTokenizer | None = None) -> None:
        built = tokenizer or spec.build()
        assert isinstance(built, (WordTokenizer, CharTokenizer))
        self._tokenizer = built

    def format(self, documents: list[str], report: PieceReport) -> bytes:
        marks = self._tokenizer.marks
        lines: list[str] = []
        for document in documents:
            ids = [marks.begin]
            for word in self._tokenizer.words(document):
                word_ids = self._tokenizer.word_ids(word)
                ids += word_ids
                report.words += 1
                report.spelled_words += len(word_ids) > 1
                if marks.unknown in word_ids:
                    report.unknown_words[word] += 1
                    report.unknown_tokens += word_ids.count(marks.unknown or 0)
            ids.append(marks.end)
            report.documents += 1
            self._count_changes(document, report)
            report.tokens += len(ids)
            lines.append(" ".join(map(str, ids)) + " ")
        return "".join(lines).encode("ascii")

    def _count_changes(self, document: str, report: PieceReport) -> None:
        """Count as BERT cleans and folds a text; white space is in no token of the reference."""
        for character in sorted(set(document) - {"\n"}):
            count = document.count(character)
            kept = clean_bert_character(character)
            if not kept:
                report.dropped_characters += count
                report.add_examples("control", [f"U+{ord(character):04X}"])
            elif kept == " ":
                report.white_space += count
                report.add_examples("white_space", [f"U+{ord(character):04X}"])
            else:
                case, accents = _case_and_accents(character, fold_as_bert)
                report.case += count * case
                report.accents += count * accents
                for kind, changed in (("case", case), ("accents", accents)):
                    if changed:
                        report.add_examples(kind, [f"{character} → {fold_as_bert(character)}"])


class _BpeFormatter:
    """BPE, by the package; its ids are the numbers of the words."""

    def __init__(self, spec: TokenizerSpec) -> None:
        from gpt2_chinese.text.bpe_tokenizer import BpeTokenizer

        tokenizer = spec.build()
        assert isinstance(tokenizer, BpeTokenizer)
        self._tokenizer = tokenizer
        self._decimal = _Decimal(len(tokenizer))
        self._ids = np.arange(len(tokenizer), dtype=np.int32)
        self._starts = np.arange(len(tokenizer), dtype=np.int64)

    def format(self, documents: list[str], report: PieceReport) -> bytes:
        numbers: list[int] = []
        for ids in self._tokenizer.encode_batch(documents):
            numbers += ids
            numbers.append(int(DOCUMENT_END))
        sequence = np.array(numbers, dtype=np.int32)
        count = len(numbers) + len(documents)
        report.words += len(numbers) - len(documents)
        return self._decimal.write(
            sequence, self._starts, self._starts + 1, self._ids, count, self._tokenizer.marks, report
        )
