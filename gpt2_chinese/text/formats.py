"""The files of a folder as texts: plain, compressed, JSON lines, CSV, Markdown, EPUB, DOCX, HTML and SRT.

Everything is read as a stream but HTML, EPUB and DOCX files, of which one is in memory at a time. What a folder has
beside them is passed over, and named with the reason. Packages are imported only when a file needs them.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import posixpath
import re
import stat
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

from gpt2_chinese.text.corpus import DecodeReport, read_text, split_lines
from gpt2_chinese.text.file_names import is_hidden_or_lock, natural_key

TEXT_SUFFIXES = (".txt", ".md", ".srt")
RECORD_SUFFIXES = (".jsonl", ".csv", ".tsv")
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
BOOK_SUFFIXES = (".epub", ".docx")
SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES + HTML_SUFFIXES + BOOK_SUFFIXES
"""What is read; all but the last two also with .gz behind."""

TEXT_FIELDS = ("text", "content", "body", "正文", "内容", "文本")
"""Names of the field that is the text of a record, where none is given."""

SECTION = "\x1e"
"""A line of its own between the parts of an e-book (the ASCII control character for this)."""

SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx", "icon\r")
MAX_BOOK_BYTES = 1 << 30
_RECORDS_LOOKED_AT = 100  # to find the field of the text
_MAX_ROW_LINES = 5_000
_PINNED = {"selectolax": "selectolax==1.0.2", "docx": "python-docx==1.2.0"}

_ADVICE = {
    ".json": "write one JSON object a line and call it .jsonl",
    ".doc": "save it as .docx",
    ".wps": "save it as .docx",
    ".rtf": "save it as .docx",
    ".odt": "save it as .docx",
    ".pdf": "export its text as .txt",
    ".mobi": "convert it to .epub",
    ".azw3": "convert it to .epub",
    ".azw": "convert it to .epub",
    ".xlsx": "save it as .csv",
    ".xls": "save it as .csv",
    ".zip": "unpack it",
    ".rar": "unpack it",
    ".7z": "unpack it",
    ".tar": "unpack it",
    ".tgz": "unpack it",
    ".parquet": "export it as .jsonl",
    ".vtt": "convert it to .srt",
    ".ass": "convert it to .srt",
}

# Elements that stand on lines of their own in a browser.
_BLOCKS = frozenset(
    "address article aside blockquote body caption dd details div dl dt fieldset figcaption figure footer form h1 h2 "
    "h3 h4 h5 h6 header hr html legend li main nav ol option p pre section summary table tbody td tfoot th thead title "
    "tr ul".split()
)
_UNSEEN = ("script", "style", "noscript", "template", "head", "svg", "iframe", "object", "select", "button")


@dataclass(frozen=True)
class PassedOver:
    """Something of the folder that is not read, and why."""

    path: Path
    reason: str


@dataclass
class Listing:
    """What is in a folder: the files that are read, in order, and what is passed over."""

    files: list[Path] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)


@dataclass
class FileReport(DecodeReport):
    """What reading one file has found, beside what decoding has.

    Attributes:
        text_field: the field or column that the texts of the records are in.
        records: read from JSON lines or a table, with or without a text.
        records_without_text: the field is missing, is no string or is blank.
        bad_records: lines that are not JSON, or not an object or a string.
        first_without_text, first_bad: their lines, from 1; 0 is none.
    """

    text_field: str = ""
    records: int = 0
    records_without_text: int = 0
    bad_records: int = 0
    first_without_text: int = 0
    first_bad: int = 0


def format_of(path: PurePath) -> str:
    """The suffix that decides how a file is read, such as ".jsonl" of "a.jsonl.gz"; "" for what is not read."""
    name = path.name.lower()
    bare = name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if bare.endswith(suffix) and (bare == name or suffix not in BOOK_SUFFIXES):
            return suffix
    return ""


def has_records(path: PurePath) -> bool:
    """Whether a file has several texts: JSON lines, CSV and TSV."""
    return format_of(path) in RECORD_SUFFIXES


def list_files(folder: str | Path, *, own: Iterable[str | Path] = (), may_be_empty: bool = False) -> Listing:
    """The files of a folder and its subfolders that are read, in the natural order of their names.

    Args:
        own: files that the script writes; they are neither read nor named.
        may_be_empty: whether there may be nothing in it that is read.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it that is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_path {folder}: there is no such folder; put your texts into one")
    listing = Listing()
    _walk(folder, {os.path.realpath(path) for path in own}, {os.path.realpath(folder)}, listing)
    listing.files.sort(key=lambda path: [natural_key(part) for part in path.relative_to(folder).parts])
    if not listing.files and not may_be_empty:
        others = f" (passed over: {_shorten(listing.passed_over)})" if listing.passed_over else ""
        raise FileNotFoundError(
            f"--data_path {folder}: there is no .txt or .txt.gz file in it, nor another that is read "
            f"({' '.join(SUFFIXES)}){others}; put your texts there, one document a line"
        )
    return listing


def _walk(folder: Path, own: set[str], seen: set[str], listing: Listing) -> None:
    def pass_over(path: Path, reason: str) -> None:
        listing.passed_over.append(PassedOver(path, reason))

    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        pass_over(folder, f"the folder cannot be read ({error.strerror})")
        return
    for path in entries:
        real = os.path.realpath(path)
        if real in own:
            continue
        name = path.name.lower()
        if is_hidden_or_lock(path) or name in SYSTEM_FILES:
            pass_over(path, "a hidden, lock or system file")
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            pass_over(path, "a link to nowhere" if path.is_symlink() else f"cannot be read ({error.strerror})")
            continue
        if stat.S_ISDIR(mode):
            if real in seen:
                pass_over(path, "a link to a folder that is read already")
                continue
            seen.add(real)
            files = len(listing.files)
            _walk(path, own, seen, listing)
            if format_of(path) and len(listing.files) == files:
                pass_over(path, "a folder that is called like a file, with nothing to read in it")
        elif not stat.S_ISREG(mode):
            pass_over(path, "neither a file nor a folder")
        elif format_of(path):
            listing.files.append(path)
        else:
            suffix = path.suffix.lower()
            advice = _ADVICE.get(suffix)
            pass_over(path, f"{suffix or 'no suffix'} is not read" + (f": {advice}" if advice else ""))


def passed_over_lines(passed_over: Sequence[PassedOver], most: int = 20) -> list[str]:
    """What was passed over, as lines for a person: by reason, the first names of each, all counted."""
    if not passed_over:
        return []
    reasons: dict[str, list[Path]] = {}
    for item in passed_over:
        reasons.setdefault(item.reason, []).append(item.path)
    lines = [f"passed over: {len(passed_over):,}"]
    for reason, paths in reasons.items():
        named = ", ".join(str(path) for path in paths[:most])
        more = f" and {len(paths) - most:,} more" if len(paths) > most else ""
        lines.append(f"  {reason} ({len(paths):,}): {named}{more}")
    return lines


def record_notes(path: Path, report: FileReport) -> list[str]:
    """What reading the records of a file has found, as lines for a person."""
    notes = []
    if report.records and report.text_field:
        notes.append(f"{path}: {report.records:,} records, their text is in {report.text_field}")
    if report.records_without_text:
        notes.append(
            f"warning: {path}: {report.records_without_text:,} of {report.records:,} records have no text in "
            f"{report.text_field or 'them'} and are passed over, the first in line {report.first_without_text:,}"
        )
    if report.bad_records:
        notes.append(
            f"warning: {path}: {report.bad_records:,} lines are no JSON objects or strings and are passed over, the "
            f"first is line {report.first_bad:,}"
        )
    return notes


def _shorten(passed_over: Sequence[PassedOver]) -> str:
    named = "; ".join(f"{item.path.name}, {item.reason}" for item in passed_over[:3])
    return named + (f"; {len(passed_over) - 3:,} more" if len(passed_over) > 3 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Texts of a file.


def read_texts(
    path: Path,
    *,
    encoding: str,
    on_error: str,
    text_field: str | None = None,
    report: FileReport,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[Iterable[str]]:
    """Give the texts of a file, each as blocks of any size with lines ended by "\\n": one, or one a record.

    A text must be read to its end before the next is asked for.

    Args:
        encoding, on_error, progress: as `corpus.read_text`.
        text_field: the field of JSON lines or the column of a table (a name, or a number from 1) that has the text,
            or several with commas between, whose texts become lines; None finds it (`TEXT_FIELDS`).

    Raises:
        ValueError: the file is damaged, its text field cannot be told, or a package is missing; the message names the
            file and what to do.
        OSError: the file cannot be read.
    """
    suffix = format_of(path)
    if suffix in BOOK_SUFFIXES:
        yield _read_epub(path, report) if suffix == ".epub" else _read_docx(path, report)
        progress(path.stat().st_size)
        return
    blocks = read_text(path, encoding=encoding, on_error=on_error, report=report, progress=progress)
    if suffix == ".jsonl":
        yield from _read_json_lines(path, blocks, text_field, on_error, report)
    elif suffix in RECORD_SUFFIXES:
        yield from _read_table(path, blocks, text_field, report, tabs=suffix == ".tsv")
    elif suffix in HTML_SUFFIXES:
        yield [html_text("".join(blocks), path)]
    elif suffix == ".srt":
        yield _read_srt(blocks)
    else:
        yield blocks


def _read_json_lines(
    path: Path, blocks: Iterable[str], text_field: str | None, on_error: str, report: FileReport
) -> Iterator[list[str]]:
    def values() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(split_lines(blocks), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                problem = "" if isinstance(value, dict | str) else "neither an object nor a string"
            except (ValueError, RecursionError) as error:
                problem = f"not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else 'nested too deeply'})"
            if not problem:
                yield number, value
            elif on_error == "stop":
                raise ValueError(
                    f"{path}, line {number}: {problem}; correct the line, or pass such lines over with --on_error skip"
                )
            else:
                report.records += 1
                report.bad_records += 1
                report.first_bad = report.first_bad or number

    lines = values()
    looked_at = list(islice(lines, _RECORDS_LOOKED_AT))
    objects = [value for _, value in looked_at if isinstance(value, dict)]
    names = _text_fields(path, objects, text_field, report) if objects else []
    for number, value in chain(looked_at, lines):
        parts = [value] if isinstance(value, str) else [value.get(name) for name in names]
        yield from _record_text(parts, number, report)


def _record_text(parts: Sequence[Any], number: int, report: FileReport) -> Iterator[list[str]]:
    report.records += 1
    text = "\n".join(part for part in parts if isinstance(part, str) and part.strip())
    if text:
        # Records come from anywhere, so the three kinds of line ends do too.
        yield [text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode()]
    else:
        report.records_without_text += 1
        report.first_without_text = report.first_without_text or number


def _text_fields(
    path: Path, records: Sequence[dict[str, Any]], text_field: str | None, report: FileReport
) -> list[str]:
    """The fields that are the text of a record.

    Raises:
        ValueError: the one that is asked for is in none of the records, or it cannot be told.
    """
    fields: dict[str, bool] = {}  # in the order of their appearance: whether one of them is a text
    for record in records:
        for name, value in record.items():
            fields[name] = fields.get(name, False) or (isinstance(value, str) and _is_text(value))
    there = ", ".join(fields) or "none"
    if text_field is not None:
        names = [name.strip() for name in text_field.split(",")]
        missing = [name for name in names if name not in fields]
        if missing:
            raise ValueError(f"--text_field {text_field}: {path} has no field {missing[0]}; its fields are {there}")
    else:
        named = [name for name in fields if name.strip().lower() in TEXT_FIELDS]
        texts = [name for name, is_text in fields.items() if is_text]
        names = named if len(named) == 1 else texts
        if len(names) != 1:
            raise ValueError(
                f"{path}: which field is the text cannot be told; its fields are {there}; give one or several with "
                f"--text_field, such as --text_field {texts[-1] if texts else 'text'}, or move the file away"
            )
    report.text_field = ",".join(names)
    return names


def _is_text(value: str) -> bool:
    """Whether a value is a text: neither blank nor a number, a date or an address."""
    return bool(value.strip()) and not re.fullmatch(r"[\d\s.,:;/+%eETZ-]+|https?://\S+", value.strip())


def _read_table(
    path: Path, blocks: Iterable[str], text_field: str | None, report: FileReport, *, tabs: bool
) -> Iterator[list[str]]:
    lines = (line + "\n" for line in split_lines(blocks))
    first = next((line for line in lines if line.strip()), "")
    delimiter = "\t" if tabs else max(",;\t", key=first.count)
    csv.field_size_limit((1 << 31) - 1)
    reader = csv.reader(chain([first], lines), delimiter=delimiter)

    def rows() -> Iterator[tuple[int, list[str]]]:
        end = 0
        try:
            for row in reader:
                begin, end = end + 1, reader.line_num
                if end - begin >= _MAX_ROW_LINES:
                    raise ValueError(
                        f"{path}, line {begin}: a quotation mark is not closed within {_MAX_ROW_LINES:,} lines; "
                        "double the quotation marks inside a text, or remove this one"
                    )
                if row:
                    yield begin, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: no row of a table ({error}); correct it") from None

    table = rows()
    looked_at = list(islice(table, _RECORDS_LOOKED_AT + 1))
    if not looked_at:
        return
    header = [name.strip() for name in looked_at[0][1]]
    columns, has_header = _text_columns(path, header, [row for _, row in looked_at[1:]], text_field, report)
    for number, row in chain(looked_at[has_header:], table):
        yield from _record_text([row[column] for column in columns if column < len(row)], number, report)


def _text_columns(
    path: Path, header: list[str], rows: list[list[str]], text_field: str | None, report: FileReport
) -> tuple[list[int], int]:
    """The columns with the text, and whether the first row is a header (0 or 1)."""
    # A header has short names, each once; a first row with a sentence in it is one of the records.
    is_header = all(len(name) <= 30 and not re.search("[。！？]", name) for name in header)
    is_header = is_header and all(header) and len(set(header)) == len(header) and not any(map(str.isdigit, header))
    known = {name.lower() for name in header} & set(TEXT_FIELDS)
    asked = [name.strip() for name in (text_field or "").split(",")]
    if text_field is not None and all(re.fullmatch(r"[1-9]\d{0,3}", name) and name not in header for name in asked):
        numbers = [int(name) - 1 for name in asked]
        if max(numbers) < len(header):
            report.text_field = text_field
            return numbers, int(is_header or bool(known))
    if is_header or known or text_field is not None:
        records = [dict(zip(header, row, strict=False)) for row in rows] or [dict.fromkeys(header, "")]
        names = _text_fields(path, records, text_field, report)
        return [header.index(name) for name in names], 1
    numbered = {str(number): [row[number - 1] for row in [header, *rows] if number <= len(row)]
                for number in range(1, len(header) + 1)}  # fmt: skip
    records = [dict.fromkeys(numbered, "")] + [{name: value} for name, values in numbered.items() for value in values]
    names = _text_fields(path, records, None, report)
    return [int(name) - 1 for name in names], 0


def _read_srt(blocks: Iterable[str]) -> Iterator[str]:
    """The text of subtitles, a cue a line: without numbers, times and styles."""
    cue: list[str] = []
    timed = False
    for line in chain(split_lines(blocks), [""]):
        stripped = line.strip()
        if re.match(r"\d+:\d+:\d+[,.]\d+\s*-->", stripped):
            cue, timed = [], True
        elif stripped and timed:
            cue.append(re.sub(r"</?[biu]>|</?font[^>]*>|\{\\[^}]*\}", "", stripped))
        elif not stripped:
            if cue:
                yield " ".join(cue) + "\n"
            cue, timed = [], False


def html_text(html: str | bytes, path: Path) -> str:
    """The text of a page as a browser shows it: a block a line, without scripts and what is in the head."""
    parser = _load("selectolax.lexbor", path).LexborHTMLParser
    tree = parser(html)
    tree.strip_tags(list(_UNSEEN))
    lines: list[str] = []
    line: list[str] = []
    block_before = None

    def end_line() -> None:
        # The white space of the source is layout; a no-break space is text.
        if text := re.sub(r"[ \t\r\n\f]+", " ", "".join(line)).strip(" "):
            lines.append(text)
        line.clear()

    if tree.root is None:
        return ""
    for node in tree.root.traverse(include_text=True):
        if node.tag == "br" or node.tag in _BLOCKS:
            end_line()
        elif node.tag == "-text":
            block = node.parent
            while block is not None and block.tag not in _BLOCKS:
                block = block.parent
            block_id = None if block is None else block.mem_id
            if block_id != block_before:
                end_line()
                block_before = block_id
            line.append(node.text(deep=False) or "")
    end_line()
    return "\n".join(lines)


def _read_docx(path: Path, report: FileReport) -> Iterator[str]:
    docx = _load("docx", path)
    report.encoding = "docx"
    _check_zip(path)
    try:
        document = docx.Document(str(path))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, docx.opc.exceptions.PackageNotFoundError) as error:
        raise ValueError(f"{path} is not a whole .docx file ({error}); save or copy it again") from None
    for block in document.iter_inner_content():
        if hasattr(block, "rows"):
            for row in block.rows:
                cells = list({id(cell._tc): cell.text.strip() for cell in row.cells}.values())  # merged cells once
                yield "\t".join(cells) + "\n"
        else:
            yield block.text + "\n"


def _read_epub(path: Path, report: FileReport) -> Iterator[str]:
    """The text of an e-book in its reading order; `SECTION` is a line between its parts."""
    # By hand and not by EbookLib, whose licence (AGPL) is not ours: a book is pages of HTML in a zip file.
    report.encoding = "epub"
    _check_zip(path)
    with zipfile.ZipFile(path) as book:
        try:
            pages = _epub_pages(book)
        except (KeyError, ElementTree.ParseError, UnicodeError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path} is not an e-book that can be read ({error}); convert it again") from None
        first = True
        for name in pages:
            try:
                data = book.read(name)
            except (KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
                raise ValueError(
                    f"{path}: its part {name} cannot be read ({error}); convert or copy it again"
                ) from None
            text = html_text(_decode_page(data, report), path)
            if text:
                yield text + "\n" if first else f"{SECTION}\n{text}\n"
                first = False


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        kind = format_of(path)
        raise ValueError(f"{path} is not a whole {kind} file ({error}); save or copy it again") from None
    if size > MAX_BOOK_BYTES:
        raise ValueError(f"{path} has {size:,} bytes when unpacked, more than {MAX_BOOK_BYTES:,}; divide it")


def _epub_pages(book: zipfile.ZipFile) -> list[str]:
    """The names of the pages of an e-book in reading order, without its table of contents."""
    container = ElementTree.fromstring(book.read("META-INF/container.xml"))
    package_names = [
        element.attrib["full-path"] for element in container.iter() if element.tag.rpartition("}")[2] == "rootfile"
    ]
    if not package_names:
        raise KeyError("META-INF/container.xml names no package")
    package_name = package_names[0]
    package = ElementTree.fromstring(book.read(package_name))
    items = {}
    spine = []
    for element in package.iter():
        kind = element.tag.rpartition("}")[2]
        if kind == "item":
            items[element.attrib["id"]] = element.attrib
        elif kind == "itemref" and element.attrib.get("linear") != "no":
            spine.append(element.attrib["idref"])
    folder = posixpath.dirname(package_name)
    names = []
    for id_ in spine:
        item = items[id_]
        if "nav" not in item.get("properties", "").split() and "html" in item.get("media-type", "html"):
            names.append(posixpath.normpath(posixpath.join(folder, unquote(item["href"]))))
    if not names:
        raise KeyError("it has no pages")
    return names


def _decode_page(data: bytes, report: FileReport) -> str:
    """Decode a page as its XML declaration says, which is UTF-8 where it says nothing."""
    declared = re.match(rb"\s*<\?xml[^>]*encoding=[\"']([\w.-]+)", data[:200])
    name = declared[1].decode() if declared else "utf-8"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = "utf-16"
    try:
        text = data.decode(name, errors="replace")
    except LookupError:
        text = data.decode("utf-8", errors="replace")
    report.bad_bytes += text.count("\ufffd")
    return text.removeprefix("\ufeff")


def _load(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = _PINNED[module.partition(".")[0]]
        raise ValueError(
            f"{path}: reading it needs a package that is not installed: pip install {package} "
            "(requirements-vocab.txt has it), or move the file away"
        ) from None
