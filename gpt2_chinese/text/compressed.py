"""The bytes of TXT files, through gzip where the name says so; damage is named with its place."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

_DISK_BLOCK = 1 << 16  # bytes of a compressed file read at once
_TEXT_BLOCK = 1 << 20  # bytes given at once
_GZIP = b"\x1f\x8b"

# What lies under a text's name on people's disks, by its first bytes.
_OTHER_KINDS = (
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "a zip archive or a document of Word (.docx)"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive"),
    (re.compile(rb"Rar!\x1a\x07"), "a RAR archive"),
    (re.compile(rb"\xfd7zXZ\x00"), "compressed with xz"),
    (re.compile(rb"BZh[1-9]1AY&SY"), "compressed with bzip2"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "compressed with zstd"),
    (re.compile(rb"%PDF-"), "a PDF"),
    (re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), "a document of Office (.doc, .xls)"),
    (re.compile(rb"\{\\rtf1"), "an RTF document"),
    (re.compile(rb"SQLite format 3\x00"), "a database"),
    (re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a"), "an image"),
)


class DamagedFile(ValueError):
    """A file that cannot be read to its end; the message is one line with file, place and mend."""


def is_compressed(path: Path) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.name.lower().endswith(".gz")


def byte_blocks(path: Path, *, on_damage: Callable[[str], object] | None = None) -> Iterator[tuple[bytes, int]]:
    """Give the bytes of a text in blocks, each with the number of bytes of the file on disk that it took.

    Args:
        on_damage: where a compressed file is cut, altered or followed by rubbish it is told so in a sentence, and what
            could be read until there is given; without it that is an error.

    Raises:
        DamagedFile: the file is damaged, or it is not what its name says.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(16)
    for sign, kind in _OTHER_KINDS:
        if sign.match(head):
            raise DamagedFile(f"{path} is not a text but {kind}; save it as a text file in UTF-8, or move it away")
    if is_compressed(path):
        if head and not head.startswith(_GZIP):
            raise DamagedFile(f"{path} is not compressed, though its name ends in .gz; name it {path.stem}")
        yield from _gzip_blocks(path, on_damage)
        return
    if head.startswith(_GZIP):
        raise DamagedFile(f"{path} is compressed with gzip, though its name does not say so; name it {path.name}.gz")
    with open(path, "rb") as file:
        while block := file.read(_TEXT_BLOCK):
            yield block, len(block)


def _gzip_blocks(path: Path, on_damage: Callable[[str], object] | None) -> Iterator[tuple[bytes, int]]:
    """The text of a gzip file of any number of members; zero bytes behind them are padding."""

    def damaged(what: str, mend: str) -> None:
        if on_damage is None:
            raise DamagedFile(f"{path}{what}; {mend}")
        on_damage("it" + what if what.startswith(" is") else what.removeprefix(", "))

    again = "copy or compress it again (--on_error skip or replace takes what can be read)"
    position = 0  # in the compressed file, of the next byte that the decompressor gets
    members = 0
    decompressor = None  # while inside a member
    with open(path, "rb") as file:
        while data := file.read(_DISK_BLOCK):
            taken = len(data)
            while data:
                if decompressor is None:
                    rest = data.lstrip(b"\0") if members else data
                    position += len(data) - len(rest)
                    data = rest
                    if not data:
                        break
                    if members and data[:2] != _GZIP[: len(data[:2])]:
                        left = len(data) + len(file.read())
                        damaged(
                            f", byte {position:,}: {left:,} bytes that are not gzip follow the compressed text",
                            "cut them off, or compress it again (--on_error skip or replace leaves them out)",
                        )
                        return
                    decompressor = zlib.decompressobj(wbits=31)
                before = decompressor.copy()
                try:
                    text = decompressor.decompress(data, _TEXT_BLOCK)
                except zlib.error:
                    text, good, problem = _up_to_the_error(before, data)
                    damaged(f", byte {position + good:,}: the compressed text is altered ({problem})", again)
                    yield text, taken
                    return
                left_over = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
                position += len(data) - len(left_over)
                data = left_over
                if decompressor.eof:
                    decompressor, members = None, members + 1
                if text:
                    yield text, taken
                    taken = 0
            if taken:
                yield b"", taken
    if decompressor is not None or not members:
        damaged(f" is cut off at byte {position:,}, where the compressed text is not at its end", again)


def _up_to_the_error(decompressor: zlib._Decompress, data: bytes) -> tuple[bytes, int, str]:
    """What can be decompressed byte by byte, how many bytes that takes, and what is wrong with the next one."""
    text = b""
    for place in range(len(data)):
        try:
            text += decompressor.decompress(data[place : place + 1])
        except zlib.error as error:
            return text, place, str(error).partition(": ")[2] or str(error)
    raise AssertionError("the whole was refused")
