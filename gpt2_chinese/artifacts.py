"""Files that are whole or not there: temporary name, flush, rename; hashes and manifests beside them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: two runs that write the same file are not told apart there
    fcntl = None  # type: ignore[assignment]


MAX_SMALL = 2 << 20
"""Bytes of a configuration or a manifest, at most: Python needs up to thirty times as many for what is in them."""
MAX_LARGE = 64 << 20
"""Bytes of a tokenizer.json (the largest that were published have half of it), or of what tells of many pieces."""

_locked_descriptors: set[int] = set()


def drop_inherited_locks() -> None:
    """Let a forked worker not hold its parent's locks, which would outlive a parent that is killed.

    The descriptors are put on the null device and not closed, so that what a file object still has in its buffer
    goes nowhere.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in _locked_descriptors:
        os.dup2(null, descriptor)
    os.close(null)
    _locked_descriptors.clear()


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` only when the block ends without an error.

    What is written goes to a temporary name in the same folder, is flushed to the disk and renamed, so a reader
    sees the old file or the new one, never half of one. After an error the temporary file is removed and `path` is
    as it was; one that a killed run has left is written over. `mode` is "w" (UTF-8 text, "\\n" line ends) or "wb".

    Raises:
        BlockingIOError: another run is writing `path` at this moment.
        OSError: the folder cannot be written, or the disk is full; the message names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    locked = False
    try:
        make_folder(path.parent)
        with _locked(temporary, mode, text) as file:
            locked = True
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(temporary, path)  # while the lock is held, so that no other run takes the file up
        if fcntl is None:
            os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        if locked:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            # The system names the temporary file or none at all ("No space left on device").
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def _no_links(path: str, flags: int) -> int:
    """Open a file, but not where a link leads: in a folder that others may write, it could lead to any file of ours."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextmanager
def _locked(temporary: Path, mode: str, text: dict[str, str]) -> Iterator[IO[Any]]:
    """Open a temporary file, empty, for this run alone; the lock ends with the process, however that ends."""
    with open(temporary, mode.replace("w", "a"), opener=_no_links, **text) as file:  # type: ignore[call-overload]
        if os.fstat(file.fileno()).st_nlink > 1:
            raise OSError(errno.EEXIST, f"{temporary.name} is another name of a file; delete it")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The other run may have renamed its file between our open and our lock.
                ours = os.fstat(file.fileno()).st_ino == os.stat(temporary).st_ino
            except (BlockingIOError, FileNotFoundError):
                ours = False
            if not ours:
                raise BlockingIOError(errno.EAGAIN, "another run is writing it; wait for its end, or stop it")
        file.truncate(0)
        _locked_descriptors.add(file.fileno())
        try:
            yield file
        finally:
            _locked_descriptors.discard(file.fileno())


@contextmanager
def exclusive_lock(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this run alone; the hold ends with the process, however that ends.

    Raises:
        BlockingIOError: another run holds it.
    """
    folder = Path(folder)
    make_folder(folder)
    with open(folder / ".lock", "a", opener=_no_links, encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    errno.EAGAIN, "another run is writing into this folder; wait for its end, or stop it", str(folder)
                ) from None
        _locked_descriptors.add(file.fileno())
        try:
            yield
        finally:
            _locked_descriptors.discard(file.fileno())


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Let a full disk be an OSError that names `path`, in whatever way a library tells it.

    torch ends with "unexpected pos …" when what it writes does not arrive, and safetensors with a text of the system.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError):
            raise type(cause)(cause.errno, cause.strerror, str(path)) from error
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            if f"os error {number}" in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def flush_file(path: str | Path) -> None:
    """Write a file's contents to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def make_folder(folder: str | Path) -> None:
    """Make a folder and its parents, unless they are there, and write the names of the new ones to the disk."""
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        flush_folder(path.parent)


def flush_folder(folder: str | Path) -> None:
    """Write a folder's names to the disk, so that a rename outlives a power cut (POSIX only)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems flush no folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write lines of text, such as a vocabulary, whole or not at all."""
    with atomic_write(path) as file:
        for line in lines:
            file.write(line + "\n")


def read_text_file(path: str | Path, *, most: int | None = None) -> str:
    """Read a file of UTF-8 text, without the mark that some editors put before it.

    Args:
        most: bytes, if there is a number that no good file goes beyond.

    Raises:
        ValueError: the file is not UTF-8, or has more bytes; the message names it.
    """
    with open(path, "rb") as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"{path} has more than {most:,} bytes; it is damaged or another file, copy it again")
        data = file.read()
    try:
        # Universal newlines, as of every text that is read.
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.start}; save it as UTF-8, or copy it again if it is damaged"
        ) from error


def read_json(path: str | Path, *, most: int = MAX_SMALL) -> Any:
    """Read a JSON file of at most so many bytes.

    Raises:
        ValueError: the file is too large, not UTF-8 or not JSON; the message names it, with line and column.
    """
    text = read_text_file(path, most=most)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; it is damaged, copy it again") from None
    except ValueError:  # Python converts no numbers of thousands of digits
        raise ValueError(f"{path} has a number of too many digits; it is damaged, copy it again") from None


def has_shape(value: Any, shape: Any) -> bool:
    """Whether a JSON value is of the types that `shape` says.

    A type stands for its own values (true is no int), None for null, a tuple for any of its members, a list of one
    member for any number of such, a dict for an object with these keys. A key that is missing counts as null.

    Example:
        >>> has_shape({"pieces": [{"tokens": 5}]}, {"pieces": [{"tokens": int}], "documents": (int, None)})
        True
    """
    if isinstance(shape, tuple):
        return any(has_shape(value, one) for one in shape)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(has_shape(value.get(key), one) for key, one in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(member, shape[0]) for member in value)
    return value is None if shape is None else type(value) is shape
