"""Which encoding a text is in, told by how probable it is as language, not only by whether its bytes are valid.

The bytes are decoded in every encoding of the table, and each result is scored: the sum of the logarithms of the
probabilities that its characters have in a language. Since every reading is of the same bytes, the sums can be
compared: the best reading wins if it is probable enough for its language and if the next one that gives another text
is far behind. Otherwise the encoding is refused, never guessed.

The probabilities are coarse on purpose. The characters of a language are in some classes (the most frequent hundred,
some hundreds more, the first level of its national standard, the second, punctuation, others), and all characters of
a class are equally probable. Which characters a standard has in its first level comes from Python's codecs.
"""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from gpt2_chinese.text.frequent_characters import HANGUL, KANJI, SIMPLIFIED, TRADITIONAL

SAMPLE_BYTES = 1 << 16  # as many bytes of a file are scored

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# Encodings with the languages they are used for. Of two that read a sample alike the first one is named: the vendors'
# supersets (cp950, cp932, cp949) come before the standards, for that is what lies on people's disks.
_CHINESE, _ALL = ("simplified", "traditional"), ("simplified", "traditional", "japanese", "korean")
CANDIDATES: dict[str, tuple[str, ...]] = {
    "utf-8": (*_ALL, "russian", "western", "central"),
    "gb18030": (*_CHINESE, "japanese"),
    "cp950": ("traditional", "japanese"),
    "big5hkscs": ("traditional",),
    "cp932": ("japanese",),
    "shift_jis_2004": ("japanese",),
    "euc_jp": ("japanese",),
    "euc_jis_2004": ("japanese",),
    "cp949": ("korean",),
    "johab": ("korean",),
    "utf-16-le": _ALL,
    "utf-16-be": _ALL,
    "utf-32-le": _ALL,
    "utf-32-be": _ALL,
}
# Encodings of Cyrillic and of accented letters. They are read along so that such a text is not taken for Chinese, but
# never chosen: too many of them differ by a few letters only.
RIVALS: dict[str, tuple[str, ...]] = {
    "cp1251": ("russian",),
    "koi8_r": ("russian",),
    "cp866": ("russian",),
    "iso8859_5": ("russian",),
    "mac_cyrillic": ("russian",),
    "cp1252": ("western",),
    "cp850": ("western",),
    "mac_roman": ("western",),
    "cp1250": ("central",),
    "iso8859_2": ("central",),
    "cp852": ("central",),
}
# Encodings of seven bits, which are valid UTF-8 too, with what gives them away.
ESCAPED = (
    ("iso2022_jp_ext", re.compile(rb"\x1b(?:\$[@B]|\(J|\$\(D|\(I)"), "japanese"),
    ("iso2022_jp_2004", re.compile(rb"\x1b\$\([OPQ]"), "japanese"),
    ("iso2022_kr", re.compile(rb"\x1b\$\)C"), "korean"),
    ("hz", re.compile(rb"~\{(?:[\x21-\x77][\x21-\x7e])+~\}"), "simplified"),
)
# Of relatives the first one is taken in which the fewest bytes are bad: what they differ in is too rare to be scored.
_FAMILIES = (("cp950", "big5hkscs"), ("cp932", "shift_jis_2004"), ("euc_jp", "euc_jis_2004"))
_EAST_ASIAN = (
    "gb2312", "gbk", "gb18030", "hz", "big5", "cp950", "big5hkscs", "cp932", "shift_jis", "shift_jis_2004",
    "shift_jisx0213", "euc_jp", "euc_jis_2004", "euc_jisx0213", "euc_kr", "cp949", "johab",
)  # fmt: skip
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")  # a line break is not one byte

BAD_BYTE = -20.0  # as a logarithm: three to five characters of a good reading pay for one
_MARGIN = 7.0  # the next reading that gives another text must be less probable by a factor of e**7
# The mean logarithm of a character outside ASCII below which a text is not taken for the language, and how much lower
# it may be in a short text, for n characters by this over the root of n.
_LEAST_MEAN = {
    "simplified": -8.45, "traditional": -8.45, "japanese": -7.3, "korean": -7.4, "russian": -4.0, "western": -6.3,
    "central": -6.0,
}  # fmt: skip
_SHORT = 3.0
# Rare characters (poems, names) are forgiven that much where every other reading is far worse, by character.
_FORGIVEN, _FAR = 1.0, 2.5


def is_wide(codec: str) -> bool:
    """Whether a line break is more than one byte in an encoding."""
    return codec.replace("_", "-").startswith(("utf-16", "utf-32"))


def is_multibyte(codec: str) -> bool:
    """Whether an encoding is one of East Asia's, which UTF-8 is sometimes valid in."""
    name = codec.replace("-", "_")
    return name in _EAST_ASIAN or name.startswith("iso2022")


class EncodingNotTold(ValueError):
    """No reading is probable enough, or two of them are; the message says which came nearest."""


# ---------------------------------------------------------------------------------------------------------------------
# How probable a character is in a language.

_PUNCTUATION = "，。、！？：；“”‘’（）《》「」『』…—·　"
_FORMS = "０１２３４５６７８９％～－．／【】〈〉〔〕①②③④⑤⑥⑦⑧⑨⑩☆★○●◎□■△▲※→←↑↓°×÷℃￥"
_RUSSIAN = {  # in a thousand letters of a text
    "о": 110, "е": 84, "а": 80, "и": 74, "н": 67, "т": 63, "с": 55, "р": 47, "в": 45, "л": 44, "к": 35, "м": 32,
    "д": 30, "п": 28, "у": 26, "я": 20, "ы": 19, "ь": 17, "г": 17, "з": 16, "б": 16, "ч": 14, "й": 12, "х": 10,
    "ж": 9, "ш": 7, "ю": 6, "ц": 5, "щ": 4, "э": 3, "ф": 3, "ъ": 1, "ё": 1,
}  # fmt: skip
_WESTERN = "àâäáãåæçèéêëìíîïñòóôöõøùúûüßœ"
_CENTRAL = "áéíóúýąćčďęěłľĺńňôőřŕśšťůűźżžăâîșțşţđ"


def _level(character: str, codec: str, first: int, last: int) -> int:
    """1 if the first of its two bytes is in these bounds, those of the first level; 2 if not; 0 if there is no such."""
    try:
        code = character.encode(codec)
    except UnicodeEncodeError:
        return 0
    if len(code) != 2:
        return 0
    return 1 if first <= code[0] <= last else 2


@dataclass(frozen=True)
class _Language:
    """Classes of characters with the share that they have of a text's characters outside ASCII.

    Attributes:
        classes: characters, each class equally shared out among its members; a character counts where it is first.
        levels: codec, bounds of the first level's lead bytes, share and size of the first level, of the second.
    """

    classes: tuple[tuple[str, float], ...]
    levels: tuple[str, int, int, float, int, float, int] | None = None

    def table(self) -> dict[str, float]:
        known: dict[str, float] = {}
        for characters, share in self.classes:
            for character in characters:
                known.setdefault(character, math.log(share / len(characters)))
        return known


def _characters(*bounds: tuple[int, int]) -> str:
    return "".join(chr(code) for first, last in bounds for code in range(first, last + 1))


_HIRAGANA, _KATAKANA = _characters((0x3041, 0x3093)), _characters((0x30A1, 0x30F6), (0x30FB, 0x30FC))
_KANA = _HIRAGANA + _KATAKANA
_HALF_KANA = _characters((0xFF61, 0xFF9F))
_SOME = ((_PUNCTUATION, 0.13), (_FORMS, 0.01), (_characters((0xFF01, 0xFF5E)), 0.01), (_KANA, 0.002))
_LANGUAGES = {
    "simplified": _Language(
        ((SIMPLIFIED[:100], 0.36), (SIMPLIFIED[100:], 0.26), *_SOME), ("gb2312", 0xB0, 0xD7, 0.20, 3755, 0.012, 3008)
    ),
    "traditional": _Language(
        ((TRADITIONAL[:100], 0.36), (TRADITIONAL[100:], 0.26), ("嘅咗喺佢哋啲嚟冇嘢係唔咁噉俾嗰睇乜", 0.003), *_SOME),
        ("big5", 0xA4, 0xC6, 0.20, 5401, 0.006, 7652),
    ),
    "japanese": _Language(
        (
            (_HIRAGANA, 0.50), (_KATAKANA, 0.09), (KANJI[:100], 0.09), (KANJI[100:], 0.11), ("々ヶ", 0.002),
            (_HALF_KANA, 0.0005), *_SOME,
        ),
        ("euc_jp", 0xB0, 0xCF, 0.08, 2965, 0.004, 3390),
    ),
    "korean": _Language(
        ((HANGUL[:100], 0.50), (HANGUL[100:], 0.30), ("ㅋㅎㅠㅜㄱㄴㄷㅅㅇ", 0.005), *_SOME),
        ("euc_kr", 0xB0, 0xC8, 0.12, 2350, 0.008, 4888),
    ),
    "russian": _Language(
        (
            *((letter, 0.93 * share / 1000) for letter, share in _RUSSIAN.items()),
            *((letter.upper(), 0.04 * share / 1000) for letter, share in _RUSSIAN.items()),
            ("«»—–№…“”„", 0.02), ("іїєґўјљњћџђ", 0.01), ("ІЇЄҐЎЈЉЊЋЏЂ", 0.0005),
        )
    ),
    "western": _Language(
        ((_WESTERN, 0.80), (_WESTERN.upper(), 0.02), ("“”‘’…–—«»·¿¡°€£§©®", 0.15), ("\u00a0", 0.01))
    ),
    "central": _Language(
        ((_CENTRAL, 0.90), (_CENTRAL.upper(), 0.02), ("“”„‚‘’…–—«»§°", 0.06), ("\u00a0", 0.01))
    ),
}  # fmt: skip

# Characters that no class has, by general category and block.
_IDEOGRAPH, _RARE_IDEOGRAPH, _SYLLABLE, _OTHER = math.log(3e-7), math.log(1e-8), math.log(2e-7), math.log(5e-7)
_SELDOM, _NEVER = math.log(2e-8), -20.0
_ASCII = {"\n": -2.5, "\r": -2.5, "\t": -4.0, " ": -2.0, "\x0c": -9.0, "\x1a": -9.0}


@lru_cache(maxsize=1 << 17)
def _ascii(character: str) -> float:
    """An ASCII character has the same probability in every language, so that it decides nothing by itself."""
    if (known := _ASCII.get(character)) is not None:
        return known
    if character.islower():
        return -3.3
    if character.isdigit():
        return -4.0
    return -4.8 if character.isprintable() else -14.0


def _probability(language: str) -> Callable[[str], float]:
    """The logarithm of the probability of a character outside ASCII."""
    definition = _LANGUAGES[language]
    known = definition.table()
    levels = definition.levels

    def of(character: str) -> float:
        found = known.get(character)
        if found is not None:
            return found
        if levels is not None:
            codec, first, last, share, size, second_share, second_size = levels
            level = _level(character, codec, first, last)
            if level and unicodedata.category(character) == "Lo":
                return math.log(share / size) if level == 1 else math.log(second_share / second_size)
        code = ord(character)
        if 0x4E00 <= code <= 0x9FFF:
            return _IDEOGRAPH
        if 0xAC00 <= code <= 0xD7A3:
            return _SYLLABLE
        category = unicodedata.category(character)
        if category in ("Co", "Cn", "Cs") or (category == "Cc" and code != 0x85) or code == 0xFFFD:
            return _NEVER
        if 0x3400 <= code <= 0x4DBF or code >= 0x20000:
            return _RARE_IDEOGRAPH
        if code < 0x3200 or 0xFE30 <= code:
            return _OTHER
        return _SELDOM

    return lru_cache(maxsize=1 << 17)(of)


_PROBABILITIES = {language: _probability(language) for language in _LANGUAGES}
_ADJOINING = re.compile("(?<=[\u00a1-\u024f])[\u00a1-\u024f]")
_LONELY = -4.0  # an accented letter of a western language seldom stands beside another


# ---------------------------------------------------------------------------------------------------------------------
# How probable a reading is.


@dataclass(frozen=True)
class Reading:
    """Bytes as text in one encoding, taken for one language.

    Attributes:
        encoding: the codec's name.
        language: for which it is most probable.
        text: what it gives; bytes that are not in the encoding are left out.
        score: the logarithm of its probability.
        mean: that of the characters outside ASCII and the bad bytes, by their number.
        wide: how many characters outside ASCII there are.
        bad_bytes: how many bytes are not in the encoding.
    """

    encoding: str
    language: str
    text: str
    score: float
    mean: float
    wide: int
    bad_bytes: int

    def is_language(self, forgiven: float = 0.0) -> bool:
        """Whether a text of the language looks like this, its mean being as much better as is forgiven."""
        least = _LEAST_MEAN[self.language] - _SHORT / math.sqrt(max(self.wide, 1))
        return self.wide > 0 and self.mean + forgiven >= least


class _TooManyBadBytes(Exception):
    pass


def decode_tolerantly(data: bytes, encoding: str, most: int) -> tuple[str, int]:
    """Decode and leave out bytes that are not in the encoding; give their number. An unfinished end is left out.

    Raises:
        _TooManyBadBytes: there are more than `most`.
    """
    bad = 0

    def handle(error: UnicodeError) -> tuple[str, int]:
        nonlocal bad
        assert isinstance(error, UnicodeDecodeError)
        bad += error.end - error.start
        if bad > most:
            raise _TooManyBadBytes
        return "", error.end

    codecs.register_error("gpt2_chinese.tolerate", handle)
    decoder = codecs.getincrementaldecoder(encoding)(errors="gpt2_chinese.tolerate")
    return decoder.decode(data), bad


def read_as(data: bytes, encoding: str, languages: Iterable[str]) -> Reading | None:
    """The most probable reading in an encoding, or None if too many bytes are not in it."""
    try:
        text, bad = decode_tolerantly(data, encoding, max(3, len(data) // 50))
    except (_TooManyBadBytes, UnicodeError):
        return None
    counts = Counter(text)
    ascii_score = sum(count * _ascii(character) for character, count in counts.items() if character < "\x80")
    wide = {character: count for character, count in counts.items() if character >= "\x80"}
    number = sum(wide.values())
    best: tuple[float, str] | None = None
    for language in languages:
        of = _PROBABILITIES[language]
        score = sum(count * of(character) for character, count in wide.items())
        if language in ("western", "central"):
            score += _LONELY * len(_ADJOINING.findall(text))
        if best is None or score > best[0]:
            best = score, language
    assert best is not None
    score = best[0] + bad * BAD_BYTE
    # One bad byte does not spoil a text: the mean forgives one in a hundred characters.
    forgiven = min(bad, 1 + number // 100)
    mean = (score - forgiven * BAD_BYTE) / max(number, 1)
    return Reading(encoding, best[1], text, score + ascii_score, mean, number, bad)


def readings(data: bytes, *, wide: bool = True) -> list[Reading]:
    """All readings of the bytes, the most probable first; `wide` is whether UTF-16 and UTF-32 are among them."""
    found = [
        reading
        for encoding, languages in (CANDIDATES | RIVALS).items()
        if (wide or encoding not in WIDE) and (reading := read_as(data, encoding, languages)) is not None
    ]
    return sorted(found, key=lambda reading: -reading.score)


def escaped_encoding(data: bytes) -> str | None:
    """The encoding of seven bits (ISO 2022, HZ) whose signs are in the bytes and which they are valid in, if any."""
    for encoding, sign, language in ESCAPED:
        if sign.search(data):
            reading = read_as(data, encoding, (language,))
            if reading is not None and reading.is_language(_FORGIVEN) and not reading.bad_bytes:
                return encoding
    return None


def most_probable(data: bytes, *, wide: bool = True) -> Reading:
    """The reading of the bytes if there is no doubt about it.

    Raises:
        EncodingNotTold: none is probable enough, or two are.
    """
    found = readings(data, wide=wide)
    if not found:
        raise EncodingNotTold("it is in none of the encodings that are tried")
    family = next((family for family in _FAMILIES if found[0].encoding in family), (found[0].encoding,))
    relatives = sorted((r for r in found if r.encoding in family), key=lambda r: family.index(r.encoding))
    best = min(relatives, key=lambda reading: reading.bad_bytes)
    others = (other for other in found[1:] if other.encoding not in family and other.text != best.text)
    other = next(others, None)
    margin = math.inf if other is None else best.score - other.score
    if not best.is_language(_FORGIVEN if margin >= _FAR * best.wide else 0.0):
        raise EncodingNotTold(f"the nearest one is {best.encoding}, but the text is hardly {best.language}")
    if best.encoding in RIVALS:
        raise EncodingNotTold(f"it looks like {best.encoding} or a similar encoding of a {best.language} language")
    if other is not None and margin < _MARGIN:
        raise EncodingNotTold(f"it may be {best.encoding} or {other.encoding}")
    return best
