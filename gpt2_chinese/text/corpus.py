"""TXT files and train.json as streams of documents, so that memory does not grow with the corpus."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpt2_chinese.artifacts import atomic_write
from gpt2_chinese.text.compressed import byte_blocks
from gpt2_chinese.text.encodings import (
    CANDIDATES,
    SAMPLE_BYTES,
    EncodingNotTold,
    is_multibyte,
    is_wide,
    most_probable,
)
from gpt2_chinese.text.file_encoding import LineReader, Sample, StrangeLine, Told, tell
from gpt2_chinese.text.file_names import is_hidden_or_lock, natural_key

DOCUMENT_UNITS = ("line", "paragraph", "file")
ON_ERROR = ("stop", "skip", "replace")
TXT_SUFFIXES = (".txt", ".txt.gz")
_BLOCK = 1 << 20  # bytes read at once
_ODD_SPACES = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"  # control characters that are white space, save tab and line ends

# What shows nothing: white space, controls, formats, and the letters and signs that are made to be invisible.
_INVISIBLE = (
    r"\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff"
)
_BLANK = re.compile(f"[{_INVISIBLE}]*")


def txt_files(folder: str | Path, *, passed_over: list[Path] | None = None) -> list[Path]:
    """The TXT files of a folder, in the natural order of their names.

    Args:
        passed_over: gets the hidden files and locks of systems and editors that have a text's name.

    Raises:
        FileNotFoundError: there is no such folder, or no TXT file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_path {folder}: there is no such folder; put your TXT files into one")
    found = [path for path in folder.iterdir() if path.name.lower().endswith(TXT_SUFFIXES) and path.is_file()]
    files = sorted((path for path in found if not is_hidden_or_lock(path)), key=lambda path: natural_key(path.name))
    if passed_over is not None:
        passed_over += sorted(path for path in found if is_hidden_or_lock(path))
    if not files:
        raise FileNotFoundError(
            f"--data_path {folder}: there is no .txt or .txt.gz file in it; put your texts there, one document a line"
        )
    return files


@dataclass
class DecodeReport:
    """What decoding one file has found.

    Attributes:
        encoding: the codec it was read with.
        bad_bytes: bytes that are not in the encoding and were skipped or replaced.
        nul_characters: U+0000, mostly the sign of a wrong encoding.
        other_lines: lines that were read in another encoding, by its name.
        is_utf8_too: whether the file is valid UTF-8 and was read as something else.
        damage: what is wrong with a compressed file, of which only a part was read.
        odd_spaces: page breaks and other white space of control characters that became spaces.
    """

    encoding: str = ""
    bad_bytes: int = 0
    nul_characters: int = 0
    other_lines: Counter[str] = field(default_factory=Counter)
    is_utf8_too: bool = False
    damage: str = ""
    odd_spaces: int = 0

    def warnings(self, path: Path, on_error: str) -> list[str]:
        """What a person should know of the file, a sentence each."""
        said = []
        if self.is_utf8_too:
            said.append(
                f"it is valid UTF-8 and was read as {self.encoding}; if the text is wrong, use --encoding utf-8"
            )
        for encoding, lines in self.other_lines.items():
            said.append(f"{lines:,} lines are not {self.encoding} and were read as {encoding}")
        if self.bad_bytes:
            done = "skipped" if on_error == "skip" else "replaced by U+FFFD"
            said.append(f"{self.bad_bytes:,} bytes are not {self.encoding} and were {done}")
        if self.damage:
            said.append(f"it was read in part only: {self.damage}")
        if self.nul_characters:
            said.append(f"{self.nul_characters:,} NUL characters; if this is a text in UTF-16, use --encoding utf-16")
        warnings = [f"warning: {path}: {sentence}" for sentence in said]
        if self.odd_spaces:
            warnings.append(f"note: {path}: {self.odd_spaces:,} page breaks and vertical tabs became spaces")
        return warnings


def check_encoding(name: str) -> str:
    """Give back "auto" or the name of a codec for text.

    Raises:
        ValueError: Python knows no such codec.
    """
    try:
        if name != "auto" and not codecs.lookup(name)._is_text_encoding:
            raise LookupError
    except LookupError:
        raise ValueError(
            f"--encoding {name}: there is no such encoding; use utf-8, gb18030, big5, utf-16 or auto"
        ) from None
    return name


def read_text(
    path: Path, *, encoding: str, on_error: str, report: DecodeReport, progress: Callable[[int], object]
) -> Iterator[str]:
    """Give the text of a file in blocks; line ends of all three kinds become "\\n", a byte order mark is left out.

    Page breaks and other control characters that are white space become spaces.

    Args:
        encoding: a Python codec, or "auto" (`detect_encoding`).
        on_error: "stop" raises at the first byte that is not in the encoding, "skip" leaves it out, "replace" puts
            U+FFFD in its place; the last two count it in `report`, take what can be read of a damaged gzip file, and
            with "auto" read each line in the encoding that it is in.
        progress: called with the number of bytes of the file on disk that have been read since the last call.

    Raises:
        ValueError: a byte is not in the encoding, or the file is damaged; the message has file, place and mend.
        OSError: the file cannot be read.
    """
    told = tell_encoding(path, on_error=on_error) if encoding == "auto" else Told(codecs.lookup(encoding).name)
    codec = "utf-8-sig" if told.encoding == "utf-8" else told.encoding
    report.encoding = told.encoding.removesuffix("-sig")
    report.is_utf8_too = told.is_utf8_too

    def on_damage(problem: str) -> None:
        report.damage = problem

    blocks = byte_blocks(path, on_damage=None if on_error == "stop" else on_damage)
    if encoding == "auto" and report.encoding in CANDIDATES and not is_wide(codec):
        raw = _decode_by_line(path, blocks, told, on_error, report, progress)
    else:
        raw = _decode(path, blocks, codec, encoding, on_error, report, progress)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    is_first = True
    for text in raw:
        text = newlines.decode(text)
        if is_first and text:
            text, is_first = text.removeprefix("\ufeff"), False
        report.nul_characters += text.count("\0")
        for character in _ODD_SPACES:
            if character in text:
                report.odd_spaces += text.count(character)
                text = text.replace(character, " ")
        if text:
            yield text
    if text := newlines.decode("", final=True):
        yield text


def _decode(
    path: Path,
    blocks: Iterator[tuple[bytes, int]],
    codec: str,
    encoding: str,
    on_error: str,
    report: DecodeReport,
    progress: Callable[[int], object],
) -> Iterator[str]:
    """Decode the blocks of a file in one encoding."""
    decoder = codecs.getincrementaldecoder(codec)(errors="strict")
    # Whether a file that the user says is something else is valid UTF-8.
    utf8 = codecs.getincrementaldecoder("utf-8")() if encoding != "auto" and is_multibyte(codec) else None
    seen_wide = False
    fed = 0
    lines = 0
    held_return = ""
    for block, taken in _with_end(blocks):
        final = not block and not taken
        state = decoder.getstate()
        held = state[0]  # the beginning of a character whose end was not in the last block
        start_offset = fed - len(held)
        fed += len(block)
        try:
            raw = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            if on_error == "stop":
                good = error.object[: error.start].decode(codec.removesuffix("-sig"), errors="ignore")
                line = lines + _line_ends(held_return + good) + 1
                found = _how_to_fix(path, encoding, report.encoding, error.object[error.start :])
                place = f"{path}, line {line}, byte {start_offset + error.start}"
                raise ValueError(f"{place}: not {report.encoding}; {found}") from None
            decoder.setstate(state)
            raw = _decode_past_errors(decoder, block, final, on_error, report)
        if raw:
            counted = held_return + raw
            held_return = "\r" if raw.endswith("\r") else ""  # it may be half a line end: not counted yet
            lines += _line_ends(counted.removesuffix("\r"))
        if utf8 is not None:
            try:
                utf8.decode(block, final)
                seen_wide = seen_wide or not block.isascii()
            except UnicodeDecodeError:
                utf8 = None
        progress(taken)
        yield raw
    report.is_utf8_too = report.is_utf8_too or (utf8 is not None and seen_wide)


def _line_ends(text: str) -> int:
    """How many line ends of all three kinds there are."""
    returns = text.count("\r")
    return text.count("\n") + (returns - text.count("\r\n") if returns else 0)


def _with_end(blocks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The blocks that are not empty, and an empty one behind them."""
    for block, taken in blocks:
        if block or taken:
            yield block, taken
    yield b"", 0


def _decode_by_line(
    path: Path,
    blocks: Iterator[tuple[bytes, int]],
    told: Told,
    on_error: str,
    report: DecodeReport,
    progress: Callable[[int], object],
) -> Iterator[str]:
    """Decode whole lines, each in the encoding that it is in, or stop where one is in another than the file's."""
    reader = LineReader(report.encoding, told.also, {"stop": None, "skip": "", "replace": "\ufffd"}[on_error])
    unfinished: list[bytes] = []
    fed = lines = 0
    is_first = True
    for block, taken in _with_end(blocks):
        is_last = not (block or taken)
        end = block.rfind(b"\n") + 1
        unfinished.append(block[:end])
        if end or is_last:
            data = b"".join(unfinished)
            fed += len(data)
            if is_first and report.encoding == "utf-8":
                data = data.removeprefix(codecs.BOM_UTF8)
            try:
                yield reader.read(data)
            except StrangeLine as error:
                fix = _how_to_fix(path, "auto", report.encoding, error.rest)
                number, place = lines + error.place + 1, fed - len(data) + error.offset
                raise ValueError(f"{path}, line {number}, byte {place}: not {report.encoding}; {fix}") from None
            lines += data.count(b"\n")
            unfinished, is_first = [], False
        unfinished.append(block[end:])
        report.bad_bytes, report.other_lines = reader.bad_bytes, reader.other_lines
        progress(taken)


def _decode_past_errors(decoder: Any, block: bytes, final: bool, on_error: str, report: DecodeReport) -> str:
    """Decode a block again, byte sequences that are not in the encoding skipped or replaced and counted."""
    replacement = "" if on_error == "skip" else "\ufffd"

    def handle(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        report.bad_bytes += error.end - error.start
        return replacement, error.end

    codecs.register_error("gpt2_chinese.count", handle)
    decoder.errors = "gpt2_chinese.count"
    try:
        return decoder.decode(block, final)
    finally:
        decoder.errors = "strict"


def _how_to_fix(path: Path, asked: str, encoding: str, rest: bytes) -> str:
    """What to do about a byte that is not in the encoding; `rest` is the file from there on."""
    go_on = "--on_error skip or replace continues after such bytes"
    try:
        if asked == "auto":
            found = most_probable(rest[:SAMPLE_BYTES], wide=False).encoding
            if found != encoding:
                return f"from here on it looks like {found}; --on_error skip or replace reads each line as what it is"
            return f"the rest of the file is {encoding}; {go_on}"
        told = tell_encoding(path)
        found = told.encoding.removesuffix("-sig")
        if told.also is not None:
            return f"it looks like {found} and {told.also} in one file; --encoding auto tells them apart"
        if found != encoding:
            return f"it looks like {found}: --encoding {found} (--encoding auto finds it for each file; {go_on})"
    except ValueError:
        pass
    mend = "" if asked == "auto" else "give the file's encoding, such as --encoding gb18030, big5 or utf-16 "
    return f"{mend}(--encoding auto finds it for each file; {go_on})" if mend else go_on


def tell_encoding(path: Path, *, on_error: str = "stop") -> Told:
    """Tell a TXT file's encoding or encodings, by its first lines outside ASCII and whether all of it is UTF-8.

    Raises:
        ValueError: it cannot be told; or there are two and `on_error` is "stop"; or the file is damaged.
    """
    sample = Sample()
    for block, _ in byte_blocks(path, on_damage=None if on_error == "stop" else lambda problem: None):
        sample.add(block)
        if sample.is_full:
            break
    else:
        sample.add(b"", final=True)
    try:
        told = tell(sample)
    except EncodingNotTold as error:
        raise ValueError(
            f"{path}: the encoding cannot be told: {error}; give it, such as --encoding gb18030, or convert it to UTF-8"
        ) from None
    if told.also is not None and on_error == "stop":
        raise ValueError(
            f"{path}, line {told.changes_at}: the encoding changes here; some lines are {told.encoding}, others "
            f"{told.also}; --on_error skip or replace reads each line as what it is, or convert the file to UTF-8"
        )
    return told


def detect_encoding(path: Path) -> str:
    """The encoding of a TXT file, as `tell_encoding` tells it."""
    return tell_encoding(path).encoding


def split_documents(blocks: Iterable[str], unit: str) -> Iterator[str]:
    """Cut the text of one file into documents, stripped and not blank; what shows nothing is blank.

    Args:
        blocks: the text, in pieces of any size, lines ended by "\\n".
        unit: "line"; "paragraph" (it ends at a blank line; its line breaks are kept); "file".
    """
    if unit == "line":
        for line in split_lines(blocks):
            if document := strip_text(line):
                yield document
    elif unit == "paragraph":
        paragraph: list[str] = []
        for line in split_lines(blocks):
            if stripped := strip_text(line):
                paragraph.append(stripped)
            elif paragraph:
                yield "\n".join(paragraph)
                paragraph = []
        if paragraph:
            yield "\n".join(paragraph)
    else:
        assert unit == "file"
        if document := strip_text("".join(blocks)):
            yield document


def strip_text(text: str) -> str:
    """A text without white space and invisible characters around it; nothing of one that shows nothing."""
    text = text.strip()
    while text and (text[0] in "\ufeff\u200b" or text[-1] in "\ufeff\u200b"):
        text = text.strip("\ufeff\u200b").strip()
    return "" if _BLANK.fullmatch(text) else text


def split_lines(blocks: Iterable[str]) -> Iterator[str]:
    """Give the lines of a text; only "\\n" ends one (`str.splitlines` would also break at U+2028 and others)."""
    unfinished: list[str] = []
    for block in blocks:
        first, *rest = block.split("\n")
        unfinished.append(first)
        if rest:
            yield "".join(unfinished)
            yield from rest[:-1]
            unfinished = [rest[-1]]
    yield "".join(unfinished)


@contextmanager
def train_json_writer(path: str | Path) -> Iterator[Any]:
    """Write documents to a JSON array of strings, one a line; the file takes its name only when the block ends.

    Example:
        >>> with train_json_writer("data/train.json") as write:
        ...     write("一个文档")
    """
    with atomic_write(path) as file:
        separator = "[\n"

        def write(document: str) -> None:
            nonlocal separator
            file.write(separator + json.dumps(document, ensure_ascii=False))
            separator = ",\n"

        yield write
        file.write("[]\n" if separator == "[\n" else "\n]\n")


_SPACE = re.compile(r"[ \t\n\r]*")


def read_train_json(path: str | Path, *, progress: Callable[[int], object] | None = None) -> Iterator[str]:
    """Give the documents of train.json one by one; otherwise as `read_train_json_blocks`."""
    for block in read_train_json_blocks(path, progress=progress):
        yield from block


def read_train_json_blocks(
    path: str | Path,
    *,
    progress: Callable[[int], object] | None = None,
    read: Callable[[bytes], object] | None = None,
) -> Iterator[list[str]]:
    """Give the documents of train.json, some at a time: a JSON array of strings, in any layout and of any size.

    Args:
        progress: called now and then with the number of bytes read since the last call.
        read: called with all bytes of the file, part by part.

    Raises:
        FileNotFoundError: there is no such file; the message says which script writes it.
        ValueError: not UTF-8, or not a JSON array of strings; the message has the document's number and the place.
    """
    path = Path(path)
    if path.is_dir():
        mend = (
            f"give {path / 'train.json'}" if (path / "train.json").is_file() else "run build_trainfile.py on it first"
        )
        raise ValueError(f"--raw_data_path {path} is a folder, not the file that build_trainfile.py writes; {mend}")
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: run build_trainfile.py first, or name the file with --raw_data_path"
        )
    with open(path, "rb") as binary:
        reported = 0
        try:
            for documents in _json_strings(_Utf8(binary, read), path):
                yield documents
                if progress is not None and binary.tell() != reported:
                    progress(binary.tell() - reported)
                    reported = binary.tell()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); build it again with build_trainfile.py") from None


class _Utf8:
    """Reads a binary file as UTF-8, which takes io.TextIOWrapper twice the time."""

    def __init__(self, file: IO[bytes], read: Callable[[bytes], object] | None) -> None:
        self._file = file
        self._read = read
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def read(self, size: int) -> str:
        """Some characters, of about so many bytes; "" at the end of the file."""
        while block := self._file.read(size):
            if self._read is not None:
                self._read(block)
            if text := self._decoder.decode(block):
                return text
        return self._decoder.decode(b"", final=True)


def _json_strings(file: _Utf8, path: Path) -> Iterator[list[str]]:
    buffer = ""
    position = 0  # of what comes next, in the buffer
    discarded = 0  # characters of the file before the buffer
    number = 0
    refused = None

    def fail(problem: str) -> ValueError:
        return ValueError(
            f"{path}, character {discarded + position}, after document {number}: {problem}; it must be a JSON array "
            "of strings, as build_trainfile.py writes it"
        )

    def next_character() -> str:
        """Give the next character that is not white space, "" at the end; `position` is on it."""
        nonlocal buffer, position, discarded
        while True:
            position = _SPACE.match(buffer, position).end()  # type: ignore[union-attr]
            if position < len(buffer):
                return buffer[position]
            discarded += position
            buffer, position = file.read(_BLOCK), 0
            if not buffer:
                return ""

    if next_character() != "[":
        raise fail("it does not begin with [")
    position += 1
    if next_character() == "]":
        position += 1
    else:
        while True:
            if next_character() != '"':
                raise fail("a string is missing here")
            # json.loads takes all whole documents of the buffer at once. What it refuses goes through the loop below,
            # for a clear error; so does a buffer in which no document is seen to end, and none is looked for again.
            end = -1 if buffer is refused else _last_end(buffer, position)
            if end > position:
                try:
                    documents = json.loads(f"[{buffer[position:end]}]")
                except json.JSONDecodeError:
                    documents = []
                if documents and set(map(type, documents)) == {str}:
                    number += len(documents)
                    position = buffer.index(",", end) + 1
                    yield documents
                    continue
            refused = buffer
            end = _string_end(buffer, position + 1)
            while end < 0:
                # A document longer than the buffer. A character has at most four bytes, so that this doubles the buffer
                # at least, and the whole costs linear time.
                more = file.read(max(_BLOCK, 4 * (len(buffer) - position)))
                if not more:
                    raise fail("the file ends inside a string")
                discarded += position
                buffer, position = buffer[position:] + more, 0
                end = _string_end(buffer, 1)
            try:
                document = json.loads(buffer[position:end])
            except json.JSONDecodeError as error:
                raise fail(f"no JSON string ({error.msg})") from None
            number += 1
            yield [document]
            position = end
            separator = next_character()
            position += 1
            if separator == "]":
                break
            if separator != ",":
                position -= 1
                raise fail("a comma or ] is missing here")
    if next_character():
        raise fail("there is something behind the closing ]")


def _last_end(buffer: str, position: int) -> int:
    """Where the last document that is seen to end before a comma ends, or -1.

    A line break never stands inside a JSON string. A quotation mark before a comma may, behind a backslash; what is
    cut there is no JSON.
    """
    for separator in (",\n", '", "', '","'):
        end = buffer.rfind(separator, position)
        if end > position:
            return end + separator.startswith('"')
    return -1


def _string_end(buffer: str, start: int) -> int:
    """The index behind the quote that ends the string whose text begins at `start`, or -1 if it is not there."""
    quote = buffer.find('"', start)
    while quote >= 0:
        backslashes = quote
        while backslashes > start and buffer[backslashes - 1] == "\\":
            backslashes -= 1
        if (quote - backslashes) % 2 == 0:
            return quote + 1
        quote = buffer.find('"', quote + 1)
    return -1
