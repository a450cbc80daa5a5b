"""What completions have of their own: how much of them is copied from the training text, repetition, variety.

The copy meter is exact: every document of the training text is compared with a suffix automaton of the completions
(Blumer et al., The Smallest Automaton Recognizing the Subwords of a Text, 1985), which tells at each character how much
of what was read last stands in some completion. Only stretches whose windows of `MIN_RUN` characters have the hash of a
window of a completion go through the automaton. Memory is that of the completions and one block of text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpt2_chinese.training.corpus_text import as_code_points

MIN_RUN = 20
"""Characters. Shorter runs are common phrases; twenty in a row are seldom written twice."""

_BLOCK = 1 << 20  # characters of text whose hashes are computed at once
_SEPARATOR = 0x110000  # no code point; this one and those above it stand between texts
_BASE, _MODULUS = 0x9E3779B97F4A7C15, 1 << 64
_FILTER_BITS = 22


class CopiedRun(NamedTuple):
    """A run of a completion that stands verbatim in the training text, as long as it goes.

    Attributes:
        text: of the run.
        completion: its number, from 0.
        document, offset: one place where it stands: the number of the document and of the character in it, from 0.
    """

    text: str
    completion: int
    document: int
    offset: int


@dataclass(frozen=True)
class Copied:
    """
    Attributes:
        characters: of each completion.
        copied: how many of them belong to a run of at least `min_run` that stands verbatim in the training text.
        runs: all such runs, none of which lies within another one at the same place, in the order of the completions.
        searched_characters: of the training text.
    """

    characters: tuple[int, ...]
    copied: tuple[int, ...]
    runs: tuple[CopiedRun, ...]
    searched_characters: int

    def longest(self, count: int = 5, *, completions: int | None = None) -> list[CopiedRun]:
        """The longest runs of different texts, of the first so many completions or of all."""
        chosen: dict[str, CopiedRun] = {}
        for run in sorted(self.runs, key=lambda run: -len(run.text)):
            if len(chosen) == count:
                break
            if completions is None or run.completion < completions:
                chosen.setdefault(run.text, run)
        return list(chosen.values())


def copied_from(documents: Iterable[tuple[int, str]], completions: Sequence[str], *, min_run: int = MIN_RUN) -> Copied:
    """Find what completions have copied from documents.

    Args:
        documents: numbers and texts, read once; a run never goes from one document into the next.
        completions: without their prompts.
        min_run: characters, at least 1.
    """
    automaton = SuffixAutomaton(completions)
    hashes = np.unique(np.concatenate([window_hashes(as_code_points(text), min_run) for text in [*completions, ""]]))
    searched = 0
    for numbers, offsets, code_points in _blocks(documents):
        searched += len(code_points) - len(numbers)  # a separator behind each
        for begin, end in _candidates(code_points, hashes, min_run):
            document = int(np.searchsorted(offsets, begin, side="right")) - 1
            automaton.read(code_points[begin:end].tolist(), numbers[document], begin - int(offsets[document]))
    copied: list[int] = []
    runs: list[CopiedRun] = []
    for completion, text in enumerate(completions):
        matches = automaton.matches(completion)
        copied.append(_covered([match.length for match in matches], min_run))
        for place, match in enumerate(matches, start=1):
            is_longest = place == len(text) or matches[place].length <= match.length
            if match.length >= min_run and is_longest:
                run = text[place - match.length : place]
                runs.append(CopiedRun(run, completion, match.document, match.end - match.length))
    return Copied(tuple(map(len, completions)), tuple(copied), tuple(runs), searched)


def _covered(lengths: Sequence[int], min_run: int) -> int:
    """The characters in runs of at least `min_run`, given the length of the longest run that ends at each."""
    covered = begin = 0  # `begin`: all before it is counted or never will be
    for place, length in enumerate(lengths):
        if length >= min_run:
            begin = max(begin, place + 1 - length)
            covered += place + 1 - begin
            begin = place + 1
    return covered


def _blocks(
    documents: Iterable[tuple[int, str]],
) -> Iterator[tuple[list[int], npt.NDArray[np.int64], npt.NDArray[np.uint32]]]:
    """Documents together, some at a time: their numbers, where each begins, and their code points with separators."""
    numbers: list[int] = []
    texts: list[str] = []
    size = 0
    for number, text in documents:
        numbers.append(number)
        texts.append(text)
        size += len(text) + 1
        if size >= _BLOCK:
            yield (numbers, *_joined(texts))
            numbers, texts, size = [], [], 0
    if texts:
        yield (numbers, *_joined(texts))


def _joined(texts: list[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    lengths = np.array([len(text) + 1 for text in texts])
    ends = np.cumsum(lengths)
    joined = np.full(ends[-1], _SEPARATOR, np.uint32)
    inside = np.ones(len(joined), bool)
    inside[ends - 1] = False
    joined[inside] = as_code_points("".join(texts))
    return ends - lengths, joined


def _candidates(
    code_points: npt.NDArray[np.uint32], hashes: npt.NDArray[np.uint64], length: int
) -> Iterator[tuple[int, int]]:
    """Stretches of a text each window of which may stand in a completion, by the windows' hashes; of one text once."""
    if not len(hashes):
        return
    windows = window_hashes(code_points, length)
    shift = np.uint64(64 - _FILTER_BITS)
    known = np.zeros(1 << _FILTER_BITS, bool)
    known[hashes >> shift] = True
    places = np.flatnonzero(known[windows >> shift])
    found = windows[places]
    nearest = np.searchsorted(hashes, found)
    nearest[nearest == len(hashes)] = 0
    places = places[hashes[nearest] == found]
    if not len(places):
        return
    breaks = np.flatnonzero(np.diff(places) > 1)
    begins = places[np.append(0, breaks + 1)]
    ends = places[np.append(breaks, len(places) - 1)] + length
    read: set[bytes] = set()  # a phrase that the text has a thousand times goes through the automaton once
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        stretch = code_points[begin:end].tobytes()
        if stretch not in read:
            read.add(stretch)
            yield begin, end


def window_hashes(code_points: npt.NDArray[np.uint32], length: int) -> npt.NDArray[np.uint64]:
    """A hash of each window of `length` code points, modulo 2**64: the sum of base**(length - 1 - i) times the i-th."""
    if len(code_points) < length:
        return np.empty(0, np.uint64)
    # Windows of 1, 2, 4, ... are put together to the one that is wanted, by the bits of its length.
    power, base = code_points.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93), _BASE
    done, size, span = np.zeros(len(code_points), np.uint64), 0, 1
    rest = length
    while rest:
        if rest & 1:
            # The window so far, and behind it one of `span`.
            count = len(code_points) - size - span + 1
            done = done[:count] * np.uint64(base) + power[size : size + count]
            size += span
        rest >>= 1
        if rest:
            power = power[:-span] * np.uint64(base) + power[span:]
            span *= 2
            base = base * base % _MODULUS
    return done ^ (done >> np.uint64(32))


class Match(NamedTuple):
    """The longest run that ends at a character and stands in a text that was read: `length` 0 is none.

    Attributes:
        end: in the document, the character behind the run.
    """

    length: int
    document: int
    end: int


_NO_MATCH = Match(0, -1, -1)


class SuffixAutomaton:
    """All substrings of some texts, and which of them stand in what is read.

    A state stands for substrings that end at the same places of the texts, all suffixes of the longest of them; its
    link is the state of the longest suffix that ends at more places.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]  # of the longest substring
        self._ends: list[list[int]] = []  # the state of each text's prefixes
        last = 0
        for number, text in enumerate(texts):
            states = []
            for character in text:
                last = self._add(ord(character), last)
                states.append(last)
            self._ends.append(states)
            last = self._add(_SEPARATOR + 1 + number, last)  # behind it nothing of the next text is one with this one
        self._best: dict[int, Match] = {}
        self._settled = False

    def _add(self, symbol: int, last: int) -> int:
        """Append a symbol to the text whose state is `last`; gives the state of the longer one."""
        next_, link, length = self._next, self._link, self._length
        new = len(next_)
        next_.append({})
        length.append(length[last] + 1)
        link.append(0)
        state = last
        while state >= 0 and symbol not in next_[state]:
            next_[state][symbol] = new
            state = link[state]
        if state >= 0:
            after = next_[state][symbol]
            if length[after] == length[state] + 1:
                link[new] = after
            else:
                copy = len(next_)
                next_.append(next_[after].copy())
                length.append(length[state] + 1)
                link.append(link[after])
                while state >= 0 and next_[state].get(symbol) == after:
                    next_[state][symbol] = copy
                    state = link[state]
                link[after] = link[new] = copy
        return new

    def read(self, symbols: Sequence[int], document: int, offset: int) -> None:
        """Read a stretch of a document that begins at the character `offset`."""
        next_, link, length, best = self._next, self._link, self._length, self._best
        state = matched = 0
        for end, symbol in enumerate(symbols, start=offset + 1):
            while state and symbol not in next_[state]:
                state = link[state]
                matched = length[state]
            if symbol in next_[state]:
                state = next_[state][symbol]
                matched += 1
            if matched and (state not in best or best[state].length < matched):
                best[state] = Match(matched, document, end)
        self._settled = False

    def _settle(self) -> None:
        """Tell the links: where a substring was read, its suffixes were, which are whole states."""
        if self._settled:
            return
        for state in sorted(range(1, len(self._next)), key=self._length.__getitem__, reverse=True):
            match, shorter = self._best.get(state), self._link[state]
            if match is not None and shorter:
                length = self._length[shorter]
                if shorter not in self._best or self._best[shorter].length < length:
                    self._best[shorter] = Match(length, match.document, match.end)
        self._settled = True

    def matches(self, text: int) -> list[Match]:
        """For each character of a text, the longest run that ends there and was read."""
        self._settle()
        found = []
        for state in self._ends[text]:
            while state and state not in self._best:
                state = self._link[state]
            found.append(self._best[state] if state else _NO_MATCH)
        return found


def repetition(texts: Sequence[str], n: int = 4) -> float | None:
    """The share of n-grams of characters that stand earlier in the same text (Welleck et al., 2020: seq-rep-n).

    The mean over all n-grams of all texts; None where none is so long.
    """
    total = sum(max(0, len(text) - n + 1) for text in texts)
    distinct = sum(len(_ngrams(text, n)) for text in texts)
    return 1 - distinct / total if total else None


def distinct_n(texts: Sequence[str], n: int = 2) -> float | None:
    """The different n-grams of characters in all texts, by the number of all (Li et al., 2016: distinct-n).

    It falls with the amount of text: compare it between texts of one length only.
    """
    counts = Counter[str]()
    for text in texts:
        counts += _ngrams(text, n)
    return len(counts) / counts.total() if counts else None


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[place : place + n] for place in range(len(text) - n + 1))
