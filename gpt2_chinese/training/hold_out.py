"""Which part of a corpus is held out as validation set: a share of the text, chosen by hash.

Sizes are in bytes of UTF-8 text, not in tokens, so that the same text is held out whatever the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2_chinese.text.pieces import document_begins
from gpt2_chinese.text.vocabulary import Marks

MIN_BYTES = 12_000
"""At least so much is held out, some 4,000 Chinese characters or 2,000 tokens: less says little about a model."""
MAX_BYTES = 3_000_000
"""At most so much, a million Chinese characters or half a million tokens: more makes a measurement slow, not better."""
LARGEST_SHARE = 0.2  # of a small corpus; of a larger one --val_fraction decides
LONG_DOCUMENT = 24_000  # bytes; of longer ones, novels say, slices are held out
SLICE = 6_000  # bytes
_SMALL_CORPUS = 4_000  # bytes; documents are not cut below
_BLOCK = 1 << 22  # tokens


@dataclass(frozen=True)
class HoldOut:
    """What is to be held out.

    Attributes:
        fraction: of the text, from 0 (nothing) to below 1.
        min_bytes: at least, but not more than a fifth of the corpus.
        max_bytes: at most.
        gap: tokens on both sides of a slice of a long document that are neither trained on nor held out.
    """

    fraction: float = 0.0
    min_bytes: int = MIN_BYTES
    max_bytes: int = MAX_BYTES
    gap: int = 0

    def name(self) -> str:
        """Part of the name of the files that are kept."""
        return f"{self.fraction}-{self.min_bytes}-{self.max_bytes}-{self.gap}"


@dataclass(frozen=True)
class Unit:
    """A document, or a slice of a long one: tokens `begin` to `end`, within the document from `first` to `last`."""

    hash: int
    size: int  # bytes
    begin: int
    end: int
    first: int
    last: int

    @property
    def is_slice(self) -> bool:
        return (self.begin, self.end) != (self.first, self.last)


@dataclass(frozen=True)
class Split:
    """
    Attributes:
        held_out: begin and end of each unit that is held out, in order.
        kept: begin and end of what is trained on, in order; in between is what is held out or in a gap.
        breaks: where `kept` is cut inside a document: windows must not go on there.
    """

    held_out: list[tuple[int, int]] = field(default_factory=list)
    kept: list[tuple[int, int]] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    documents: int = 0
    slices: int = 0


def split(
    tokens: npt.NDArray[Any],
    marks: Marks,
    hold_out: HoldOut,
    token_texts: Sequence[bytes],
    piece_lengths: Sequence[int] | None = None,
) -> Split:
    """Decide what is held out.

    Documents are taken in the order of a hash of their text until there is enough, so a document mostly stays held out
    when others come and go, and two that are equal are never on both sides. Documents of more than `LONG_DOCUMENT`
    bytes are taken in slices of `SLICE`. If the corpus has but one document, and a short one, nothing is held out.

    Args:
        token_texts: what each id stands for; without it sizes and hashes are those of the ids.
        piece_lengths: a document ends where its piece does; None for a single piece.
    """
    documents = _documents(tokens, marks, piece_lengths or [len(tokens)])
    units, total = _units(tokens, documents, hold_out, token_texts)
    chosen = _choose(units, total, hold_out)
    return _cut(len(tokens), chosen, hold_out.gap)


def _units(
    tokens: npt.NDArray[Any], documents: Iterator[tuple[int, int]], hold_out: HoldOut, token_texts: Sequence[bytes]
) -> tuple[list[Unit], int]:
    """The units with the smallest hashes, as many as can be held out, and the bytes of the corpus."""
    lengths = np.array([len(text) for text in token_texts], np.int64) if token_texts else None
    enough = max(hold_out.max_bytes, hold_out.min_bytes)
    units: list[Unit] = []
    gathered = total = 0
    for begin, end in documents:
        ids = tokens[begin:end]
        sizes = lengths[ids] if lengths is not None else np.full(len(ids), 4, np.int64)
        number, size = _document_hash(ids, token_texts), int(sizes.sum())
        total += size
        document = Unit(number, size, begin, end, begin, end)
        found = _slices(document, sizes, SLICE) if size > LONG_DOCUMENT else [document]
        units += found
        gathered += sum(unit.size for unit in found)
        if gathered > 4 * enough:  # the memory is that of the largest validation set, not that of the corpus
            units, gathered = _smallest(units, 2 * enough)
    if _SMALL_CORPUS <= total < LONG_DOCUMENT / LARGEST_SHARE:
        units = [piece for unit in units for piece in _sliced_small(unit, tokens, lengths, total)]
    return units, total


def _sliced_small(
    unit: Unit, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64] | None, total: int
) -> list[Unit]:
    """A document that is more than a fifth of a small corpus, in slices."""
    if unit.is_slice or unit.size <= LARGEST_SHARE * total:
        return [unit]
    ids = tokens[unit.begin : unit.end]
    return _slices(unit, lengths[ids] if lengths is not None else np.full(len(ids), 4, np.int64), total // 20)


def _slices(document: Unit, sizes: npt.NDArray[np.int64], size: int) -> list[Unit]:
    """A document in slices of about so many bytes of text, each with a hash of its own."""
    behind = np.cumsum(sizes)
    cuts = np.searchsorted(behind, np.arange(size, int(behind[-1]) - size // 2, size), side="left") + 1
    bounds = [0, *cuts.tolist(), len(sizes)]
    slices = []
    for number, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        key = document.hash.to_bytes(8, "big") + number.to_bytes(8, "big")
        slices.append(
            Unit(
                hash=int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"),
                size=int(sizes[begin:end].sum()),
                begin=document.begin + begin,
                end=document.begin + end,
                first=document.begin,
                last=document.end,
            )
        )
    return slices


def _smallest(units: list[Unit], size: int) -> tuple[list[Unit], int]:
    """Of units the ones with the smallest hashes, so many that they have `size` bytes, and what they have."""
    kept: list[Unit] = []
    gathered = 0
    for unit in sorted(units, key=lambda unit: (unit.hash, unit.begin)):
        if gathered >= size and unit.hash != kept[-1].hash:
            break
        kept.append(unit)
        gathered += unit.size
    return kept, gathered


def _choose(units: list[Unit], total: int, hold_out: HoldOut) -> list[Unit]:
    """Take units in the order of their hashes, equal ones together, until there is enough."""
    target = min(
        max(hold_out.fraction * total, min(hold_out.min_bytes, LARGEST_SHARE * total)),
        max(hold_out.max_bytes, 1),
    )
    limit = min(max(LARGEST_SHARE * total, 1.25 * target), 0.95 * total)
    groups: dict[int, list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: (unit.hash, unit.begin)):
        groups.setdefault(unit.hash, []).append(unit)
    chosen: list[Unit] = []
    held = 0
    for group in groups.values():
        size = sum(unit.size for unit in group)
        if held >= target:
            break
        if held + size <= limit:
            chosen += group
            held += size
    if not chosen and len(groups) > 1:  # few documents, each of them large beside the others
        chosen = next(iter(groups.values()))
    return sorted(chosen, key=lambda unit: unit.begin)


def _cut(count: int, chosen: list[Unit], gap: int) -> Split:
    """What is left of `count` tokens, given the units held out, in order."""
    result = Split(
        held_out=[(unit.begin, unit.end) for unit in chosen],
        documents=sum(not unit.is_slice for unit in chosen),
        slices=sum(unit.is_slice for unit in chosen),
    )
    end = 0  # of what is dealt with
    for unit in chosen:
        begin = max(unit.first, unit.begin - gap, end) if unit.is_slice else unit.begin
        if begin > end:
            result.kept.append((end, begin))
        end = max(end, min(unit.last, unit.end + gap) if unit.is_slice else unit.end)
        if unit.is_slice:
            result.breaks.append(end)
    if end < count:
        result.kept.append((end, count))
    return result


def _document_hash(ids: npt.NDArray[Any], token_texts: Sequence[bytes]) -> int:
    """A number below 2**64 that the text alone decides, whatever the machine and the vocabulary."""
    text = b"".join(map(token_texts.__getitem__, ids.tolist())) if token_texts else ids.astype("<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _documents(tokens: npt.NDArray[Any], marks: Marks, piece_lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each document; what stands before the first mark of a piece is one too."""
    begin = end = 0
    for length in piece_lengths:
        end += length
        inside = False  # the document waits for its end, where that is the same token as its beginning
        for offset in range(end - length, end, _BLOCK):
            ids = tokens[offset : min(end, offset + _BLOCK)]
            for found in (document_begins(ids, marks, inside=inside) + offset).tolist():
                if found > begin:
                    yield begin, found
                begin = found
            if marks.begin == marks.end:
                inside ^= bool(np.count_nonzero(ids == marks.begin) % 2)
        if end > begin:
            yield begin, end
        begin = end
