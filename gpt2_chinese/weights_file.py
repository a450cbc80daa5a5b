"""Weights from a file into private memory: nothing that happens to the file later reaches a model.

The safetensors package maps a file instead, so that a model would answer garbage when the file is overwritten, and die
of SIGBUS when it is truncated. The format (https://huggingface.co/docs/safetensors): the length of a JSON header in 8
bytes, the header with name, dtype, shape and place of each tensor, the tensors.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

MAX_HEADER = 4 << 20
"""Bytes of what a file says of its tensors: those of the deepest GPT-2 that is read (1,000 layers) need half of it."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Shapes = Mapping[str, tuple[int, ...]]
MEND = "copy it again, or train again"


class Entry(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_weights_file(
    path: Path, *, check: Callable[[Shapes], None] = lambda _: None, digest: Any = None
) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, in memory of their own.

    Args:
        path: `.safetensors`, or a pickle of torch.save, of which tensors alone are read.
        check: is given the names and shapes, of a safetensors file before memory is taken for its tensors; raises.
        digest: of hashlib; of a safetensors file it is told the bytes that were read.

    Raises:
        ValueError: the file is damaged or not of weights; the message names it.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, check, digest)
        return _read_pickle(path, check)
    except MemoryError:
        raise ValueError(
            f"the memory does not suffice for {path}; end other programs, or take a smaller model"
        ) from None


def _read_safetensors(path: Path, check: Callable[[Shapes], None], digest: Any) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file, ThreadPoolExecutor(1, "hashing") as hashing:
        entries, head = _read_header(path, file)
        check({name: entry.shape for name, entry in entries.items()})
        if digest is not None:
            digest.update(head)
        tensors = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
            view = memoryview(data.numpy().data)
            if file.readinto(view) != len(view):
                raise ValueError(f"{path} is damaged or no weights file: it ends too early; {MEND}")
            if digest is not None:
                hashing.submit(digest.update, view)
            tensors[name] = data.view(entry.dtype).view(entry.shape)
    return tensors


def _read_header(path: Path, file: IO[bytes]) -> tuple[dict[str, Entry], bytes]:
    """The tensors that a file describes, which fill it exactly, and the bytes before them."""

    def refuse(reason: str) -> ValueError:
        return ValueError(f"{path} is damaged or no weights file: {reason}; {MEND}")

    size = path.stat().st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(MAX_HEADER, size - 8):
        raise refuse("it has no header of safetensors")
    text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise refuse("its header is not JSON") from None
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(value) for name, value in header.items()}
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1] or (0, 0, 0, 0))[2]):
        if entry is None:
            raise refuse(f"it does not describe {name[:80]!r} as it must")
        if entry.begin != place:
            raise refuse("its tensors overlap or leave room between them")
        place = entry.end
    if place != size - 8 - length:
        raise refuse(f"it has {size:,} bytes and describes {place + 8 + length:,}")
    return {name: entry for name, entry in entries.items() if entry is not None}, head + text


def _entry(value: Any) -> Entry | None:
    """What a header says of a tensor; None if that makes none."""
    try:
        dtype, shape = _DTYPES[value["dtype"]], tuple(value["shape"])
        begin, end = value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        return None
    return Entry(dtype, shape, begin, end) if end - begin == math.prod(shape) * dtype.itemsize else None


def _read_pickle(path: Path, check: Callable[[Shapes], None]) -> dict[str, torch.Tensor]:
    _check_archive(path)
    try:
        # weights_only: a pickle can run code, and model folders come from the network
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"{path} is damaged or no weights file: {reason}; {MEND}") from error
    except (IndexError, ImportError, AssertionError, OverflowError, RecursionError, UnicodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or no weights file: {type(error).__name__}; {MEND}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} does not hold a model's weights by name; copy it again, or take another")
    for name, tensor in state.items():
        # The shape of a nested tensor cannot be asked for, and what is on the device meta has no numbers.
        if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(
                f"{path} is damaged or no weights file: {name[:80]!r} is sparse, nested or without numbers; {MEND}"
            )
    check({name: tuple(value.shape) for name, value in state.items()})
    return dict(state)


def _check_archive(path: Path) -> None:
    """Refuse an archive whose parts are larger than the file: torch writes them uncompressed."""
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(part.file_size for part in archive.infolist())
            described = max(
                (part.file_size for part in archive.infolist() if part.filename.endswith(".pkl")), default=0
            )
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or no weights file: {error}; {MEND}") from error
    if size > path.stat().st_size:
        raise ValueError(f"{path} is damaged or no weights file: its parts have {size:,} bytes; {MEND}")
    if described > MAX_HEADER:
        raise ValueError(f"{path} is damaged or no weights file: it takes {described:,} bytes to describe it; {MEND}")
