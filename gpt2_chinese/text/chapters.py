"""The chapter headings of a book, told from sentences that begin like one by the book's own numbering.

A line that may be a heading is a candidate, graded by its form. Entries of a table of contents are put aside (nothing
follows them, and they come again). What is left must make a sequence: for each unit (章, 卷, Chapter …) the chain of
candidates with the best sum of grades less the costs of leaps in the numbering is chosen by dynamic programming.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt2_chinese.text.file_names import chinese_number

STRONG, MEDIUM, WEAK = 3, 2, 1
_GAIN = {STRONG: 4.0, MEDIUM: 2.5, WEAK: 0.6}
VOLUME_LEVEL, CHAPTER_LEVEL, SECTION_LEVEL = 1, 2, 3
_LEVELS = {
    **dict.fromkeys("部册冊卷集篇", VOLUME_LEVEL),
    **dict.fromkeys("章回话話幕折", CHAPTER_LEVEL),
    **dict.fromkeys("节節", SECTION_LEVEL),
    **dict.fromkeys(("part", "book", "volume"), VOLUME_LEVEL),
    "chapter": CHAPTER_LEVEL,
    "section": SECTION_LEVEL,
}
_UNIT = "".join(unit for unit in _LEVELS if len(unit) == 1)
_LONGEST_HEADING = 60
_LONGEST_TITLE = 35
_WINDOW = 60  # candidates before one that the chain may continue from
_LEAST_BODY = 60  # characters between headings that are bare numbers, in the median

_NUMBER = r"(?:[0-9０-９]{1,5}|[〇零○一二三四五六七八九十百千万两兩廿卅壹贰叁肆伍陆柒捌玖拾佰仟貳參陸]{1,9})"
_SPACE = r"[\s\u3000]"
_OPENING = re.compile(rf"^(?:[【〔［\[（(<〈《「『=*#◆●■☆★※~～—–\-]|{_SPACE})+")
_CLOSING = re.compile(rf"(?:[】〕］\]）)>〉》」』=*#◆●■☆★※~～—–\-]|{_SPACE})+$")
_PREFIX = rf"(?:(?:正文卷?|VIP卷?|VIP章节|最新章节|《[^》]{{1,20}}》)(?:{_SPACE}|[:：、.·\-])*)?"
_NUMBERED = re.compile(
    rf"^{_PREFIX}第{_SPACE}*({_NUMBER}(?:{_SPACE}{_NUMBER})*)(?:{_SPACE}*[-~～—、至到]{_SPACE}*(?:第)?({_NUMBER}))?{_SPACE}*([{_UNIT}])(.*)$"
)
_NAMED_PREFIX = re.compile(rf"^([^\s，。！？；：、“”]{{1,15}}){_SPACE}+(?=第{_SPACE}*{_NUMBER}{_SPACE}*[章回])")
_REVERSED = re.compile(rf"^(卷)之?{_SPACE}*({_NUMBER})(?=[\s:：、.·]|$)(.*)$")
_SPECIAL = re.compile(
    r"^(?:楔子|序章|序言|序幕|序曲|引子|引言|前言|自序|代序|后记|後記|尾声|尾聲|终章|終章|大结局|大結局|附录|附錄|结语|"
    r"卷首语|卷尾语|完本感言|上架感言|作品相关|内容简介|内容提要|prologue|epilogue|preface|foreword|afterword|"
    r"introduction)(?=$|[\s:：、.·—\-（(《【上下])(.*)$",
    re.IGNORECASE,
)
_LONELY = re.compile(rf"^(?:序|跋|引|(?:尾|序){_SPACE}+[声聲章言])$")
_EXTRA = re.compile(
    rf"^(?:番外|外传|外傳)(?:篇|卷)?(?:之)?(?:{_SPACE}*[（(]?{_NUMBER}[）)]?(?=$|[\s:：、.·]))?(?:$|[\s:：、.·—\-（(《【])(.*)$"
)
_EXTRA_OF = re.compile(r"^(?:番外|外传|外傳)(?:篇|卷)?之([^，。！？；]{1,15})$")
_ENGLISH_WORDS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty".split()
)
_ENGLISH = re.compile(
    rf"^(?:vol(?:ume)?\.?\s*\d{{1,3}}[\s,:.\-—]+)?(chapter|ch\.|part|book|volume|section)\s+(\d{{1,4}}|[ivxlc]{{1,8}}|{'|'.join(_ENGLISH_WORDS)})(?=$|[\s:：.,\-—])(.*)$",
    re.IGNORECASE,
)
_BARE = re.compile(
    rf"^(?:(?P<d>\d{{1,4}})|(?P<c>[一二三四五六七八九十百零〇]{{1,6}})|[（(](?P<p>[一二三四五六七八九十百]{{1,6}}|\d{{1,4}})[）)])"
    rf"(?P<s>[、.．:：]{_SPACE}*|{_SPACE}+|章{_SPACE}*|$)(?P<t>.*)$"
)
_SEPARATOR = re.compile(r"^[\s\u3000:：、.．·・,，\-—–_|／/]+")
_BRACKET = re.compile(r"^[（(【《「『〈\[“\"]")
_PAGE_NUMBER = re.compile(r"(?:[.…·．\-_]{2,}|\s{2,}|\t)\s*\d{1,4}$")

# What follows a unit in words and sentences that begin like a heading, such as 第三节课, 第一部分, 第二回来.
_NO_TITLE = {
    "章": "鱼魚节程法",
    "节": "课課车車目日省约奏点制拍骨体",
    "節": "課車目日",
    "回": "来到去家答头忆应想过合事见遇听看碰",
    "集": "团体合中市结训",
    "卷": "子纸入起",
    "部": "分队门位落下署长电手小电影作",
    "册": "子",
    "冊": "子",
    "篇": "文报日",
    "话": "说还没",
    "話": "說還沒",
    "幕": "布后府",
    "折": "扣返",
}
_GRAMMAR = "的了是里中就也和与後后便都才还還讲講说說写寫开開结結读讀看"


@dataclass
class Candidate:
    """A line that may be a heading.

    Attributes:
        line: its number in the text, from 0.
        unit: 章, 卷, chapter …; "special" for 楔子 and its like; "bare" and a style for numbers alone.
        level: of VOLUME_LEVEL, CHAPTER_LEVEL and SECTION_LEVEL.
        number: None for special ones.
        grade: STRONG, MEDIUM or WEAK.
        title: what follows the number.
        body: characters of other lines between it and the next candidate.
        prefix: the words before 第, which must be before others too.
        volume: of a volume that is named in the same line.
    """

    line: int
    unit: str
    level: int
    number: int | None
    grade: int
    title: str
    body: int = 0
    prefix: str = ""
    volume: int | None = None

    @property
    def key(self) -> tuple[str, int | None, str]:
        """What two lines that are the same heading have in common."""
        return self.unit, self.number, "" if self.number is not None else self.title


@dataclass(frozen=True)
class Heading:
    """A heading: the number of its line from 0, its level, and whether a document begins with it."""

    line: int
    level: int
    begins_document: bool


def parse_number(text: str) -> int | None:
    """The value of a number in digits of either width or in Chinese numerals; None if it is none.

    Example:
        >>> [parse_number(text) for text in ("１２", "一百零五", "廿三", "一二三", "两千")]
        [12, 105, 23, 123, 2000]
    """
    if text.isdecimal():
        return int(text)
    try:
        return chinese_number(text.replace("○", "〇"))
    except (KeyError, ValueError):
        return None


def _roman(text: str) -> int | None:
    values = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}
    total = 0
    for character, following in zip(text, text[1:] + " ", strict=True):
        value = values[character]
        total += -value if values.get(following, 0) > value else value
    return total or None


def candidate(line: str, number: int) -> Candidate | None:
    """What a line is, if it may be a heading; `number` is the line's."""
    text = line.strip()
    if not text or len(text) > _LONGEST_HEADING:
        return None
    bare = _OPENING.sub("", text)
    if not bare or bare[0] not in _FIRST and not _NAMED_PREFIX.match(bare):
        return None
    closed = _CLOSING.sub("", bare) if len(bare) < len(text) or bare[-1] in "=*#" else bare
    found = _numbered(closed, number) or _special(closed, number) or _english(closed, number)
    return found or _bare(text, number)


_FIRST = frozenset(
    "第正《VvP卷楔序引前自代后後尾终終大附结跋番外完上作内PpEeFfAaIiCcBbSsiIxX最"
    "0123456789０１２３４５６７８９一二三四五六七八九十百〇零（("
)


def _numbered(text: str, line: int) -> Candidate | None:
    prefix = ""
    named = _NAMED_PREFIX.match(text)
    found = _NUMBERED.match(text)
    if found is None and named is not None and "第" not in named[1]:
        prefix, text = named[1], text[named.end() :]
        found = _NUMBERED.match(text)
    if found is None:
        reverse = _REVERSED.match(text)
        if reverse is None:
            return None
        number, unit, rest = parse_number(reverse[2]), reverse[1], reverse[3]
    else:
        number, unit, rest = parse_number("".join(found[1].split())), found[3], found[4]
        if unit == "章" and re.match(rf"[节節](?:$|{_SPACE}|[:：、.·])", rest):
            rest = rest[1:]  # 第一章节
    if number is None:
        return None
    volume = None
    if _LEVELS[unit] == VOLUME_LEVEL:
        inner = re.search(rf"(?:^|[\s　·:：])(第{_SPACE}*{_NUMBER}{_SPACE}*[章回节節话話].*)$", rest)
        if inner and (chapter := _numbered(inner[1], line)) and chapter.grade >= MEDIUM:
            chapter.volume = number
            return chapter
    grade, title = _grade(rest, unit)
    if not grade:
        return None
    return Candidate(line, unit, _LEVELS[unit], number, grade, title, prefix=prefix, volume=volume)


def _grade(rest: str, unit: str) -> tuple[int, str]:
    """The grade of what follows number and unit, 0 for a sentence, and the title."""
    rest = _PAGE_NUMBER.sub("", rest)
    if not rest.strip():
        return STRONG, ""
    separator = _SEPARATOR.match(rest)
    title = rest[separator.end() :].strip() if separator else rest.strip()
    ends_sentence = title.endswith(("。", "；", "，", "、", "：", ".", ";", ","))
    inside = title[:-1]
    if len(title) > _LONGEST_TITLE or re.search("[。；]", inside) or (ends_sentence and re.search("[，,：:]", inside)):
        return 0, title
    if re.search("[“”]", title) and re.search("[，：]", title):
        return 0, title  # somebody speaks
    if separator and "," not in separator[0] and "，" not in separator[0]:
        if ends_sentence:
            return WEAK, title
        return (MEDIUM if re.search("[，,！？!?…]", title) and unit != "回" else STRONG), title
    if separator:
        return (0 if ends_sentence or re.search("[，,]", title) else WEAK), title
    if _BRACKET.match(rest):
        return (WEAK if ends_sentence else STRONG), title
    if title[0] in "】〕］]）)》」』〉":
        return _grade(" " + title[1:], unit) if len(title) > 1 else (STRONG, "")
    halves = re.split("[，,]", title)
    if len(halves) == 2 and unit == "回" and 4 <= len(halves[0]) <= 11 and len(halves[0]) == len(halves[1]):
        return MEDIUM, title
    if title[0] in _NO_TITLE.get(unit, ""):
        return 0, title
    if ends_sentence or len(halves) > 1:
        return 0, title
    return (WEAK if title[0] in _GRAMMAR or len(title) > 20 else MEDIUM), title


def _special(text: str, line: int) -> Candidate | None:
    found = _SPECIAL.match(text) or _EXTRA.match(text) or _EXTRA_OF.match(text)
    if found is None:
        return Candidate(line, "special", CHAPTER_LEVEL, None, STRONG, text) if _LONELY.match(text) else None
    title = _PAGE_NUMBER.sub("", found[1]).strip()
    if len(title) > 25 or re.search("[。；，,]", title):
        return None
    return Candidate(line, "special", CHAPTER_LEVEL, None, STRONG, _PAGE_NUMBER.sub("", text).strip())


def _english(text: str, line: int) -> Candidate | None:
    found = _ENGLISH.match(text)
    if found is None:
        return None
    unit, numeral, rest = found[1].lower().replace("ch.", "chapter"), found[2].lower(), found[3]
    if numeral.isdecimal():
        number: int | None = int(numeral)
    else:
        number = _ENGLISH_WORDS.index(numeral) + 1 if numeral in _ENGLISH_WORDS else _roman(numeral)
    rest = _PAGE_NUMBER.sub("", rest)
    title = rest.strip(" :：.,-—\t")
    ends_sentence = rest.rstrip().endswith((".", ",", ";")) and len(title) > 0
    lower_case = bool(title) and title[0].islower()
    if ends_sentence and (lower_case or rest.startswith(" ")):
        return None
    grade = WEAK if lower_case or rest.startswith(",") else STRONG
    return Candidate(line, unit, _LEVELS[unit], number, grade, title)


def _bare(text: str, line: int) -> Candidate | None:
    found = _BARE.match(text)
    if found is None:
        return None
    title = found["t"].strip()
    if len(title) > 25 or re.search("[。；，,！？!?：:]", title):
        return None
    style = "d" if found["d"] else "c" if found["c"] else "p"
    number = parse_number(found[style])
    if number is None or number > 3000:
        return None
    separator = found["s"].strip()[:1] or ("" if title else "$")
    return Candidate(line, f"bare {style}{separator}", CHAPTER_LEVEL, number, STRONG, title)


@dataclass
class HeadingFinder:
    """Collects the candidates of a text line by line, and then tells which of them are headings.

    Memory grows with the number of candidates, not with the text.
    """

    candidates: list[Candidate] = field(default_factory=list)
    lines: int = 0
    body: int = 0  # characters before the first candidate

    def add(self, line: str) -> None:
        """Take the next line of the text."""
        found = candidate(line, self.lines)
        self.lines += 1
        if found is not None:
            self.candidates.append(found)
        elif self.candidates:
            self.candidates[-1].body += len(line.strip())
        else:
            self.body += len(line.strip())

    def headings(self) -> list[Heading]:
        """The headings of the text in their order."""
        chosen = self._choose([item for item in self.candidates if not item.unit.startswith("bare ")], bare=False)
        if not any(item.number is not None and item.level <= CHAPTER_LEVEL for item in chosen):
            chosen = self._choose(self.candidates, bare=True) or chosen
        return self._as_headings(chosen)

    def _choose(self, candidates: list[Candidate], *, bare: bool) -> list[Candidate]:
        candidates = self._with_bodies(candidates)
        candidates = _without_contents(candidates)
        candidates = _without_rare_prefixes(candidates)
        chosen: list[Candidate] = []
        for level in (VOLUME_LEVEL, CHAPTER_LEVEL, SECTION_LEVEL):
            above = sorted(item.line for item in chosen)
            units = defaultdict(list)
            for item in candidates:
                if item.level == level and item.number is not None:
                    units[item.unit].append(item)
            chains = [chain(items, above, between=candidates) for items in units.values()]
            chains = [items for items in chains if items]
            if bare:
                chains = [items for items in chains if not items[0].unit.startswith("bare ") or _is_regular(items)]
            chosen += [item for items in chains for item in items]
        chosen = _without_strays(chosen)
        specials = [item for item in candidates if item.number is None]
        if any(item.number is not None for item in chosen) or len(specials) > 1:
            chosen += specials
        return sorted(chosen, key=lambda item: item.line)

    def _with_bodies(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates with bodies counted up to the next of them; others are text."""
        kept = {item.line for item in candidates}
        result: list[Candidate] = []
        for item in self.candidates:
            if item.line in kept:
                result.append(Candidate(**vars(item)))
            elif result:
                result[-1].body += item.body + len(item.title) + 2
        return result

    def _as_headings(self, chosen: list[Candidate]) -> list[Heading]:
        # Sections are within chapters where there are chapters.
        deepest = (
            CHAPTER_LEVEL if any(item.level == CHAPTER_LEVEL and item.number is not None for item in chosen) else 9
        )
        body: Counter[int] = Counter()
        position = -1
        for item in self.candidates:  # the text between two headings, refused candidates with it
            while position + 1 < len(chosen) and chosen[position + 1].line <= item.line:
                position += 1
            is_heading = position >= 0 and chosen[position].line == item.line
            body[position] += item.body + (0 if is_heading else len(item.title) + 2)
        headings = []
        open_document = False  # a document has begun and has headings only
        for number, item in enumerate(chosen):
            begins = item.level <= deepest and not open_document
            headings.append(Heading(item.line, item.level, begins))
            open_document = (begins or open_document) and not body[number]
        return headings


def _without_contents(candidates: list[Candidate]) -> list[Candidate]:
    """Leave out the entries of tables of contents, and headings that stand twice in a row."""
    places: dict[tuple[str, int | None, str], list[int]] = defaultdict(list)
    for index, item in enumerate(candidates):
        places[item.key].append(index)
    dropped: set[int] = set()
    begin = 0
    while begin < len(candidates):
        end = begin + 1
        while end < len(candidates) and not candidates[end - 1].body:
            end += 1
        run = range(begin, end)  # without text between them
        if end - begin >= 3:
            first_text = _tail(candidates, run)  # the headings of the book's first chapter, right behind the contents
            later = [index for index in run if index < first_text and places[candidates[index].key][-1] > index]
            outside = [index for index in run if places[candidates[index].key][-1] >= end]
            earlier = [index for index in run if places[candidates[index].key][0] < begin]
            if len(later) * 2 > end - begin or len(outside) >= 3:
                dropped.update(later)
            elif len(earlier) * 2 > end - begin and len(earlier) >= 3:
                dropped.update(earlier)
        for index in run[:-1]:
            following = candidates[index + 1]
            if (
                index not in dropped
                and candidates[index].key == following.key
                and _same_title(candidates[index], following)
            ):
                dropped.add(index + 1)
                candidates[index].body += following.body
        begin = end
    return [item for index, item in enumerate(candidates) if index not in dropped]


def _tail(candidates: list[Candidate], run: range) -> int:
    """Where the headings begin, at the end of a run, that the run has as entries of a table of contents before."""
    units: set[str] = set()
    index = run.stop
    while index > run.start:
        item = candidates[index - 1]
        entries = [candidates[place] for place in range(run.start, index - 1) if candidates[place].key == item.key]
        if item.unit in units or not any(_same_title(entry, item) for entry in entries):
            break
        units.add(item.unit)
        index -= 1
    return index


def _same_title(first: Candidate, second: Candidate) -> bool:
    one, other = (re.sub(r"\W", "", item.title) for item in (first, second))
    return one == other or not one or not other


def _without_rare_prefixes(candidates: list[Candidate]) -> list[Candidate]:
    """Leave out what has words before 第 that stand before no other heading."""
    counts = Counter(item.prefix for item in candidates if item.prefix)
    return [item for item in candidates if not item.prefix or counts[item.prefix] > 1]


def chain(items: Sequence[Candidate], above: Sequence[int], *, between: Sequence[Candidate] = ()) -> list[Candidate]:
    """The best sequence among the candidates of one unit.

    Args:
        items: in the order of their lines.
        above: the lines of the headings of higher levels, behind which numbers may begin again.
    """
    best: list[float] = []
    before: list[int] = []
    scopes = [sum(line < item.line for line in above) for item in items] if len(above) < 50 else _scopes(items, above)
    for index, item in enumerate(items):
        assert item.number is not None
        value, origin = -min(2.0, 0.2 * max(0, item.number - 1)), -1
        for earlier in range(max(0, index - _WINDOW), index):
            known = items[earlier]
            new_scope = scopes[index] > scopes[earlier] or known.volume != item.volume
            score = best[earlier] - _cost(known, item, new_scope)
            if score > value:
                value, origin = score, earlier
        best.append(value + _GAIN[item.grade])
        before.append(origin)
    index = max(range(len(items)), key=best.__getitem__)
    places = []
    while index >= 0:
        places.append(index)
        index = before[index]
    places.reverse()
    return _filled(items, places)


def _scopes(items: Sequence[Candidate], above: Sequence[int]) -> list[int]:
    scopes, passed = [], 0
    for item in items:
        while passed < len(above) and above[passed] < item.line:
            passed += 1
        scopes.append(passed)
    return scopes


def _cost(known: Candidate, item: Candidate, new_scope: bool) -> float:
    """What it costs that `item` follows `known`."""
    assert known.number is not None and item.number is not None
    step = item.number - known.number
    if step == 1:
        return 0.0
    if new_scope and item.number <= 1:
        return 0.0
    if step == 0:
        return 1.0 if item.title != known.title and min(item.grade, known.grade) == STRONG else 4.5
    if step > 1:
        return min(2.5, 0.5 + 0.1 * step)
    if item.number <= 1:
        return 1.5 if item.grade == STRONG else 3.0
    return 5.0


def _filled(items: Sequence[Candidate], places: list[int]) -> list[Candidate]:
    """The chain without weak links at its ends, and with misprinted numbers where just one was missing."""
    chosen = [items[place] for place in places]
    kept = []
    for index, item in enumerate(chosen):
        if item.grade == WEAK:
            neighbours = chosen[index - 1 : index] + chosen[index + 1 : index + 2]
            steps = {neighbour.number - item.number for neighbour in neighbours}  # type: ignore[operator]
            among_weak = len(neighbours) == 1 and neighbours[0].grade == WEAK  # the end of a chain of such headings
            if not (steps == {-1, 1} or (among_weak and steps <= {-1, 1})):
                continue
        kept.append(item)
    taken = set(places)
    for first, second in zip(places, places[1:], strict=False):
        one, two = items[first].number, items[second].number
        between = [items[place] for place in range(first + 1, second) if place not in taken]
        strong = [item for item in between if item.grade == STRONG and item.body]
        if one is not None and two == one + 2 and len(strong) == 1 and strong[0].number not in range(1, one + 1):
            kept.append(strong[0])
    return sorted(kept, key=lambda item: item.line)


def _is_regular(items: Sequence[Candidate]) -> bool:
    """Whether bare numbers are headings: at least three, 1 2 3 without a gap, and text behind each."""
    numbers = [item.number for item in items]
    bodies = sorted(item.body for item in items)
    return (
        len(items) >= 3
        and numbers[0] in (0, 1)
        and all(
            isinstance(first, int) and second == first + 1 for first, second in zip(numbers, numbers[1:], strict=False)
        )
        and bodies[0] > 0
        and bodies[len(bodies) // 2] >= _LEAST_BODY
    )


def _without_strays(chosen: list[Candidate]) -> list[Candidate]:
    """Leave out single headings of a unit beside others that have several, but for a volume's before a chapter's."""
    counts = Counter(item.unit for item in chosen)
    if max(counts.values(), default=0) < 2:
        return [item for item in chosen if item.grade == STRONG]
    return [
        item
        for item in chosen
        if counts[item.unit] > 1
        or (item.grade == STRONG and item.level == VOLUME_LEVEL and (item.number in (0, 1) or not item.body))
    ]
