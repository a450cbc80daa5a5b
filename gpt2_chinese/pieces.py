"""The tokenized corpus as train.py sees it: the pieces read and checked, and the windows over them."""

from __future__ import annotations

import atexit
import hashlib
import re
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

from gpt2_chinese.artifacts import exclusive, read_json, replacing, sha256_of, write_json
from gpt2_chinese.tokenizer import BYTE_TOKENS, PART_PREFIX
from gpt2_chinese.vocabulary import MASK_ID, SPECIAL_TOKENS

MANIFEST = "manifest.json"
PROGRESS = ".progress.jsonl"  # there while make-tokenized.py is at work, or when it was interrupted
_PIECE = re.compile(r"tokenized_train_(0|[1-9]\d*)\.txt")
_BLOCK = 1 << 22  # bytes of a piece in memory at a time
_CACHE_FORMAT = 2
_MEND = "run make-tokenized.py again"


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


def read_pieces(
    folder: str | Path,
    *,
    vocab_size: int,
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
    paths = [folder / f"tokenized_train_{number}.txt" for number in _piece_numbers(folder)]
    expected: dict[str, str] = {}
    if manifest is not None:
        expected = {piece["file"]: piece["sha256"] for piece in manifest["pieces"]}
        for name in expected:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / MANIFEST} lists {name}, which is not there; {_MEND}")
        for path in paths:
            if path.name not in expected:
                raise ValueError(f"{folder / MANIFEST} does not know {path}; delete that piece, or {_MEND}")
    with ExitStack() as stack:
        cache, note = folder, ""
        while True:
            try:
                stack.enter_context(exclusive(cache))
                break
            except BlockingIOError:
                time.sleep(0.1)  # another process is at it, most likely another rank of this run
            except OSError as error:
                cache = Path(tempfile.mkdtemp(prefix="gpt2-chinese-"))
                atexit.register(shutil.rmtree, cache, ignore_errors=True)
                note = f"{folder} cannot be written ({error.strerror}): its ids are kept in {cache} during this run"
        corpus = _kept_tokens(cache, paths, vocab_size, expected, val_fraction)
        return replace(corpus or _keep_tokens(cache, paths, vocab_size, expected, val_fraction, token_texts), note=note)


def _mapped(path: Path, dtype: str) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _cache_files(cache: Path, val_fraction: float) -> tuple[Path, Path, Path]:
    """The ids, the ids held out, and what is known about both."""
    names = (f".tokens-{val_fraction}.bin", f".held_out-{val_fraction}.bin", f".tokens-{val_fraction}.json")
    return cache / names[0], cache / names[1], cache / names[2]


def _stamp(path: Path) -> list[Any]:
    """What changes when a piece is written again."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def _kept_tokens(
    cache: Path, paths: list[Path], vocab_size: int, expected: dict[str, str], val_fraction: float
) -> Corpus | None:
    """What an earlier run kept, or None if it is not of these pieces."""
    tokens, held_out, header = _cache_files(cache, val_fraction)
    try:
        known = read_json(header)
        if known["format"] != _CACHE_FORMAT or known["vocab_size"] != vocab_size:
            return None
        if known["stamps"] != [_stamp(path) for path in paths]:
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


def _keep_tokens(
    cache: Path,
    paths: list[Path],
    vocab_size: int,
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
            "stamps": [_stamp(path) for path in paths],
            "sha256": [],
            "piece_lengths": [],
            "documents": 0,
            "held_out_documents": 0,
            "held_out_tokens": 0,
        }
        smallest, largest = 1 << 64, 0  # of the documents' hashes
        with replacing(tokens, "wb") as kept_file, replacing(held_out, "wb") as held_out_file:
            for path in tqdm(paths, desc="reading pieces", unit="piece", leave=False, delay=1):
                digest = hashlib.sha256()
                length = 0
                blocks = _read_piece(path, vocab_size, digest)
                for ids in _documents(blocks) if limit else blocks:
                    known["documents"] += int(np.count_nonzero(ids == MASK_ID))
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
                    raise ValueError(f"{path} is not the file that {path.parent / MANIFEST} describes; {_MEND}")
                known["sha256"].append(digest.hexdigest())
                known["piece_lengths"].append(length)
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


def text_of_tokens(vocabulary: Sequence[str]) -> list[bytes]:
    """What each token adds to a text, without the spaces between words: the same text for every vocabulary."""
    byte_of = {token: bytes([value]) for value, token in enumerate(BYTE_TOKENS)}
    specials = dict.fromkeys(SPECIAL_TOKENS, b"") | {"[SEP]": b"\n", "[UNK]": "\ufffd".encode()}
    known = byte_of | specials
    return [
        known[token] if token in known else token.removeprefix(PART_PREFIX).encode("utf-8", "surrogatepass")
        for token in vocabulary
    ]


def _documents(blocks: Iterator[npt.NDArray[np.int64]]) -> Iterator[npt.NDArray[np.int64]]:
    """Cut the ids of a piece before every `[MASK]`."""
    pending: list[npt.NDArray[np.int64]] = []  # of the document at hand
    for ids in blocks:
        first, *others = np.split(ids, np.flatnonzero(ids == MASK_ID))
        pending.append(first)
        for begun in others:
            if any(map(len, pending)):
                yield np.concatenate(pending)
            pending = [begun]
    if any(map(len, pending)):
        yield np.concatenate(pending)


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


def _read_piece(path: Path, vocab_size: int, digest: Any) -> Iterator[npt.NDArray[np.int64]]:
    """Read the ids of one piece block by block; `digest` is told its bytes."""
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
            # A number too long for 64 bits becomes the largest of them, which is no id of any vocabulary.
            ids = np.fromstring(text, dtype=np.int64, sep=" ") if text.strip() else np.empty(0, np.int64)
            wrong = np.flatnonzero(ids >= vocab_size)
            if len(wrong):
                raise ValueError(
                    f"{path}, number {count + int(wrong[0]) + 1}: id {text.split()[wrong[0]].decode()} is outside the "
                    f"vocabulary of {vocab_size} tokens; the piece was made with another vocabulary: {_MEND}"
                )
            yield ids
            count += len(ids)
            position += len(text)
            if not block:
                return


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
