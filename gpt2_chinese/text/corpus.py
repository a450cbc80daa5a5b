"""TXT files and train.json as streams of documents, so that memory does not grow with the corpus."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpt2_chinese.artifacts import atomic_write

DOCUMENT_UNITS = ("line", "paragraph", "file")
ON_ERROR = ("stop", "skip", "replace")
TXT_SUFFIXES = (".txt", ".txt.gz")
_BLOCK = 1 << 20  # bytes or characters read at once

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def txt_files(folder: str | Path) -> list[Path]:
    """The TXT files of a folder, in the order of their names.

    Raises:
        FileNotFoundError: there is no such folder, or no TXT file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_path {folder}: there is no such folder; put your TXT files into one")
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(TXT_SUFFIXES) and path.is_file())
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
    """

    encoding: str = ""
    bad_bytes: int = 0
    nul_characters: int = 0


def open_bytes(path: Path) -> IO[bytes]:
    """Open a TXT file, through gzip if its name ends in .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


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

    Args:
        encoding: a Python codec, or "auto" (`detect_encoding`).
        on_error: "stop" raises at the first byte that is not in the encoding, "skip" leaves it out, "replace" puts
            U+FFFD in its place; the last two count it in `report`.
        progress: called with the number of bytes of the file on disk that have been read since the last call.

    Raises:
        ValueError: a byte is not in the encoding; the message has file, line and byte offset and the mend.
        OSError: the file cannot be read.
    """
    codec = detect_encoding(path) if encoding == "auto" else codecs.lookup(encoding).name
    if codec == "utf-8":
        codec = "utf-8-sig"
    report.encoding = codec.removesuffix("-sig")
    decoder = codecs.getincrementaldecoder(codec)(errors="strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    compressed = path.name.lower().endswith(".gz")
    fed = 0
    lines = 0
    held_return = ""
    try:
        with open_bytes(path) as file:
            final = False
            while not final:
                block = file.read(_BLOCK)
                final = not block
                state = decoder.getstate()
                held = state[0]  # the beginning of a character whose end was not in the last block
                start_offset = fed - len(held)
                fed += len(block)
                try:
                    raw = decoder.decode(block, final)
                except UnicodeDecodeError as error:
                    if on_error == "stop":
                        good = error.object[: error.start].decode(codec.removesuffix("-sig"), errors="ignore")
                        line = lines + len(re.findall(r"\r\n?|\n", held_return + good)) + 1
                        raise ValueError(
                            _decode_message(path, report.encoding, line, start_offset + error.start)
                        ) from None
                    decoder.setstate(state)
                    raw = _decode_past_errors(decoder, block, final, on_error, report)
                text = newlines.decode(raw, final)
                if raw:
                    held_return = "\r" if raw.endswith("\r") else ""  # it may be half a line end: not counted yet
                report.nul_characters += text.count("\0")
                lines += text.count("\n")
                if not compressed:
                    progress(len(block))
                if text:
                    yield text
        if compressed:
            progress(path.stat().st_size)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}; copy or compress it again") from None


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


def _decode_message(path: Path, encoding: str, line: int, offset: int) -> str:
    mend = "give the file's encoding"
    try:
        found = detect_encoding(path)
        if found.removesuffix("-sig") != encoding:
            mend = f"it looks like {found}: --encoding {found}"
    except ValueError:
        mend += ", such as --encoding gb18030, big5 or utf-16"
    return (
        f"{path}, line {line}, byte {offset}: not {encoding}; {mend} (--encoding auto finds it for each file; "
        "--on_error skip or replace continues after such bytes)"
    )


def detect_encoding(path: Path) -> str:
    """Tell a TXT file's encoding: UTF-8, UTF-16, UTF-32 (with its mark), GB18030 or Big5.

    A byte order mark decides; then many zero bytes in every second place (UTF-16); then whether the whole file is
    valid UTF-8; then which of GB18030 and Big5 makes common characters of it.

    Raises:
        ValueError: it cannot be told.
    """
    with open_bytes(path) as file:
        head = file.read(_BLOCK)
    for mark, codec in _BOMS:
        if head.startswith(mark):
            return codec
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if even + odd > len(head) // 20:
        # Chinese text in UTF-16 has few zero bytes, but its ASCII digits, spaces and line ends have, all on one side.
        if odd > 10 * even:
            return "utf-16-le"
        if even > 10 * odd:
            return "utf-16-be"
    if _decodes(path, "utf-8"):
        return "utf-8"
    scores = {codec: _common_share(head, codec) for codec in ("gb18030", "big5") if _decodes(path, codec)}
    if scores:
        best = max(scores, key=lambda codec: scores[codec])
        others = [score for codec, score in scores.items() if codec != best]
        if scores[best] >= 0.5 and all(scores[best] >= 1.5 * score for score in others):
            return best
    for codec in ("utf-16-le", "utf-16-be"):
        if len(head) % 2 == 0 and _common_share(head, codec) >= 0.7:
            return codec
    raise ValueError(
        f"{path}: the encoding cannot be told; give it, such as --encoding gb18030, or convert it to UTF-8"
    )


def _decodes(path: Path, codec: str) -> bool:
    decoder = codecs.getincrementaldecoder(codec)()
    try:
        with open_bytes(path) as file:
            while block := file.read(_BLOCK):
                decoder.decode(block)
        decoder.decode(b"", True)
    except UnicodeDecodeError:
        return False
    return True


def _common_share(head: bytes, codec: str) -> float:
    """The share of the characters outside ASCII that are everyday ones in the writing that the codec stands for.

    Everyday are the first-level characters of GB 2312 (rows 16 to 55) or of Big5 (lead bytes A4 to C6) and Chinese
    punctuation: text read with the wrong codec falls all over the second level.
    """
    text = codecs.getincrementaldecoder(codec)(errors="ignore").decode(head)
    wide = [character for character in text if not character.isascii()]
    if not wide:
        return 0.0
    home = "big5" if codec == "big5" else "gb2312"
    first, last = (0xA4, 0xC6) if home == "big5" else (0xB0, 0xD7)
    common = 0
    for character in wide:
        code = character.encode(home, errors="ignore")
        common += (len(code) == 2 and first <= code[0] <= last) or character in "，。！？：；、“”‘’（）《》「」『』…—　"
    return common / len(wide)


def split_documents(blocks: Iterable[str], unit: str) -> Iterator[str]:
    """Cut the text of one file into documents, stripped and not blank.

    Args:
        blocks: the text, in pieces of any size, lines ended by "\\n".
        unit: "line"; "paragraph" (it ends at a blank line; its line breaks are kept); "file".
    """
    if unit == "line":
        for line in split_lines(blocks):
            if document := line.strip():
                yield document
    elif unit == "paragraph":
        paragraph: list[str] = []
        for line in split_lines(blocks):
            if stripped := line.strip():
                paragraph.append(stripped)
            elif paragraph:
                yield "\n".join(paragraph)
                paragraph = []
        if paragraph:
            yield "\n".join(paragraph)
    else:
        assert unit == "file"
        if document := "".join(blocks).strip():
            yield document


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


def read_train_json_blocks(path: str | Path, *, progress: Callable[[int], object] | None = None) -> Iterator[list[str]]:
    """Give the documents of train.json, some at a time: a JSON array of strings, in any layout and of any size.

    `progress` is called now and then with the number of bytes read since the last call.

    Raises:
        FileNotFoundError: there is no such file; the message says which script writes it.
        ValueError: not UTF-8, or not a JSON array of strings; the message has the document's number and the place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: run build_trainfile.py first, or name the file with --raw_data_path"
        )
    with open(path, "rb") as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
        reported = 0
        try:
            for documents in _json_strings(file, path):
                yield documents
                if progress is not None and binary.tell() != reported:
                    progress(binary.tell() - reported)
                    reported = binary.tell()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); build it again with build_trainfile.py") from None


def _json_strings(file: IO[str], path: Path) -> Iterator[list[str]]:
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
            # A line break never stands inside a JSON string, so whole lines that end with a comma are whole documents,
            # and json.loads takes them all at once. What it refuses goes through the loop below, for a clear error.
            end = buffer.rfind(",\n", position)
            if end > position and buffer is not refused:
                try:
                    documents = json.loads(f"[{buffer[position:end]}]")
                except json.JSONDecodeError:
                    documents = []
                if documents and all(type(document) is str for document in documents):
                    number += len(documents)
                    position = end + 1
                    yield documents
                    continue
                refused = buffer
            end = _string_end(buffer, position + 1)
            while end < 0:
                # A document longer than the buffer: double it, so that the whole costs linear time.
                more = file.read(max(_BLOCK, len(buffer)))
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
