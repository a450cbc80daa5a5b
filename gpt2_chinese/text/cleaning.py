"""Rules that clean lines of text on request, each of which counts what it changed and keeps examples."""

from __future__ import annotations

import html
import importlib
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from gpt2_chinese.text.chapters import candidate
from gpt2_chinese.text.corpus import split_lines
from gpt2_chinese.text.formats import SECTION

RULES = {
    "mojibake": "text that was decoded in a wrong encoding (ftfy, and UTF-8 read as GBK)",
    "html": "HTML entities and tags",
    "invisible": "zero-width, private-use and control characters",
    "simplified": "traditional characters to simplified ones (OpenCC); only on request",
    "punctuation": "repeated punctuation",
    "indents": "white space around a line, full-width indents among it",
    "ads": "lines with web addresses, and the sentences of sites that offer books",
    "repeated": "lines that stand in many files, or in many chapters or records of a file",
}
ON_REQUEST = ("simplified",)
EXAMPLES = 20
MAX_COUNTED_LINES = 200_000
"""Different lines that `LineCounts` keeps; those that were seen once are forgotten when there are more."""

_LONGEST_AD = 100
_LEAST_LETTERS = 8
_LEAST_PLACES = 5
_PACKAGES = {"ftfy": "ftfy==6.3.1", "opencc": "opencc==1.4.2"}

# A character of UTF-8 as text shows it that was read as Windows-1252: a letter, then its bytes 80 to BF.
_GOES_ON = "[\u0080-\u00bfŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]"
_LATIN_MOJIBAKE = re.compile(f"[Â-ß]{_GOES_ON}|[à-ï]{_GOES_ON}{{2}}|[ð-ô]{_GOES_ON}{{3}}")
_NOT_CHINESE = re.compile("[^\u2e80-\u9fff\uff00-\uffef]+")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});|&nbsp\b")
_TAG_NAMES = (
    "a|abbr|article|aside|b|big|blockquote|body|br|center|code|dd|del|div|dl|dt|em|font|footer|form|h[1-6]|head|header|"
    "hr|html|i|iframe|img|input|ins|li|link|main|meta|nav|ol|p|pre|s|script|section|small|span|strike|strong|style|sub|"
    "sup|table|tbody|td|th|thead|title|tr|u|ul"
)
_TAG = re.compile(rf"</?({_TAG_NAMES})(?:\s[^<>]*)?/?>|<!--.*?-->", re.IGNORECASE)
_BREAKING_TAG = re.compile(r"br|p|div|li|tr|h[1-6]|hr|dd|dt|blockquote|pre|section|article", re.IGNORECASE)
# Joiners are kept behind what is neither ASCII nor Chinese: emoji and Indic and Persian words need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1d\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u206a-\u206f"
    "\ue000-\uf8ff\ufeff\ufff9-\ufffc\U000f0000-\U0010ffff]|(?:^|(?<=[\x00-\x7f\u2e80-\u9fff\uff00-\uffef]))[\u200c\u200d]+"
)
_REPEATED_MARKS = (
    (re.compile(r"。{3,}|…{3,}|⋯{2,}|(?:\.{3,}){2,}|・{3,}|·{6,}"), "……"),
    (re.compile(r"。{2}"), "。"),
    (re.compile(r"([，、；：,;])\1+"), r"\1"),
    (re.compile(r"([！？!?])\1{2,}"), r"\1"),
    (re.compile(r"(?<![！？!?])((?:[！!][？?]|[？?][！!]))(?:[！？!?]{2,})"), r"\1"),
    (re.compile(r"([~～])\1+"), r"\1"),
    (re.compile(r"[—－]{3,}|-{4,}"), "——"),
    (re.compile(r"([=*_#+◆●■☆★※])\1{3,}"), ""),
)
_DOUBLED = re.compile(r"[。…⋯.・·，、；：,;！？!?~～—－\-=*_#+◆●■☆★※]{2}")  # nearly no line has them
_DOMAIN = r"com|net|org|cn|cc|tv|info|me|top|xyz|vip|la|co|biz|wang|io|us|tw|hk|jp|app|site|online|club"
_ADDRESS = re.compile(
    rf"(?:https?://|www[.。．])[\w\-./?=&%#~。．]+|(?<![\w.@-])(?:[a-z0-9][\w-]*[.．])+(?:{_DOMAIN})(?![\w.-]*\w)(?:/[\w\-./?=&%#~]*)?"
    r"|[\w.+-]+@[\w-]+\.[\w.-]+",
    re.IGNORECASE | re.ASCII,
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_PHRASE = re.compile(
    "手机用户请|请记住本(?:书|站)|一秒记住|天才一秒|最快更新|无弹窗|最新章节(?:请|首发|阅读)|首发域名|手打更新|加入书签|"
    "点击下一页|求(?:收藏|推荐票|月票|订阅|打赏)|本站所有|本书由.{0,20}(?:整理|首发|提供)|全集下载|(?:txt|TXT)下载|"
    "内容由.{0,10}上传|转载请(?:注明|保留)|扫码关注|关注(?:微信)?公众号|未完待续"
)
_MARKER = re.compile(r"[（(【\[]?\s*(?:本章(?:未)?完|全[书文]完|本书完|本卷完)[^）)】\]]{0,30}[）)】\]]?")


@dataclass(frozen=True)
class Example:
    """A line before and after a rule; `after` is None where the line was left out."""

    place: str
    before: str
    after: str | None


@dataclass
class Found:
    """What one rule has done: lines changed, lines left out, and examples drawn evenly from all of them."""

    changed: int = 0
    left_out: int = 0
    examples: list[Example] = field(default_factory=list)


def parse_rules(value: str | None) -> tuple[str, ...]:
    """The rules of a --clean, in the order in which they work.

    Args:
        value: None is none; "" the default ones; names with commas between are these; no-NAME is without one;
            "default" and "all" can be among them.

    Raises:
        ValueError: there is no such rule.
    """
    if value is None:
        return ()
    default = {name for name in RULES if name not in ON_REQUEST}
    names = [name.strip().lower() for name in value.split(",") if name.strip()]
    chosen = set(default) if all(name.startswith("no-") for name in names) else set()
    for name in names:
        bare = name.removeprefix("no-")
        if name in ("default", "all"):
            chosen |= default if name == "default" else set(RULES)
        elif bare not in RULES:
            raise ValueError(f"--clean {value}: there is no rule {bare}; the rules are {', '.join(RULES)}")
        elif name == bare:
            chosen.add(name)
    chosen -= {name.removeprefix("no-") for name in names if name.startswith("no-")}
    return tuple(name for name in RULES if name in chosen)


class LineCounts:
    """Finds lines that stand in many files, or in many chapters or records of one, in bounded memory.

    Lines are known by a hash of their letters and digits. A line is repeated if it stands in at least five files and a
    twentieth of all, or in at least five chapters and a tenth of those of a file.
    """

    def __init__(self) -> None:
        self._in_files: Counter[int] = Counter()
        self._files = 0
        self._repeated: set[int] = set()

    def add_file(self, places: Iterable[Iterable[str]]) -> None:
        """Take the lines of a file, by chapter or record."""
        in_places: Counter[int] = Counter()
        number = 0
        for lines in places:
            number += 1
            in_places.update({key for line in lines if (key := _line_key(line)) is not None})
            _forget_single(in_places)
        least = max(_LEAST_PLACES, number / 10)
        self._repeated.update(key for key, count in in_places.items() if count >= least)
        self._in_files.update(in_places.keys())
        self._files += 1
        _forget_single(self._in_files)

    def finish(self) -> None:
        """Decide, once all files are read."""
        least = max(_LEAST_PLACES, self._files / 20)
        self._repeated.update(key for key, count in self._in_files.items() if count >= least)
        self._in_files.clear()

    def is_repeated(self, line: str) -> bool:
        """Whether a line stands in many places."""
        return bool(self._repeated) and _line_key(line) in self._repeated


def _line_key(line: str) -> int | None:
    """A number for the letters and digits of a line; None for headings and lines that are too short or too long."""
    if not _LEAST_LETTERS <= len(line) <= _LONGEST_AD or line == SECTION:
        return None
    letters = re.sub(r"[\W_]+", "", line)
    if len(letters) < _LEAST_LETTERS or candidate(line, 0) is not None:
        return None
    data = letters.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def _forget_single(counts: Counter[int]) -> None:
    if len(counts) > MAX_COUNTED_LINES:
        for key in [key for key, count in counts.items() if count < 2]:
            del counts[key]


class Cleaner:
    """Applies rules to the lines of a text.

    Attributes:
        rules: their names, in the order in which they work.
        found: what each has done.

    Raises:
        ValueError: a rule's package is not installed.
    """

    def __init__(self, rules: Iterable[str], repeated: LineCounts | None = None) -> None:
        self.rules = tuple(rules)
        self.found = {name: Found() for name in self.rules}
        self._repeated = repeated or LineCounts()
        self._random = random.Random(0)
        functions: dict[str, Callable[[str], str]] = {
            "html": _without_html,
            "invisible": lambda line: _INVISIBLE.sub("", line),
            "punctuation": _without_repeated_marks,
            "indents": lambda line: "\n".join(part.strip() for part in line.split("\n")),
        }
        if "mojibake" in self.rules:
            functions["mojibake"] = _Mojibake(_load("ftfy", "mojibake"))
        if "simplified" in self.rules:
            functions["simplified"] = _load("opencc", "simplified").OpenCC("t2s").convert
        self._changing = [(name, functions[name]) for name in self.rules if name in functions]

    def clean(self, blocks: Iterable[str], source: str, *, count: bool = True) -> Iterator[str]:
        """Give the cleaned lines of a text, each with "\\n".

        Args:
            source: the text's name, for the examples.
            count: False leaves counts and examples as they are, for a first pass over the same text.
        """
        for number, line in enumerate(split_lines(blocks), 1):
            cleaned = line
            if line != SECTION:
                for name, function in self._changing:
                    changed = function(cleaned)
                    if changed != cleaned:
                        if count:
                            self._note(name, source, number, cleaned, changed)
                        cleaned = changed
            for part in cleaned.split("\n"):
                rule = self._that_leaves_out(part)
                if rule is None:
                    yield part + "\n"
                elif count:
                    self._note(rule, source, number, part, None)

    def count_repeated(self, texts: Iterable[Iterable[str]], *, are_records: bool) -> None:
        """Take the texts of a file into account for the rule "repeated"."""
        self._repeated.add_file(self._places(texts, are_records))

    def _places(self, texts: Iterable[Iterable[str]], are_records: bool) -> Iterator[list[str]]:
        for text in texts:
            place: list[str] = []
            for block in self.clean(text, "", count=False):
                line = block[:-1]
                # A line that may be a heading begins a place; more of them than there are do no harm.
                if not are_records and place and (candidate(line, 0) is not None or line == SECTION):
                    yield place
                    place = []
                if len(line) <= _LONGEST_AD or len(place) < 2:
                    place.append(line if len(line) <= _LONGEST_AD else "")  # longer lines are never left out
                if len(place) >= MAX_COUNTED_LINES:
                    yield place
                    place = []
            if len(place) > 1 or not are_records:
                yield place

    def finish_counting(self) -> None:
        """Decide which lines are repeated, once `count_repeated` has seen all files."""
        self._repeated.finish()

    def _that_leaves_out(self, line: str) -> str | None:
        """The rule that leaves a line out, if there is one."""
        if "ads" in self.found and is_ad(line):
            return "ads"
        if "repeated" in self.found and self._repeated.is_repeated(line):
            return "repeated"
        return None

    def _note(self, rule: str, source: str, number: int, before: str, after: str | None) -> None:
        found = self.found[rule]
        if after is None:
            found.left_out += 1
        else:
            found.changed += 1
        seen = found.changed + found.left_out
        example = Example(f"{source}, line {number}", before, after)
        if len(found.examples) < EXAMPLES:
            found.examples.append(example)
        elif (place := self._random.randrange(seen)) < EXAMPLES:  # reservoir sampling: each line is as likely
            found.examples[place] = example

    def summary(self) -> list[str]:
        """What each rule has done, as lines for a person."""
        return [
            f"  {name}: {found.changed:,} lines changed, {found.left_out:,} left out"
            for name, found in self.found.items()
        ]

    def write_report(self, file: IO[str]) -> None:
        """Write counts and examples of each rule, for a person."""
        for name, found in self.found.items():
            file.write(f"{name}: {RULES[name]}\n{found.changed:,} lines changed, {found.left_out:,} left out\n\n")
            for example in found.examples:
                file.write(f"{example.place}\n- {_shown(example.before)}\n")
                if example.after is not None:
                    file.write(f"+ {_shown(example.after)}\n")
                file.write("\n")


def is_ad(line: str) -> bool:
    """Whether a line is an advertisement of a site: short, with an address or one of the usual sentences."""
    stripped = line.strip()
    if not stripped or len(stripped) > _LONGEST_AD:
        return False
    if _MARKER.fullmatch(stripped) or _PHRASE.search(stripped):
        return True
    plain = stripped.translate(_FULL_WIDTH)
    return ("." in plain or "。" in plain or "@" in plain) and _ADDRESS.search(plain) is not None


def _without_html(line: str) -> str:
    for _ in range(2):  # some are escaped twice
        if "&" not in line:
            break
        line = _ENTITY.sub(lambda found: html.unescape(found[0]).replace("\xa0", " "), line)
    if "<" in line:
        line = _TAG.sub(lambda found: "\n" if found[1] and _BREAKING_TAG.fullmatch(found[1]) else "", line)
        line = re.sub(r"\n{2,}", "\n", line).strip("\n")
    return line


def _without_repeated_marks(line: str) -> str:
    if not _DOUBLED.search(line):
        return line
    for pattern, replacement in _REPEATED_MARKS:
        line = pattern.sub(replacement, line)
    return line


class _Mojibake:
    """Mends text in UTF-8 that was read as Latin-1 or Windows-1252 (ftfy) or as GBK."""

    def __init__(self, ftfy: Any) -> None:
        self._fix = ftfy.fix_encoding

    def __call__(self, line: str) -> str:
        if line.isascii():
            return line
        if _LATIN_MOJIBAKE.search(line):
            return _NOT_CHINESE.sub(lambda found: str(self._fix(found[0])), line)
        return _read_as_gbk(line)


def _read_as_gbk(line: str) -> str:
    """A line whose bytes in GBK are UTF-8 of Chinese text: by chance that does not happen from some letters on."""
    try:
        data = line.rstrip("?\ufffd").encode("gb18030")
        mended = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data" or error.start < 6:
            return line
        mended = data[: error.start].decode("utf-8")  # half of a character was lost at the end
    except UnicodeEncodeError:
        return line
    wide = [character for character in mended if not character.isascii()]
    is_chinese = len(wide) >= 2 and all("\u2010" <= c <= "\u9fff" or "\uff00" <= c <= "\uffef" for c in wide)
    return mended if is_chinese and sum(not c.isascii() for c in line) >= 3 else line


def _load(module: str, rule: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"--clean: the rule {rule} needs a package that is not installed: pip install {_PACKAGES[module]} "
            f"(requirements-vocab.txt has it), or turn it off with --clean no-{rule}"
        ) from None


def _shown(line: str) -> str:
    """A line in which what does not show can be seen, shortened."""
    shown = "".join(c if c.isprintable() or c == "\u3000" else f"\\u{ord(c):04x}" for c in line)
    return shown if len(shown) <= 200 else shown[:200] + " …"
