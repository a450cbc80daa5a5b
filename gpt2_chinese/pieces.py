"""The tokenized corpus as train.py sees it: the pieces read and checked, and the windows over them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gpt2_chinese.artifacts import read_json, sha256_of

MANIFEST = "manifest.json"
PROGRESS = ".progress.jsonl"  # there while make-tokenized.py is at work, or when it was interrupted
_PIECE = re.compile(r"tokenized_train_(0|[1-9]\d*)\.txt")
_BLOCK = 1 << 22  # bytes of a piece in memory at a time
_LONGEST_ID = 9  # digits; every number of so many fits 32 bits
_MEND = "run make-tokenized.py again"


@dataclass(frozen=True)
class Corpus:
    """All ids of all pieces in one array, in the order of the pieces."""

    tokens: npt.NDArray[Any]
    piece_lengths: tuple[int, ...]


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Read what make-tokenized.py says about the pieces; None where there is no manifest (files of the reference).

    Raises:
        ValueError: the manifest is damaged, or make-tokenized.py has not come to its end.
    """
    path = Path(folder) / MANIFEST
    if path.with_name(PROGRESS).exists():
        raise ValueError(f"{folder}: make-tokenized.py is still at work or was interrupted; {_MEND} (it goes on there)")
    if not path.is_file():
        return None
    manifest = read_json(path)
    try:
        for piece in manifest["pieces"]:
            assert isinstance(piece["file"], str) and isinstance(piece["sha256"], str)
        assert isinstance(manifest["vocabulary"]["sha256"], str) and isinstance(manifest["vocabulary"]["path"], str)
    except (AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of make-tokenized.py; {_MEND}") from error
    return dict(manifest)


def check_vocabulary(folder: str | Path, manifest: dict[str, Any] | None, vocab_file: str | Path) -> None:
    """Refuse a vocabulary other than the one that the pieces were made with.

    Raises:
        ValueError: it is another; the message names both files and the command that mends it.
    """
    if manifest is not None and manifest["vocabulary"]["sha256"] != sha256_of(vocab_file):
        raise ValueError(
            f"{vocab_file} is not the vocabulary that {Path(folder) / MANIFEST} was made with; "
            f"{_MEND}, with --vocab_filename {vocab_file}"
        )


def read_pieces(folder: str | Path, *, vocab_size: int, manifest: dict[str, Any] | None = None) -> Corpus:
    """Read `tokenized_train_{i}.txt` in numeric order, check them against the manifest and every id against the model.

    Ids are kept in 16 bits where `vocab_size` allows it, else in 32.

    Raises:
        FileNotFoundError: no piece, or one missing in the numbering or of the manifest.
        ValueError: a piece that the manifest does not describe or describes otherwise, something that is not a
            number, or an id outside the vocabulary; the message names file and position.
    """
    folder = Path(folder)
    numbers = _piece_numbers(folder)
    expected: dict[str, str] = {}
    if manifest is not None:
        expected = {piece["file"]: piece["sha256"] for piece in manifest["pieces"]}
        for name in expected:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / MANIFEST} lists {name}, which is not there; {_MEND}")
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    pieces = []
    for number in tqdm(range(len(numbers)), desc="reading pieces", unit="piece", leave=False, delay=1):
        path = folder / f"tokenized_train_{number}.txt"
        if manifest is not None and path.name not in expected:
            raise ValueError(f"{folder / MANIFEST} does not know {path}; delete that piece, or {_MEND}")
        tokens, sha256 = _read_piece(path, vocab_size, dtype)
        if manifest is not None and sha256 != expected[path.name]:
            raise ValueError(f"{path} is not the file that {folder / MANIFEST} describes; {_MEND}")
        pieces.append(tokens)
    return Corpus(np.concatenate(pieces), tuple(len(piece) for piece in pieces))


def _piece_numbers(folder: Path) -> list[int]:
    """The numbers of the pieces, which must be 0, 1, 2, ..."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: run make-tokenized.py first, or name it with --tokenized_data_path"
        )
    numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := _PIECE.fullmatch(path.name)))
    if not numbers:
        raise FileNotFoundError(f"there is no tokenized_train_0.txt in {folder}: run make-tokenized.py first")
    missing = sorted(set(range(numbers[-1])) - set(numbers))
    if missing:
        names = ", ".join(f"tokenized_train_{number}.txt" for number in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(
            f"{folder} has tokenized_train_{numbers[-1]}.txt, but not {names}{more}; {_MEND}, or delete the pieces "
            "left from an earlier run"
        )
    return numbers


def _read_piece(path: Path, vocab_size: int, dtype: type) -> tuple[npt.NDArray[Any], str]:
    """Read one piece block by block: its ids and its SHA-256."""
    digest = hashlib.sha256()
    parts: list[npt.NDArray[Any]] = [np.empty(0, dtype)]
    count = position = 0  # ids and bytes before this block
    rest = b""
    with open(path, "rb") as file:
        while True:
            block = file.read(_BLOCK)
            digest.update(block)
            text = rest + block
            # A number may go on in the next block.
            end = len(text) if not block else max(text.rfind(b" "), text.rfind(b"\n")) + 1
            text, rest = text[:end], text[end:]
            strange = text.translate(None, b"0123456789 \r\n\t")
            if strange:
                offset = position + text.index(strange[:1])
                raise ValueError(f"{path}, byte {offset}: {strange[:1]!r} is no part of an id; {_MEND}")
            ids = _parse(text)
            wrong = np.flatnonzero(ids >= vocab_size)
            if len(wrong):
                raise ValueError(
                    f"{path}, number {count + int(wrong[0]) + 1}: id {text.split()[wrong[0]].decode()} is outside the "
                    f"vocabulary of {vocab_size} tokens; the piece was made with another vocabulary: {_MEND}"
                )
            parts.append(ids.astype(dtype))
            count += len(ids)
            position += len(text)
            if not block:
                return np.concatenate(parts), digest.hexdigest()


def _parse(text: bytes) -> npt.NDArray[np.int64]:
    words = text.split()
    # A longer number is no id of any vocabulary; it need not be read to be refused.
    return np.fromiter((int(word[: _LONGEST_ID + 1]) for word in words), dtype=np.int64, count=len(words))


def window_starts(piece_lengths: Sequence[int], n_ctx: int, stride: int) -> npt.NDArray[np.int64]:
    """Where the windows begin in `Corpus.tokens`: `n_ctx` tokens every `stride`, the last one of a piece right-aligned.

    A piece that is shorter than a window is joined with the next ones, at the end with the one before, so every token
    is in a window; there is none if all pieces together are shorter than one. With `stride` below `n_ctx` every
    token but the first of a piece is also predicted from one before it.

    Example:
        >>> window_starts([10], n_ctx=4, stride=3)
        array([0, 3, 6])
        >>> window_starts([2, 3, 9, 1], n_ctx=4, stride=3)
        array([ 0,  1,  5,  8, 11])
    """
    assert 1 <= stride <= n_ctx
    spans: list[list[int]] = []  # begin and end of pieces, or of joined ones
    begin = end = 0
    for length in piece_lengths:
        end += length
        if end - begin >= n_ctx:
            spans.append([begin, end])
            begin = end
    if end > begin and spans:
        spans[-1][1] = end
    starts = [np.append(np.arange(begin, end - n_ctx, stride), end - n_ctx) for begin, end in spans]
    return np.concatenate([np.empty(0, np.int64), *starts])


def epoch_order(count: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch's windows: a permutation that only the seed and the epoch decide."""
    return np.random.default_rng([seed, epoch]).permutation(count)
