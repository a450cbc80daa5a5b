"""The ids of all pieces as arrays on the disk: those to train on, and the held-out documents.

Text files of numbers are read once; later runs, and the other ranks, map what the first one has kept.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gpt2_chinese.artifacts import atomic_write, exclusive_lock, read_json, write_json
from gpt2_chinese.text.pieces import HOW_TO_FIX, MANIFEST, document_begins, piece_numbers, read_piece
from gpt2_chinese.text.vocabulary import Marks

_CACHE_FORMAT = 2


@dataclass(frozen=True)
class Corpus:
    """All ids of all pieces in one file, in the order of the pieces; documents held out are in another one."""

    path: Path
    held_out_path: Path
    dtype: str  # of the ids in both files
    piece_lengths: tuple[int, ...]  # without the documents held out
    documents: int
    held_out_documents: int
    held_out_tokens: int
    sha256: str  # of the pieces
    note: str = ""  # where the files are, if not beside the pieces

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """The ids to train on, mapped from the disk: they take no memory until they are looked at."""
        return _mapped(self.path, self.dtype)

    @property
    def held_out(self) -> npt.NDArray[Any]:
        """The ids of the documents held out, mapped from the disk."""
        return _mapped(self.held_out_path, self.dtype)


def read_pieces(
    folder: str | Path,
    *,
    vocab_size: int,
    marks: Marks,
    manifest: dict[str, Any] | None = None,
    val_fraction: float = 0.0,
    token_texts: Sequence[bytes] = (),
) -> Corpus:
    """Read `tokenized_train_{i}.txt` in numeric order, check them against the manifest and every id against the model.

    Their ids are kept in files beside them, `.tokens-{val_fraction}.bin` and `.held_out-{val_fraction}.bin`, in 16
    bits where `vocab_size` allows it, else in 32. These are used again as long as names, sizes and times of the pieces
    are the same (and their SHA-256 in the manifest, where there is one), and made again when they are not; processes
    that come at once wait for the first. Where the folder cannot be written they are made in a temporary one.

    Args:
        marks: what begins and ends a document.
        val_fraction: the share of documents to hold out, from 0 to below 1. Which ones is decided by a hash of each,
            so a document stays held out when others come and go. Above 0 there is at least one, unless the corpus has
            a single document.
        token_texts: what each id stands for (`text_of_tokens`). With them the hash is of the text, and the same
            documents are held out whatever the vocabulary; without, it is of the ids.

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
        corpus = _cached_tokens(cache, paths, vocab_size, expected, val_fraction)
        return replace(
            corpus or _cache_tokens(cache, paths, vocab_size, marks, expected, val_fraction, token_texts), note=note
        )


def _mapped(path: Path, dtype: str) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _cache_files(cache: Path, val_fraction: float) -> tuple[Path, Path, Path]:
    """The ids, the ids held out, and what is known about both."""
    names = (f".tokens-{val_fraction}.bin", f".held_out-{val_fraction}.bin", f".tokens-{val_fraction}.json")
    return cache / names[0], cache / names[1], cache / names[2]


def _file_key(path: Path) -> list[Any]:
    """What changes when a piece is written again."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _cached_tokens(
    cache: Path, paths: list[Path], vocab_size: int, expected: dict[str, str], val_fraction: float
) -> Corpus | None:
    """What an earlier run kept, or None if it is not of these pieces."""
    tokens, held_out, header = _cache_files(cache, val_fraction)
    try:
        known = read_json(header)
        if known["format"] != _CACHE_FORMAT or known["vocab_size"] != vocab_size:
            return None
        if known["stamps"] != [_file_key(path) for path in paths]:
            return None
        if expected and known["sha256"] != [expected[path.name] for path in paths]:
            return None
        corpus = _corpus(tokens, held_out, known)
        whole = [sum(corpus.piece_lengths), corpus.held_out_tokens]
        size = np.dtype(corpus.dtype).itemsize
        if [tokens.stat().st_size, held_out.stat().st_size] != [count * size for count in whole]:
            return None
        return corpus
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # there is none, or it is damaged; it is made again


def _corpus(tokens: Path, held_out: Path, known: dict[str, Any]) -> Corpus:
    return Corpus(
        path=tokens,
        held_out_path=held_out,
        dtype=known["dtype"],
        piece_lengths=tuple(known["piece_lengths"]),
        documents=known["documents"],
        held_out_documents=known["held_out_documents"],
        held_out_tokens=known["held_out_tokens"],
        sha256=hashlib.sha256("".join(known["sha256"]).encode()).hexdigest(),
    )


def _cache_tokens(
    cache: Path,
    paths: list[Path],
    vocab_size: int,
    marks: Marks,
    expected: dict[str, str],
    val_fraction: float,
    token_texts: Sequence[bytes],
) -> Corpus:
    """Read the pieces block by block into the files; the hash of a document decides into which."""
    tokens, held_out, header = _cache_files(cache, val_fraction)
    header.unlink(missing_ok=True)  # from here on the files and it may not fit
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    limit = int(val_fraction * 2.0**64)
    while True:
        known: dict[str, Any] = {
            "format": _CACHE_FORMAT,
            "vocab_size": vocab_size,
            "dtype": dtype,
            "stamps": [_file_key(path) for path in paths],
            "sha256": [],
            "piece_lengths": [],
            "documents": 0,
            "held_out_documents": 0,
            "held_out_tokens": 0,
        }
        begins = 0
        smallest, largest = 1 << 64, 0  # of the documents' hashes
        with atomic_write(tokens, "wb") as kept_file, atomic_write(held_out, "wb") as held_out_file:
            for path in tqdm(paths, desc="reading pieces", unit="piece", leave=False, delay=1):
                digest = hashlib.sha256()
                length = 0
                blocks = read_piece(path, vocab_size, digest)
                for ids in _documents(blocks, marks) if limit else blocks:
                    begins += int(np.count_nonzero(ids == marks.begin))
                    number = _document_hash(ids, token_texts) if limit else 0
                    smallest, largest = min(smallest, number), max(largest, number)
                    if number < limit:
                        held_out_file.write(ids.astype(dtype).tobytes())
                        known["held_out_documents"] += 1
                        known["held_out_tokens"] += len(ids)
                    else:
                        kept_file.write(ids.astype(dtype).tobytes())
                        length += len(ids)
                if expected and digest.hexdigest() != expected[path.name]:
                    raise ValueError(f"{path} is not the file that {path.parent / MANIFEST} describes; {HOW_TO_FIX}")
                known["sha256"].append(digest.hexdigest())
                known["piece_lengths"].append(length)
        known["documents"] = begins // 2 if marks.begin == marks.end else begins
        if limit and known["held_out_documents"] == 0 and smallest < 1 << 64:
            limit = smallest + 1  # so few documents that the fraction holds none out: take the one next to it
        elif known["held_out_documents"] and not any(known["piece_lengths"]):
            limit = largest if smallest < largest else 0  # one is left to be trained on, and a single one is that
        else:
            break
    write_json(header, known)
    return _corpus(tokens, held_out, known)


def _document_hash(ids: npt.NDArray[np.int64], token_texts: Sequence[bytes]) -> int:
    """A number below 2**64 that the text alone decides, whatever the machine and the vocabulary."""
    text = b"".join(map(token_texts.__getitem__, ids.tolist())) if token_texts else ids.astype("<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _documents(blocks: Iterator[npt.NDArray[np.int64]], marks: Marks) -> Iterator[npt.NDArray[np.int64]]:
    """Cut the ids of a piece before every document."""
    pending: list[npt.NDArray[np.int64]] = []  # of the document at hand
    inside = False  # it waits for its end, where that is the same token as its beginning
    for ids in blocks:
        begins = document_begins(ids, marks, inside=inside)
        if marks.begin == marks.end:
            inside ^= bool(np.count_nonzero(ids == marks.begin) % 2)
        first, *others = np.split(ids, begins)
        pending.append(first)
        for begun in others:
            if any(map(len, pending)):
                yield np.concatenate(pending)
            pending = [begun]
    if any(map(len, pending)):
        yield np.concatenate(pending)
