"""How a text is divided into documents: by line, paragraph, chapter or file, or as its form suggests."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from gpt2_chinese.text.chapters import Heading, HeadingFinder
from gpt2_chinese.text.corpus import split_documents, split_lines, strip_text
from gpt2_chinese.text.formats import SECTION

UNITS = ("line", "paragraph", "chapter", "file", "auto")
SHORT_LINE = 40  # characters
_WIDEST = 400  # longer lines are counted as so long
_SENTENCE_END = tuple("。！？!?…；;：:”』」）)】.》")
_LONG_FILE = 200_000  # characters: not one document, if it can be helped


@dataclass
class Survey:
    """What a first pass over a text finds, before it is divided.

    Attributes:
        lines, blank: all lines, and those without a character that shows.
        characters: of the lines that are not blank, stripped.
        widths: how many lines have how many characters; the last number stands for longer ones too.
        indented: lines that begin with white space.
        ended: lines that end where a sentence does.
        paragraphs: groups of lines between blank ones.
        sections: parts of an e-book.
    """

    lines: int = 0
    blank: int = 0
    characters: int = 0
    widths: Counter[int] = field(default_factory=Counter)
    indented: int = 0
    ended: int = 0
    paragraphs: int = 0
    sections: int = 0
    finder: HeadingFinder = field(default_factory=HeadingFinder)

    @cached_property
    def headings(self) -> list[Heading]:
        """The chapter headings, once all lines are read."""
        return self.finder.headings()

    @property
    def texts(self) -> int:
        """Lines that are not blank."""
        return self.lines - self.blank

    @property
    def width(self) -> int:
        """The width that most of the text's full lines have: the ninth decile."""
        rank, passed = self.texts * 0.9, 0
        for width in sorted(self.widths):
            passed += self.widths[width]
            if passed >= rank:
                return width
        return 0

    @property
    def short_share(self) -> float:
        """The share of lines of at most SHORT_LINE characters."""
        return sum(count for width, count in self.widths.items() if width <= SHORT_LINE) / max(1, self.texts)

    @property
    def is_broken(self) -> bool:
        """Whether lines seem to be broken where a page was full, as in text from a PDF file."""
        width = self.width
        full = sum(count for length, count in self.widths.items() if 0.85 * width <= length <= 1.1 * width + 2)
        return 15 <= width <= 120 and self.texts >= 8 and full >= 0.5 * self.texts and self.ended < 0.5 * self.texts


def survey(blocks: Iterable[str]) -> Survey:
    """Read a text once."""
    found = Survey()
    blank_before = True
    for line in split_lines(blocks):
        found.lines += 1
        found.finder.add(line)
        stripped = strip_text(line)
        if not stripped:
            found.blank += 1
            found.sections += line == SECTION
            blank_before = True
            continue
        found.characters += len(stripped)
        found.widths[min(len(stripped), _WIDEST)] += 1
        found.indented += line[0].isspace()
        found.ended += stripped.endswith(_SENTENCE_END)
        found.paragraphs += blank_before
        blank_before = False
    return found


def choose_unit(found: Survey) -> tuple[str, str]:
    """What the documents of a text are, and why."""
    headings = sum(heading.begins_document for heading in found.headings)
    lines = f"{found.texts:,} lines, {found.short_share:.0%} of them of at most {SHORT_LINE} characters"
    if headings >= 2:
        return "chapter", f"{headings:,} chapter headings"
    if found.sections:
        return "chapter", f"{found.sections + 1:,} parts of an e-book"
    if found.is_broken:
        return "file", f"{lines}, broken at about {found.width} characters: --join_lines joins them"
    per_paragraph = found.texts / max(1, found.paragraphs)
    if found.paragraphs >= 2 and 1.5 <= per_paragraph <= 200:
        return "paragraph", f"{found.paragraphs:,} groups of lines between blank ones"
    if found.short_share < 0.5:
        return "line", lines
    if found.characters > _LONG_FILE:
        return "line", f"{lines}, and {found.characters:,} characters are too many for one document"
    return "file", lines


def divide(
    blocks: Iterable[str],
    unit: str,
    found: Survey | None = None,
    *,
    join: bool = False,
    counts: Counter[str] | None = None,
) -> Iterator[str]:
    """Cut a text into documents, stripped and not blank.

    Args:
        blocks: the text, in pieces of any size, lines ended by "\\n".
        unit: of UNITS without auto. The lines of a chapter are stripped, and blank ones left out; what stands before
            the first heading is a document of its own.
        found: the survey of the same text, which chapters and joined lines need.
        join: join lines that were broken where a page was full.
        counts: "joined" is raised by the number of line breaks that were taken out, "chapters" by that of chapters.
    """
    counts = Counter() if counts is None else counts
    if unit != "chapter" and not join:
        yield from split_documents(_without_sections(blocks), unit)
        return
    assert found is not None
    lines: Iterable[tuple[int, str]] = enumerate(split_lines(blocks))
    if join:
        lines = join_lines(lines, found, {heading.line for heading in found.headings}, counts)
    if unit == "chapter":
        begins = {heading.line for heading in found.headings if heading.begins_document}
        yield from _chapters(lines, begins, counts)
    else:
        yield from split_documents((line + "\n" for _, line in lines if line != SECTION), unit)


def _without_sections(blocks: Iterable[str]) -> Iterable[str]:
    return (block.replace(f"{SECTION}\n", "\n") if SECTION in block else block for block in blocks)


def _chapters(lines: Iterable[tuple[int, str]], begins: set[int], counts: Counter[str]) -> Iterator[str]:
    document: list[str] = []
    for number, line in lines:
        is_section = line == SECTION and not begins
        if number in begins or is_section:
            counts["chapters"] += 1
            if document:
                yield "\n".join(document)
            document = []
        if stripped := strip_text(line):
            document.append(stripped)
    if document:
        yield "\n".join(document)


def join_lines(
    lines: Iterable[tuple[int, str]], found: Survey, headings: set[int], counts: Counter[str]
) -> Iterator[tuple[int, str]]:
    """Join lines that were broken where a page was full; a line keeps the number of its first part,
    and no white space around it.

    Where paragraphs begin with white space, every other line goes on the one before it. Elsewhere a line goes on if it
    is full, or nearly so and does not end where a sentence does. Headings stand alone.
    """
    width = found.width
    by_indent = 0.02 <= found.indented / max(1, found.texts) <= 0.6
    held: tuple[int, str] | None = None
    last = ""  # the part of the held line that came last
    for number, line in lines:
        stripped = strip_text(line)
        if not stripped or number in headings or line == SECTION:
            if held is not None:
                yield held
            yield number, line
            held = None
            continue
        if held is not None:
            if by_indent:
                goes_on = not line[0].isspace()
            else:
                # A sentence ends at the end of a full line more often than a paragraph does.
                goes_on = len(last) >= width or (len(last) >= 0.8 * width and not last.endswith(_SENTENCE_END))
            if goes_on:
                counts["joined"] += 1
                held, last = (held[0], joined(held[1], stripped)), stripped
                continue
            yield held
        held, last = (number, stripped), stripped
    if held is not None:
        yield held


def joined(first: str, second: str) -> str:
    """Two parts of a line as one: with a space between Latin words, and a word that was divided made whole.

    Example:
        >>> joined("他走到河", "边。"), joined("a deep", "sleep"), joined("an inter-", "national")
        ('他走到河边。', 'a deep sleep', 'an international')
    """
    if re.search(r"[a-z]-$", first) and re.match("[a-z]", second):
        return first[:-1] + second
    if first[-1].isdigit() and second[0].isdigit():
        return first + second  # a number in Chinese text, which is broken anywhere
    latin = first[-1].isascii() and second[0].isascii() and not first[-1].isspace()
    return f"{first} {second}" if latin else first + second
