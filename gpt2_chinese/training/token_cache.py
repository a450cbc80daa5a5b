"""The ids of all pieces as arrays on the disk: those to train on, and the held-out documents.

Text files of numbers are read once; later runs, and the other ranks, map what the first one has kept.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gpt2_chinese.artifacts import MAX_LARGE, atomic_write, exclusive_lock, read_json, write_json
from gpt2_chinese.command_line import localized
from gpt2_chinese.text.pieces import HOW_TO_FIX, MANIFEST, piece_numbers, read_piece
from gpt2_chinese.text.vocabulary import Marks
from gpt2_chinese.training.hold_out import HoldOut, split

Stamp = tuple[int, int, int]

_CACHE_FORMAT = 3
_COPIED = 1 << 20  # tokens at once


@dataclass(frozen=True)
class Corpus:
    """All ids of all pieces in one file, in the order of the pieces; what is held out is in another one.

    Files are mapped once: a run goes on with what it began with when a later one puts its own in their place.

    Attributes:
        dtype: of the ids in both files.
        piece_lengths: without what is held out; a piece counts as several where a slice was cut out of a document.
        held_out_lengths: of the documents held out, and of the slices of long documents, in the order of the file.
        gap_tokens: left out on both sides of slices.
        sha256: of the pieces.
        note: where the files are, if not beside the pieces.
        stamps: of both files, which a process that is given this corpus must find again.
    """

    path: Path
    dtype: str
    piece_lengths: tuple[int, ...]
    documents: int
    sha256: str
    held_out_path: Path | None = None
    held_out_lengths: tuple[int, ...] = ()
    held_out_documents: int = 0
    held_out_slices: int = 0
    gap_tokens: int = 0
    note: str = ""
    stamps: tuple[Stamp, ...] = ()

    @cached_property
    def tokens(self) -> npt.NDArray[Any]:
        """The ids to train on, mapped from the disk: they take no memory until they are looked at."""
        return self._mapped(self.path)

    @cached_property
    def held_out(self) -> npt.NDArray[Any]:
        """The ids that are held out, mapped from the disk."""
        return np.empty(0, self.dtype) if self.held_out_path is None else self._mapped(self.held_out_path)

    def _mapped(self, path: Path) -> npt.NDArray[Any]:
        with open(path, "rb") as file:
            found = _stamp(file.fileno())
            if self.stamps and found not in self.stamps:
                raise ValueError(f"{path}: another run has put other pieces there; start this run again")
            # What is mapped stays, whatever becomes of its name.
            return np.memmap(file, self.dtype, mode="r") if found[1] else np.empty(0, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """What other processes are given: they map the files themselves."""
        return {name: value for name, value in vars(self).items() if name not in ("tokens", "held_out")}

    @property
    def held_out_tokens(self) -> int:
        return sum(self.held_out_lengths)


def read_pieces(
    folder: str | Path,
    *,
    vocab_size: int,
    marks: Marks,
    manifest: dict[str, Any] | None = None,
    hold_out: HoldOut | None = None,
    token_texts: Sequence[bytes] = (),
) -> Corpus:
    """Read `tokenized_train_{i}.txt` in numeric order, check them against the manifest and every id against the model.

    Their ids are kept in files beside them, `.tokens.bin` and, with a validation set, `.training-*.bin` and
    `.held_out-*.bin`, in 16 bits where `vocab_size` allows it, else in 32. These are used again as long as names, sizes
    and times of the pieces are the same (and their SHA-256 in the manifest, where there is one), and made again when
    they are not; processes that come at once wait for the first. Where the folder cannot be written they are made in a
    temporary one.

    Args:
        marks: what begins and ends a document.
        hold_out: how much to hold out as validation set, if any (`hold_out.split` decides what).
        token_texts: what each id stands for (`text_of_tokens`). With them the same text is held out whatever the
            vocabulary.

    Raises:
        FileNotFoundError: no piece, or one missing in the numbering or of the manifest.
        ValueError: a piece that the manifest does not describe or describes otherwise, something that is not a
            number, or an id outside the vocabulary; the message names file and position.
    """
    folder = Path(folder)
    paths = [folder / f"tokenized_train_{number}.txt" for number in piece_numbers(folder)]
    expected: dict[str, str] = {}
    if manifest is not None:
        expected = {piece["file"]: piece["sha256"] for piece in manifest["pieces"]}
        for name in expected:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / MANIFEST} lists {name}, which is not there; {HOW_TO_FIX}")
        for path in paths:
            if path.name not in expected:
                raise ValueError(f"{folder / MANIFEST} does not know {path}; delete that piece, or {HOW_TO_FIX}")
    with ExitStack() as stack:
        cache, note = folder, ""
        while True:
            try:
                stack.enter_context(exclusive_lock(cache))
                break
            except BlockingIOError:
                time.sleep(0.1)  # another process is at it, most likely another rank of this run
            except OSError as error:
                cache = Path(tempfile.mkdtemp(prefix="gpt2-chinese-"))
                atexit.register(shutil.rmtree, cache, ignore_errors=True)
                note = f"{folder} cannot be written ({error.strerror}): its ids are kept in {cache} during this run"
        corpus = _cached_tokens(cache, paths, vocab_size, expected) or _cache_tokens(
            cache, paths, vocab_size, marks, expected
        )
        if hold_out is not None and hold_out.fraction:
            corpus = _cached_split(cache, corpus, hold_out) or _cache_split(cache, corpus, marks, hold_out, token_texts)
        # Mapped while nobody else can exchange the files.
        files = [path for path in (corpus.path, corpus.held_out_path) if path is not None]
        corpus = replace(corpus, note=note, stamps=tuple(_stamp(path) for path in files))
        _ = corpus.tokens, corpus.held_out
        return corpus


def _stamp(file: int | Path) -> Stamp:
    """What tells a file from one that has taken its place."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _file_key(path: Path) -> list[Any]:
    """What changes when a piece is written again."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _has_tokens(path: Path, dtype: str, count: int) -> bool:
    """Whether a file of ids is as long as it was written."""
    return path.stat().st_size == count * np.dtype(dtype).itemsize


def _cached_tokens(cache: Path, paths: list[Path], vocab_size: int, expected: dict[str, str]) -> Corpus | None:
    """What an earlier run kept, or None if it is not of these pieces."""
    try:
        known = read_json(cache / ".tokens.json", most=MAX_LARGE)
        if known["format"] != _CACHE_FORMAT or known["vocab_size"] != vocab_size:
            return None
        if known["stamps"] != [_file_key(path) for path in paths]:
            return None
        if expected and known["sha256"] != [expected[path.name] for path in paths]:
            return None
        corpus = _corpus(cache, known)
        return corpus if _has_tokens(corpus.path, corpus.dtype, sum(corpus.piece_lengths)) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # there is none, or it is damaged; it is made again


def _corpus(cache: Path, known: dict[str, Any]) -> Corpus:
    return Corpus(
        path=cache / ".tokens.bin",
        dtype=known["dtype"],
        piece_lengths=tuple(known["piece_lengths"]),
        documents=known["documents"],
        sha256=hashlib.sha256("".join(known["sha256"]).encode()).hexdigest(),
    )


def _cache_tokens(cache: Path, paths: list[Path], vocab_size: int, marks: Marks, expected: dict[str, str]) -> Corpus:
    """Read the pieces block by block into one file."""
    (cache / ".tokens.json").unlink(missing_ok=True)  # from here on the files may not fit
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    stamps = [_file_key(path) for path in paths]
    digests, piece_lengths, begins = [], [], 0
    with atomic_write(cache / ".tokens.bin", "wb") as file:
        for path in tqdm(paths, desc=localized("reading pieces"), unit=localized(" pieces"), leave=False, delay=1):
            digest = hashlib.sha256()
            length = 0
            for ids in read_piece(path, vocab_size, digest):
                begins += int(np.count_nonzero(ids == marks.begin))
                file.write(ids.astype(dtype).tobytes())
                length += len(ids)
            if expected and digest.hexdigest() != expected[path.name]:
                raise ValueError(f"{path} is not the file that {path.parent / MANIFEST} describes; {HOW_TO_FIX}")
            digests.append(digest.hexdigest())
            piece_lengths.append(length)
    known = {
        "format": _CACHE_FORMAT,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "stamps": stamps,
        "sha256": digests,
        "piece_lengths": piece_lengths,
        "documents": begins // 2 if marks.begin == marks.end else begins,
    }
    write_json(cache / ".tokens.json", known)
    return _corpus(cache, known)


def _split_files(cache: Path, hold_out: HoldOut) -> tuple[Path, Path, Path]:
    """The ids to train on, those held out, and what is known about both."""
    name = hold_out.name()
    return cache / f".training-{name}.bin", cache / f".held_out-{name}.bin", cache / f".training-{name}.json"


def _cached_split(cache: Path, corpus: Corpus, hold_out: HoldOut) -> Corpus | None:
    """What an earlier run kept, or None if it is not of this corpus."""
    training, held_out, header = _split_files(cache, hold_out)
    try:
        known = read_json(header, most=MAX_LARGE)
        if known["of"] != [_CACHE_FORMAT, corpus.sha256, corpus.dtype]:
            return None
        found = _with_split(corpus, training, held_out, known)
        is_whole = _has_tokens(training, corpus.dtype, sum(found.piece_lengths)) and _has_tokens(
            held_out, corpus.dtype, found.held_out_tokens
        )
        return found if is_whole else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _with_split(corpus: Corpus, training: Path, held_out: Path, known: dict[str, Any]) -> Corpus:
    return replace(
        corpus,
        path=training,
        piece_lengths=tuple(known["piece_lengths"]),
        held_out_path=held_out,
        held_out_lengths=tuple(known["held_out_lengths"]),
        held_out_documents=known["held_out_documents"],
        held_out_slices=known["held_out_slices"],
        gap_tokens=known["gap_tokens"],
    )


def _cache_split(cache: Path, corpus: Corpus, marks: Marks, hold_out: HoldOut, token_texts: Sequence[bytes]) -> Corpus:
    """Copy what is trained on into one file and what is held out into another one."""
    training, held_out, header = _split_files(cache, hold_out)
    header.unlink(missing_ok=True)
    tokens = corpus.tokens
    parts = split(tokens, marks, hold_out, token_texts, corpus.piece_lengths)
    for path, ranges in ((training, parts.kept), (held_out, parts.held_out)):
        with atomic_write(path, "wb") as file:
            for begin, end in ranges:
                for start in range(begin, end, _COPIED):
                    file.write(tokens[start : min(end, start + _COPIED)].tobytes())
    piece_lengths = _lengths_between(parts.kept, [*np.cumsum(corpus.piece_lengths).tolist(), *parts.breaks])
    held_out_lengths = [end - begin for begin, end in parts.held_out]
    known = {
        "of": [_CACHE_FORMAT, corpus.sha256, corpus.dtype],
        "piece_lengths": piece_lengths,
        "held_out_lengths": held_out_lengths,
        "held_out_documents": parts.documents,
        "held_out_slices": parts.slices,
        "gap_tokens": len(tokens) - sum(piece_lengths) - sum(held_out_lengths),
    }
    write_json(header, known)
    return _with_split(corpus, training, held_out, known)


def _lengths_between(kept: list[tuple[int, int]], bounds: list[int]) -> list[int]:
    """How many of the tokens in ranges `kept` lie between two bounds; both in order but for the bounds.

    Example:
        >>> _lengths_between([(0, 4), (6, 10)], [5, 10])
        [4, 4]
    """
    places = np.array(sorted(bounds), np.int64)
    begins, ends = (np.array(side, np.int64) for side in zip(*kept, strict=True)) if kept else (places[:0],) * 2
    before = np.concatenate([[0], np.cumsum(ends - begins)])
    number = np.searchsorted(begins, places, side="right")  # ranges that begin before the place
    beyond = np.maximum(0, ends[number - 1] - places) if len(begins) else 0
    up_to = before[number] - np.where(number > 0, beyond, 0)
    return np.diff(up_to, prepend=0).tolist()
