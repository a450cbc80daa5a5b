"""Exact and near duplicates among documents, found in one pass with bounded memory.

Two documents are compared by their pairs of neighbouring characters, white space and case apart: the similarity is the
share of common pairs among all different pairs of both (Jaccard). Which documents are compared at all is found by
MinHash over triples of characters and bands (locality-sensitive hashing, Indyk and Motwani 1998): documents with an
equal band are candidates. Every candidate is compared itself, so no pair is reported that is not as similar as asked
for. `datasketch` has the same in Python, at a twentieth of the speed (docs/architecture.md).
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MODES = ("exact", "near")
SIMILARITY = 0.7
EXAMPLES = 20

SHINGLE = 3  # characters
BANDS, ROWS = 16, 4
HASHES = BANDS * ROWS
KEYS = BANDS + 1  # the last is the whole text's
SKETCH = 32  # bytes that are kept of a signature, one of every second hash
MIN_SKETCH_MATCHES = 11  # 17 are expected at a similarity that is worth comparing, 1 of unrelated texts
MAX_CANDIDATES = 64
PROBES = 16
MAX_EQUAL = 4  # documents that are entered under one key
FIND, INSERT = 0, 1
_LEAST_LENGTHS = 0.5  # of the longer text; the pairs of long texts are all there are, and similar for any two
_SHORTEST = 8  # characters: shorter documents have exact duplicates only
_COMPARED = 8  # candidates, those with most in common first
_LEAST_SLOTS, _MOST_SLOTS = 1 << 16, 1 << 26
_MODULE = "gpt2_chinese.text.duplicates_kernel"


@dataclass(frozen=True)
class Duplicate:
    """A document that is left out, and the earlier one that it repeats; the similarity is 1.0 for an exact one."""

    document: str
    kept: str
    similarity: float
    is_exact: bool


class Duplicates:
    """Tells documents that repeat an earlier one.

    Memory: a table of 8 bytes a slot, with 17 slots for each document (at most 512 MB; the oldest entries make room
    for new ones then), and 40 to 80 bytes for each document. The documents that are kept are written to a temporary
    file.

    Args:
        mode: of MODES.
        folder: where the temporary file is.
        corpus_bytes: about how much text comes, for the size of the table.
        similarity: from which on a document is a near duplicate.

    Attributes:
        exact, near: how many were found.
        forgotten: entries that made room for new ones; duplicates of their documents may be missed.
        examples: the first ones found.
    """

    def __init__(self, mode: str, folder: Path, corpus_bytes: int, similarity: float = SIMILARITY) -> None:
        import numpy as np  # 11 MB, of which a run that looks for no duplicates needs nothing

        assert mode in MODES
        if not 0.5 <= similarity <= 1:
            raise ValueError(f"--similarity {similarity}: it is a share from 0.5 to 1")
        self.exact = self.near = self.forgotten = 0
        self.examples: list[Duplicate] = []
        self._similarity = similarity
        self._first_key = 0 if mode == "near" else BANDS
        slots = _LEAST_SLOTS
        while slots < min(_MOST_SLOTS, corpus_bytes // 10):
            slots *= 2
        self._table = np.zeros(slots, dtype=np.uint64)
        self._sketches: np.ndarray = np.zeros(1024 * SKETCH, dtype=np.uint8)
        self._starts = array("q", [0])  # of the documents in the file, in bytes
        self._seeds = np.random.default_rng(1).integers(1 << 32, size=HASHES, dtype=np.uint32)
        self._signature = np.zeros(HASHES, dtype=np.uint32)
        self._keys = np.zeros(KEYS, dtype=np.uint64)
        self._result = np.zeros(MAX_CANDIDATES + 1, dtype=np.int64)
        self._run = _compiled()
        self._addresses = self._find_addresses()
        self._result_address = self._result.ctypes.data
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        self._has_read = False

    def __enter__(self) -> Duplicates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def memory_bytes(self) -> int:
        """What is taken at most for the table, and for the documents so far."""
        return self._table.nbytes + self._sketches.nbytes + self._starts.itemsize * len(self._starts)

    def __call__(self, document: str) -> Duplicate | None:
        """Give the earlier document that this one repeats; or None, and remember it."""
        text = normalized(document)
        code_points = text.encode("utf-32-le", "surrogatepass")
        first_key = BANDS if len(text) < _SHORTEST else self._first_key
        count = self._call(FIND, code_points, first_key)
        pairs: set[str] = set()
        for number in self._in_order(self._result[1 : count + 1].tolist()):
            kept = self._read(number)
            other = normalized(kept)
            if other == text:
                self.exact += 1
                return self._note(Duplicate(document, kept, 1.0, True))
            if first_key == BANDS:
                continue
            if min(len(text), len(other)) < _LEAST_LENGTHS * max(len(text), len(other)):
                continue
            pairs = pairs or _pairs(text)
            share = _jaccard(pairs, _pairs(other))
            if share >= self._similarity:
                self.near += 1
                return self._note(Duplicate(document, kept, share, False))
        self.forgotten += self._call(INSERT, code_points, first_key)
        data = document.encode("utf-8", "surrogatepass")
        if self._has_read:
            self._file.seek(self._starts[-1])
            self._has_read = False
        self._file.write(data)
        self._starts.append(self._starts[-1] + len(data))
        if SKETCH * len(self._starts) > len(self._sketches):
            self._sketches.resize(2 * len(self._sketches), refcheck=False)  # the new ones are zeros
            self._addresses = self._find_addresses()
        return None

    def _find_addresses(self) -> tuple[int, ...]:
        """The arguments of the compiled function that stay the same from call to call."""
        arrays = (self._seeds, self._signature, self._keys, self._table)
        return (*(array_.ctypes.data for array_ in arrays), len(self._table), self._sketches.ctypes.data)

    def _call(self, operation: int, code_points: bytes, first_key: int) -> int:
        number = len(self._starts) - 1
        self._run(
            operation, code_points, len(code_points) // 4, *self._addresses, number, first_key, self._result_address
        )
        return int(self._result[0])

    def _in_order(self, candidates: list[int]) -> list[int]:
        """The candidates that are compared, those with most bytes of the signature in common first."""
        if len(candidates) < 2:
            return candidates
        sketch = (self._signature[:: HASHES // SKETCH] & 0xFF).astype("uint8")
        rows = self._sketches.reshape(-1, SKETCH)[candidates]
        common = (rows == sketch).sum(axis=1)
        return [candidates[place] for place in (-common).argsort(kind="stable")[:_COMPARED]]

    def _read(self, number: int) -> str:
        self._has_read = True
        self._file.seek(self._starts[number])
        data = self._file.read(self._starts[number + 1] - self._starts[number])
        return data.decode("utf-8", "surrogatepass")

    def summary(self) -> list[str]:
        """What was found, as lines for a person, with three examples."""
        lines = [f"duplicates left out: {self.exact:,} exact, {self.near:,} near"]
        for example in self.examples[:3]:
            lines.append(f"  {example.similarity:.0%}: {_shown(example.document)}")
            if not example.is_exact:
                lines.append(f"  {'as':>4} {_shown(example.kept)}")
        if self.forgotten:
            lines.append(
                f"note: {self.forgotten:,} of the {len(self._table):,} places for comparing made room for later "
                "documents; a few duplicates may be missed"
            )
        return lines

    def write_report(self, file: IO[str]) -> None:
        """Write the examples, for a person."""
        file.write(f"duplicates: {self.exact:,} exact, {self.near:,} near\n\n")
        for example in self.examples:
            file.write(
                f"{example.similarity:.3f}\n- {_shown(example.document, 200)}\n= {_shown(example.kept, 200)}\n\n"
            )

    def _note(self, duplicate: Duplicate) -> Duplicate:
        if len(self.examples) < EXAMPLES:
            self.examples.append(duplicate)
        return duplicate


def normalized(text: str) -> str:
    """What is compared of a text: without white space, in lower case."""
    return "".join(text.split()).lower()


def similarity(first: str, second: str) -> float:
    """The share of common pairs of neighbouring characters among all different ones of two texts.

    Example:
        >>> similarity("今天天气好", "今天天气很好")
        0.5
    """
    if min(len(first), len(second)) < _LEAST_LENGTHS * max(len(first), len(second)):
        return 0.0
    return _jaccard(_pairs(first), _pairs(second))


def _pairs(text: str) -> set[str]:
    return {text[at : at + 2] for at in range(len(text) - 1)}


def _jaccard(one: set[str], other: set[str]) -> float:
    common = len(one & other)
    return common / max(1, len(one) + len(other) - common)


def _shown(document: str, length: int = 60) -> str:
    line = " ".join(document.split())
    return line if len(line) <= length else line[:length] + "…"


_function: Callable[..., None] | None = None


def _compiled() -> Callable[..., None]:
    global _function
    if _function is None:
        from gpt2_chinese.compiled import load_function  # with llvmlite, which most runs do not need

        sources = [Path(__file__), Path(__file__).with_name("duplicates_kernel.py")]
        _function = load_function(_MODULE, sources, 12)
    return _function
