"""What a folder of texts is, on one screen, and what is wrong with it, the worst first; nothing is written there."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from gpt2_chinese.text.cleaning import Cleaner, parse_rules
from gpt2_chinese.text.corpus import detect_encoding
from gpt2_chinese.text.division import choose_unit, divide, survey
from gpt2_chinese.text.duplicates import Duplicates
from gpt2_chinese.text.formats import BOOK_SUFFIXES, FileReport, Listing, format_of, has_records, read_texts

MAX_BYTES = 200_000_000
"""Files are read until so many bytes; the rest is only listed."""

_LITTLE_TEXT = 100_000  # characters
_SMALL_CORPUS = 20_000_000
_LONG_DOCUMENT = 50_000
_TOKENS_A_CHARACTER = 0.7  # words of THULAC, with a vocabulary of 5,000, on 4.4 MB (docs/preparing-texts.md)
_SUSPICIOUS = ("mojibake", "html", "invisible", "punctuation", "ads")
_CHINESE = re.compile("[㐀-鿿豈-﫿\U00020000-\U0003ffff]")
_LATIN = re.compile("[A-Za-zÀ-ɏ]")
_DIGIT = re.compile("[0-9０-９]")
_LETTER = re.compile(r"[^\W\d_]")

# The worst first: what stops the build, what makes the text wrong, its form, its content, its size.
_FINDINGS: dict[str, tuple[str, str]] = {
    "nothing": (
        "there is nothing to read: {passed_over} things are passed over ({examples})",
        "没有可读的文件：跳过了 {passed_over} 项（{examples}）",
    ),
    "unreadable": ("{count} files cannot be read: {examples}", "{count} 个文件读不了：{examples}"),
    "encoding": (
        "{count} files are not UTF-8 but {encodings}: {examples}; add --encoding auto",
        "{count} 个文件不是 UTF-8，而是 {encodings}：{examples}；加上 --encoding auto",
    ),
    "bad_bytes": (
        "{count} bytes are damaged, in {examples}; repair the files, or add --on_error skip",
        "{count} 个字节已损坏，在 {examples}；请修复文件，或加上 --on_error skip",
    ),
    "bad_records": (
        "{count} lines of JSON files are not JSON or have no text, in {examples}; add --on_error skip",
        "JSON 文件中有 {count} 行不是 JSON 或没有文本，在 {examples}；加上 --on_error skip",
    ),
    "mojibake": (
        "{count} lines are mojibake, such as {examples}; get the files again, or add --clean",
        "{count} 行是乱码，例如 {examples}；请重新获取文件，或加上 --clean",
    ),
    "replaced": (
        "{count} characters are lost (U+FFFD or NUL): the text was damaged before, in {examples}",
        "{count} 个字符已丢失（U+FFFD 或 NUL）：文本在此之前就已损坏，在 {examples}",
    ),
    "language": (
        "only {share} of the letters are Chinese: the word segmentation is for Chinese; use --tokenizer bpe",
        "只有 {share} 的文字是中文：分词器是为中文设计的，请用 --tokenizer bpe",
    ),
    "broken": (
        "the lines of {count} files are broken as in a PDF file: {examples}; add --join_lines",
        "{count} 个文件的行像 PDF 那样被截断：{examples}；加上 --join_lines",
    ),
    "chapters": (
        "{count} files are books with chapters: {examples}; add --document auto (or chapter)",
        "{count} 个文件是分章的书：{examples}；加上 --document auto（或 chapter）",
    ),
    "paragraphs": (
        "the documents of {count} files are groups of lines: {examples}; add --document auto (or paragraph)",
        "{count} 个文件的文档由多行组成：{examples}；加上 --document auto（或 paragraph）",
    ),
    "long": (
        "{count} documents have more than {least} characters, the longest {longest}; add --document auto",
        "{count} 篇文档超过 {least} 字，最长的有 {longest} 字；加上 --document auto",
    ),
    "short": (
        "{share} of the documents have at most {least} characters, and make-tokenized.py will leave them out: give it "
        "--min_length {suggested}",
        "{share} 的文档不超过 {least} 字，会被 make-tokenized.py 丢弃：给它加上 --min_length {suggested}",
    ),
    "duplicates": (
        "{share} of the documents repeat an earlier one, such as {examples}; add --deduplicate",
        "{share} 的文档与前面的重复，例如 {examples}；加上 --deduplicate",
    ),
    "html": (
        "{count} lines have HTML entities or tags, such as {examples}; add --clean",
        "{count} 行含有 HTML 实体或标签，例如 {examples}；加上 --clean",
    ),
    "ads": (
        "{count} lines are advertisements of sites, such as {examples}; add --clean",
        "{count} 行是网站广告，例如 {examples}；加上 --clean",
    ),
    "invisible": (
        "{count} lines have invisible or private-use characters, such as {examples}; add --clean",
        "{count} 行含有不可见或私用区字符，例如 {examples}；加上 --clean",
    ),
    "punctuation": (
        "{count} lines have repeated punctuation, such as {examples}; add --clean",
        "{count} 行有重复标点，例如 {examples}；加上 --clean",
    ),
    "empty": ("{count} files have no text: {examples}", "{count} 个文件没有文本：{examples}"),
    "formats": (
        "{count} files are of formats that are not read: {examples}",
        "{count} 个文件的格式不能读取：{examples}",
    ),
    "little": (
        "{characters} characters are little: the model will memorise them; add text",
        "只有 {characters} 字，太少：模型会过拟合（背下原文），请增加文本",
    ),
}
_LABELS: dict[str, tuple[str, str]] = {
    "title": ("{folder}: {files} files, {size} MB", "{folder}：{files} 个文件，{size} MB"),
    "wrong": ("what is wrong, the worst first:", "问题（最严重的在前）："),
    "right": ("nothing is wrong", "没有发现问题"),
    "more": ("  and {count} more", "  还有 {count} 项"),
    "files": ("files        {formats}; {encodings}; passed over {passed_over}",
              "文件    {formats}；{encodings}；跳过 {passed_over}"),
    "documents": ("documents    {documents} (--document {unit}); characters: shortest {shortest}, median {median}, "
                  "longest {longest}",
                  "文档    {documents} 篇（--document {unit}）；字数：最短 {shortest}，中位数 {median}，"
                  "最长 {longest}"),
    "characters": ("characters   {characters}: Chinese {chinese}, Latin {latin}, digits {digits}, other {other}",
                   "字符    {characters}：中文 {chinese}，拉丁 {latin}，数字 {digits}，其他 {other}"),
    "repeats": ("duplicates   {exact} exact, {near} near", "重复    完全相同 {exact} 篇，近似 {near} 篇"),
    "suspicious": ("suspicious   lines: {lines}", "可疑行  {lines}"),
    "next": ("next stages  make-tokenized.py keeps {kept} documents, about {tokens} tokens (words); "
             "--model_config config/model_config_{config}.json",
             "后续    make-tokenized.py 保留 {kept} 篇，约 {tokens} 个 token（词级）；"
             "--model_config config/model_config_{config}.json"),
    "partly": ("only the first {size} MB were read", "只读取了前 {size} MB"),
    "command": ("try          python build_trainfile.py {flags}", "建议    python build_trainfile.py {flags}"),
}  # fmt: skip
_MOST_SHOWN = 10


@dataclass
class Examination:
    """What was found in a folder.

    Attributes:
        findings: what is wrong, by kind (those of the table above): how often, and examples.
    """

    files: int = 0
    file_bytes: int = 0
    read_bytes: int = 0
    passed_over: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    encodings: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    exact: int = 0
    near: int = 0
    suspicious: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unit: str = "line"
    min_length: int = 128

    def find(self, kind: str, example: str, count: int = 1) -> None:
        """Note something that is wrong."""
        assert kind in _FINDINGS
        self.counts[kind] += count
        self.examples.setdefault(kind, []).append(example)

    @property
    def documents(self) -> int:
        return self.lengths.total()

    @property
    def kept(self) -> int:
        """Documents that are long enough for make-tokenized.py."""
        return sum(count for length, count in self.lengths.items() if length > self.min_length)

    def quantile(self, share: float) -> int:
        """The length that a share of the documents do not exceed."""
        passed = 0
        for length in sorted(self.lengths):
            passed += self.lengths[length]
            if passed >= share * self.documents:
                return length
        return 0

    def kinds(self) -> list[str]:
        """What is wrong, the worst first."""
        return [kind for kind in _FINDINGS if self.counts[kind]]

    def flags(self) -> list[str]:
        """The flags of build_trainfile.py that mend what is wrong."""
        flags = {
            "--encoding auto": ("encoding",),
            "--on_error skip": ("bad_bytes", "bad_records"),
            "--document auto": ("chapters", "paragraphs", "long"),
            "--join_lines": ("broken",),
            "--clean": ("mojibake", *_SUSPICIOUS),
            "--deduplicate": ("duplicates",),
        }
        return [flag for flag, kinds in flags.items() if any(self.counts[kind] for kind in kinds)]


def examine(
    listing: Listing,
    *,
    encoding: str = "utf-8",
    unit: str = "line",
    text_field: str | None = None,
    min_length: int = 128,
) -> Examination:
    """Read the files of a folder, as far as MAX_BYTES, and look for what is wrong.

    Args:
        encoding, unit, text_field: as build_trainfile.py has them; where UTF-8 is asked for, others are told.
        min_length: of make-tokenized.py.
    """
    found = Examination(unit=unit, min_length=min_length, files=len(listing.files))
    for item in listing.passed_over:
        found.passed_over += 1
        if "is not read" in item.reason:
            found.find("formats", item.path.name)
    if not listing.files:
        found.find("nothing", "")
    try:
        cleaner = Cleaner(_SUSPICIOUS)
    except ValueError:  # ftfy is not installed
        cleaner = Cleaner(parse_rules("html,invisible,punctuation,ads"))
    with (
        tempfile.TemporaryDirectory() as folder,
        Duplicates("near", Path(folder), sum(path.stat().st_size for path in listing.files)) as duplicates,
    ):
        for path in listing.files:
            size = path.stat().st_size
            found.file_bytes += size
            found.formats[format_of(path)] += 1
            if found.read_bytes < MAX_BYTES:
                found.read_bytes += size
                _examine_file(path, found, cleaner, duplicates, encoding, text_field)
        found.exact, found.near = duplicates.exact, duplicates.near
        repeated = [_short(example.document) for example in duplicates.examples]
    _judge(found, cleaner, repeated)
    return found


def _examine_file(
    path: Path, found: Examination, cleaner: Cleaner, duplicates: Duplicates, encoding: str, text_field: str | None
) -> None:
    report = FileReport()
    auto = _encoding_to_read(path) if encoding == "utf-8" else encoding
    documents = found.documents
    try:
        for text in read_texts(path, encoding=auto, on_error="replace", text_field=text_field, report=report):
            blocks = list(islice(text, MAX_BYTES >> 20))  # of about a megabyte
            _examine_text(path, blocks, found, duplicates, is_record=has_records(path))
            for _ in cleaner.clean(blocks, path.name):
                pass
    except (ValueError, OSError) as error:
        found.find("unreadable", str(error))
        return
    if report.encoding:
        found.encodings[report.encoding] += 1
    if report.encoding not in ("utf-8", "epub", "docx") and encoding == "utf-8":
        found.find("encoding", path.name)
    if report.bad_bytes:
        found.find("bad_bytes", path.name, report.bad_bytes)
    if bad := report.bad_records + report.records_without_text:
        found.find("bad_records", path.name, bad)
    if report.nul_characters:
        found.find("replaced", path.name, report.nul_characters)
    if found.documents == documents:
        found.find("empty", path.name)


def _encoding_to_read(path: Path) -> str:
    """ "auto"; or "utf-8" for a file that is damaged in a few places, so that its encoding cannot be told."""
    if format_of(path) in BOOK_SUFFIXES:
        return "auto"
    try:
        detect_encoding(path)
    except ValueError:
        with open(path, "rb") as file:
            head = file.read(1 << 20)
        return "utf-8" if len(head.decode("utf-8", "ignore").encode()) > 0.98 * len(head) else "auto"
    except OSError:
        pass  # which reading the file will say
    return "auto"


def _examine_text(
    path: Path, blocks: list[str], found: Examination, duplicates: Duplicates, *, is_record: bool
) -> None:
    """Look at the form of a text and at its documents."""
    surveyed = survey(blocks)
    unit = "file" if is_record and found.unit in ("line", "auto") else found.unit
    suggested = choose_unit(surveyed)[0]
    if surveyed.is_broken and suggested != "chapter":
        found.find("broken", path.name)
    elif found.unit == "line" and suggested in ("chapter", "paragraph") and not is_record:
        found.find(f"{suggested}s", path.name)
    unit = suggested if unit == "auto" else unit
    for document in divide(blocks, unit, surveyed):
        found.lengths[len(document)] += 1
        found.characters["all"] += len(document)
        for name, pattern in (("chinese", _CHINESE), ("latin", _LATIN), ("digits", _DIGIT), ("letters", _LETTER)):
            found.characters[name] += len(pattern.findall(document))
        if lost := document.count("\ufffd"):
            found.characters["lost"] += lost
            if path.name not in found.examples.get("replaced", []):
                found.examples.setdefault("replaced", []).append(path.name)
        duplicates(document)


def _judge(found: Examination, cleaner: Cleaner, repeated: list[str]) -> None:
    """What the figures of the whole folder say."""
    lines_of_rules = {name: of_rule.changed + of_rule.left_out for name, of_rule in cleaner.found.items()}
    for name, count in lines_of_rules.items():
        found.suspicious[name] = count
        if count and not (name == "punctuation" and count < 0.01 * found.documents):
            for example in islice(cleaner.found[name].examples, 1):
                found.find(name, f"{example.place}: {_short(example.before)}", count)
    lost = found.characters["lost"]
    # Bytes that were replaced just now are damage of the file, not of the text before.
    if lost and not found.counts["bad_bytes"]:
        found.counts["replaced"] += lost
    if not found.documents:
        return
    if found.characters["chinese"] < 0.5 * found.characters["letters"]:
        found.find("language", "")
    if long := sum(count for length, count in found.lengths.items() if length > _LONG_DOCUMENT):
        found.find("long", "", long)
    form = ("broken", "chapters", "paragraphs")  # other documents will have other lengths
    if found.kept < 0.5 * found.documents and not any(found.counts[kind] for kind in form):
        found.find("short", "")
    if found.exact + found.near > 0.01 * found.documents:
        found.find("duplicates", repeated[0], found.exact + found.near)
    if found.characters["all"] < _LITTLE_TEXT:
        found.find("little", "")


def screen(found: Examination, folder: str, language: str) -> list[str]:
    """The examination as the lines of one screen, in "en" or "zh"."""
    column = 1 if language == "zh" else 0

    def say(name: str, **values: object) -> str:
        return (_LABELS.get(name) or _FINDINGS[name])[column].format(**values)

    lines = [say("title", folder=folder, files=f"{found.files:,}", size=f"{found.file_bytes / 1e6:,.1f}")]
    kinds = found.kinds()
    lines.append(say("wrong") if kinds else say("right"))
    for number, kind in enumerate(kinds[:_MOST_SHOWN], 1):
        lines.append(f"  {number}. " + say(kind, **_values(found, kind)))
    if len(kinds) > _MOST_SHOWN:
        lines.append(say("more", count=len(kinds) - _MOST_SHOWN))
    total = max(1, found.characters["all"])
    lines.append(
        say(
            "files",
            formats=_listed(found.formats) or "-",
            encodings=_listed(found.encodings) or "-",
            passed_over=f"{found.passed_over:,}",
        )
    )
    if found.documents:
        shares = {name: f"{found.characters[name] / total:.1%}" for name in ("chinese", "latin", "digits")}
        other = total - sum(found.characters[name] for name in shares)
        tokens = sum(length * count for length, count in found.lengths.items() if length > found.min_length)
        lines += [
            say(
                "documents",
                documents=f"{found.documents:,}",
                unit=found.unit,
                shortest=f"{min(found.lengths):,}",
                median=f"{found.quantile(0.5):,}",
                longest=f"{max(found.lengths):,}",
            ),
            say("characters", characters=f"{total:,}", other=f"{other / total:.1%}", **shares),
            say("repeats", exact=f"{found.exact:,}", near=f"{found.near:,}"),
            say("suspicious", lines=_listed(found.suspicious) or "0"),
            say(
                "next",
                kept=f"{found.kept:,}",
                tokens=f"{round(tokens * _TOKENS_A_CHARACTER):,}",
                config="mini" if total < _SMALL_CORPUS else "small",
            ),
        ]
    if found.read_bytes < found.file_bytes:
        lines.append(say("partly", size=f"{found.read_bytes / 1e6:,.0f}"))
    if flags := found.flags():
        lines.append(say("command", flags=" ".join(flags)))
    return lines


def _values(found: Examination, kind: str) -> dict[str, object]:
    examples = [example for example in found.examples.get(kind, []) if example]
    if kind == "nothing":
        examples = found.examples.get("formats", [])
    count = found.counts[kind]
    letters = max(1, found.characters["letters"])
    shares = {
        "language": found.characters["chinese"] / letters,
        "short": 1 - found.kept / max(1, found.documents),
        "duplicates": count / max(1, found.documents),
    }
    least = _LONG_DOCUMENT if kind == "long" else found.min_length
    return {
        "count": f"{count:,}",
        "examples": ", ".join(examples[:2]) + (", …" if len(examples) > 2 else ""),
        "encodings": _listed(Counter({name: n for name, n in found.encodings.items() if name != "utf-8"})),
        "share": f"{shares.get(kind, 0):.0%}",
        "least": f"{least:,}",
        "longest": f"{max(found.lengths, default=0):,}",
        "characters": f"{found.characters['all']:,}",
        "passed_over": f"{found.passed_over:,}",
        "suggested": max(1, found.quantile(0.1) - 1),
    }


def _listed(counts: Mapping[str, int]) -> str:
    """Names with their counts, the most frequent first."""
    items: Iterable[tuple[str, int]] = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count:,}" for name, count in items if count)


def _short(text: str, length: int = 30) -> str:
    line = " ".join(text.split())
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in line[:length])
    return shown + ("…" if len(line) > length else "")
