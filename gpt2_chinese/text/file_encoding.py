"""The encoding of a file, and of its lines where there are two in one file."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gpt2_chinese.text.encodings import (
    BAD_BYTE,
    BOMS,
    CANDIDATES,
    SAMPLE_BYTES,
    WIDE,
    EncodingNotTold,
    Reading,
    escaped_encoding,
    most_probable,
    read_as,
)

_LINES_COMPARED = 200  # of a file of two encodings
_TWO_PAY = 20.0  # so much more probable must two encodings be than one


@dataclass
class Sample:
    """Of a file read in blocks: whether all of it is valid UTF-8, and the lines that are not ASCII, up to a size.

    Attributes:
        head: the first bytes as they are, for marks of the byte order and UTF-16.
        lines: line number, from 1, and bytes, for lines with bytes outside ASCII.
        valid_utf8: whether everything so far is valid UTF-8.
        is_ascii: whether everything so far is ASCII.
        escapes: the beginning of the bytes from the first sign of an encoding of seven bits on.
    """

    head: bytes = b""
    lines: list[tuple[int, bytes]] = field(default_factory=list)
    valid_utf8: bool = True
    is_ascii: bool = True
    escapes: bytes = b""
    _size: int = 0
    _number: int = 1
    _unfinished: bytes = b""
    _utf8: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))

    @property
    def is_full(self) -> bool:
        """Whether more of the file changes nothing."""
        return not self.valid_utf8 and self._size >= SAMPLE_BYTES

    def add(self, block: bytes, *, final: bool = False) -> None:
        """Look at the next block of the file; `final` is for an empty one behind the last."""
        if len(self.head) < SAMPLE_BYTES:
            self.head += block[: SAMPLE_BYTES - len(self.head)]
        if not self.escapes and (places := [at for sign in (b"\x1b", b"~{") if (at := block.find(sign)) >= 0]):
            self.escapes = block[max(0, block.rfind(b"\n", 0, min(places))) :][:SAMPLE_BYTES]
        if self.valid_utf8:
            try:
                self._utf8.decode(block, final)
            except UnicodeDecodeError:
                self.valid_utf8 = False
        is_ascii = block.isascii()
        self.is_ascii = self.is_ascii and is_ascii
        if is_ascii and self._unfinished.isascii():
            self._number += block.count(b"\n")
            self._unfinished = block[block.rfind(b"\n") + 1 :][:SAMPLE_BYTES] if block else b""
        elif self._size < SAMPLE_BYTES:
            *lines, self._unfinished = (self._unfinished + block).split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._unfinished) > SAMPLE_BYTES:  # a file without line breaks
                self._take(self._unfinished)
                self._number -= 1
                self._unfinished = b""
        if final and self._size < SAMPLE_BYTES:
            self._take(self._unfinished)

    def _take(self, line: bytes) -> None:
        if self._size < SAMPLE_BYTES and not line.isascii():
            self.lines.append((self._number, line[:SAMPLE_BYTES]))
            self._size += len(line) + 1
        self._number += 1

    @property
    def wide_lines(self) -> bytes:
        """The lines outside ASCII as one text."""
        return b"\n".join(line for _, line in self.lines)[:SAMPLE_BYTES]


@dataclass(frozen=True)
class Told:
    """The encoding of a file.

    Attributes:
        encoding: the codec's name.
        also: another one, that some lines are in.
        changes_at: the first line that is in the other one.
        is_utf8_too: whether the file is valid UTF-8 as well, and read as something else.
    """

    encoding: str
    also: str | None = None
    changes_at: int = 0
    is_utf8_too: bool = False


def tell(sample: Sample) -> Told:
    """Tell a file's encoding: by its mark, as UTF-8 if it is valid, or by the most probable reading.

    Raises:
        EncodingNotTold: it cannot be told.
    """
    for mark, codec in BOMS:
        if sample.head.startswith(mark):
            return Told(codec)
    if sample.is_ascii and sample.escapes and (escaped := escaped_encoding(sample.escapes)) is not None:
        return Told(escaped, is_utf8_too=True)
    # UTF-16 has zero bytes for every ASCII character and line break, and UTF-32 has them everywhere.
    zeros = b"\0" in sample.head
    if sample.valid_utf8 and not zeros:
        return Told("utf-8")
    if zeros or len(sample.head) % 2 == 0:
        data = sample.head[: len(sample.head) // 4 * 4] if len(sample.head) == SAMPLE_BYTES else sample.head
        try:
            best = most_probable(data)
        except EncodingNotTold:
            best = None
        if best is not None and best.encoding in WIDE:
            return Told(best.encoding, is_utf8_too=sample.valid_utf8)
        if sample.valid_utf8:
            return Told("utf-8")
    try:
        best = most_probable(sample.wide_lines, wide=False)
    except EncodingNotTold:
        if (two := two_encodings(sample.lines)) is None:
            raise
        return two
    # A few lines in another encoding look like a few bad bytes.
    return (two_encodings(sample.lines) if best.bad_bytes else None) or Told(best.encoding)


def two_encodings(lines: Sequence[tuple[int, bytes]]) -> Told | None:
    """The two encodings that the lines of a file are in, the more frequent one first; None if there are not two."""
    encodings = [encoding for encoding in CANDIDATES if encoding not in WIDE]
    compared = lines[:_LINES_COMPARED]
    scores: list[list[float]] = []
    for _, line in compared:
        found = [read_as(line, encoding, CANDIDATES[encoding]) for encoding in encodings]
        scores.append([BAD_BYTE * len(line) if reading is None else reading.score for reading in found])
    single = max(sum(column) for column in zip(*scores, strict=True))
    pairs = [(a, b) for a in range(len(encodings)) for b in range(a)]
    best = max(pairs, key=lambda pair: sum(max(row[pair[0]], row[pair[1]]) for row in scores))
    if sum(max(row[best[0]], row[best[1]]) for row in scores) - single < _TWO_PAY:
        return None
    own: tuple[list[int], list[int]] = ([], [])
    for place, row in enumerate(scores):
        own[row[best[1]] > row[best[0]]].append(place)
    if not (own[0] and own[1]):
        return None
    for side, places in enumerate(own):
        reading = read_as(
            b"\n".join(compared[place][1] for place in places), encodings[best[side]], CANDIDATES[encodings[best[side]]]
        )
        if reading is None or not reading.is_language():
            return None
    # UTF-8 first, for what is valid UTF-8 is hardly anything else; or else the more frequent one.
    first = 0 if len(own[0]) >= len(own[1]) else 1
    if "utf-8" in (encodings[best[0]], encodings[best[1]]):
        first = 0 if encodings[best[0]] == "utf-8" else 1
    change = next(place for place in range(len(compared)) if (place in own[0]) != (0 in own[0]))
    return Told(encodings[best[first]], encodings[best[1 - first]], compared[change][0])


class StrangeLine(ValueError):
    """A line that is not in the file's encoding.

    Attributes:
        place: which of the lines, from 0.
        offset: where the bytes begin that are not in the encoding.
        rest: the bytes from there on.
    """

    def __init__(self, place: int, offset: int, rest: bytes) -> None:
        super().__init__(place, offset)
        self.place, self.offset, self.rest = place, offset, rest


class LineReader:
    """Reads lines of a file of which some may not be in its encoding: each in the encoding it is most probable in.

    Args:
        encoding: the file's.
        also: another one that is known of it.
        replacement: for bytes that are in none of them; None makes a line in another encoding an error.

    Attributes:
        other_lines: how many lines were read in which other encoding.
        bad_bytes: how many bytes were in none.
    """

    def __init__(self, encoding: str, also: str | None, replacement: str | None) -> None:
        self._encoding = encoding
        self._others = [] if also is None else [also]
        self._replacement = replacement
        self.other_lines: Counter[str] = Counter()
        self.bad_bytes = 0

    def read(self, data: bytes) -> str:
        """The text of whole lines.

        Raises:
            StrangeLine: a line is not in the encoding, and there is no replacement.
        """
        valid = _is_valid(data, self._encoding)
        if valid and (self._encoding == "utf-8" or data.isascii()):
            return data.decode(self._encoding)
        lines = data.split(b"\n")
        strange = [place for place, line in enumerate(lines) if not line.isascii() and self._is_strange(line)]
        if not strange and valid:
            return data.decode(self._encoding)
        if self._replacement is None:
            place = strange[0]
            before = sum(map(len, lines[:place])) + place
            offset = before + _bad_byte(lines[place], self._encoding)
            raise StrangeLine(place, offset, data[offset:])
        if not self._others:
            self._find_others([lines[place] for place in strange])
        known = set(strange)
        return "\n".join(
            self._read_strange(line) if place in known else line.decode(self._encoding)
            for place, line in enumerate(lines)
        )

    def _is_strange(self, line: bytes) -> bool:
        """Whether a line is not in the encoding, or more probable in UTF-8, in which it is valid too."""
        if not _is_valid(line, self._encoding):
            return True
        if self._encoding == "utf-8" or not _is_valid(line, "utf-8"):
            return False
        found = self._readings(line, ("utf-8", self._encoding))
        return bool(found) and max(found, key=lambda reading: reading.score).encoding == "utf-8"

    def _find_others(self, lines: list[bytes]) -> None:
        try:
            found = [most_probable(b"\n".join(lines)[:SAMPLE_BYTES], wide=False).encoding]
        except EncodingNotTold:
            two = two_encodings(list(enumerate(lines)))
            found = [] if two is None or two.also is None else [two.encoding, two.also]
        self._others += [encoding for encoding in found if encoding != self._encoding]

    def _readings(self, line: bytes, encodings: Iterable[str]) -> list[Reading]:
        found = (read_as(line, encoding, CANDIDATES[encoding]) for encoding in encodings)
        return [reading for reading in found if reading is not None]

    def _read_strange(self, line: bytes) -> str:
        encodings = dict.fromkeys((self._encoding, *self._others, *(["utf-8"] if _is_valid(line, "utf-8") else [])))
        best = max(self._readings(line, encodings), key=lambda reading: reading.score, default=None)
        encoding = self._encoding if best is None else best.encoding
        if encoding != self._encoding:
            self.other_lines[encoding] += 1

        def handle(error: UnicodeError) -> tuple[str, int]:
            assert isinstance(error, UnicodeDecodeError) and self._replacement is not None
            self.bad_bytes += error.end - error.start
            return self._replacement, error.end

        codecs.register_error("gpt2_chinese.line", handle)
        return line.decode(encoding, "gpt2_chinese.line")


def _is_valid(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _bad_byte(line: bytes, encoding: str) -> int:
    """Where the first byte is that is not in the encoding; 0 if there is none."""
    try:
        line.decode(encoding)
    except UnicodeDecodeError as error:
        return error.start
    return 0
