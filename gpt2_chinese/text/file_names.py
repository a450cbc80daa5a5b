"""Which files of a folder are texts, and the order a person would give them."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from pathlib import Path

_WRITINGS = ("〇零", "一壹弌", "二贰貳两兩弍", "三叁參弎", "四肆", "五伍", "六陆陸", "七柒", "八捌", "九玖")
_DIGITS = {character: value for value, characters in enumerate(_WRITINGS) for character in characters}
_TENS = {"十": 10, "拾": 10, "廿": 20, "卅": 30, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_CHINESE_NUMERAL = "".join([*_DIGITS, *_TENS, *_MYRIADS])
_NUMERALS = re.compile(
    rf"\d+|[{_CHINESE_NUMERAL}]+|[\u2160-\u2188\u2460-\u249b\u24ea-\u24ff\u2776-\u2793\u3220-\u3229]"
)


def chinese_number(numeral: str) -> int:
    """The value of a Chinese numeral, in units (三百二十一) or digit by digit (二〇二六).

    Example:
        >>> chinese_number("一百零三")
        103
    """
    if not any(character in _TENS or character in _MYRIADS for character in numeral):
        return int("".join(str(_DIGITS[character]) for character in numeral))
    total = part = digit = 0  # of what is whole, below the next myriad, not yet multiplied
    for character in numeral:
        if character in _DIGITS:
            digit = 10 * digit + _DIGITS[character]
        elif (unit := _TENS.get(character)) is not None:
            factor = unit if character in "廿卅" else max(digit, 1) * unit
            part, digit = part + factor, 0
        else:
            total, part, digit = total + max(part + digit, 1) * _MYRIADS[character], 0, 0
    return total + part + digit


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key by which names are in the order of the numbers in them: 第2章 before 第10章, 第九章 before 第十章.

    Numerals are the digits of every script, full-width ones, Chinese ones, and characters such as Ⅻ and ⑫. natsort has
    the same for digits, but takes 十二 for two numbers.
    """
    parts: list[tuple[int, int, str]] = []
    end = 0
    for match in _NUMERALS.finditer(name):
        if match.start() > end:
            parts.append((1, 0, name[end : match.start()].casefold()))
        numeral = match.group()
        if numeral[0].isdecimal():
            number = int(numeral)
        elif numeral[0] in _CHINESE_NUMERAL:
            number = chinese_number(numeral)
        else:
            number = int(unicodedata.numeric(numeral, 0.0))
        parts.append((0, number, ""))
        end = match.end()
    if end < len(name):
        parts.append((1, 0, name[end:].casefold()))
    return (*parts, (2, 0, name))


def is_hidden_or_lock(path: Path) -> bool:
    """Whether a file is one that systems and editors put beside a text: hidden, a lock, a copy while it is edited.

    They begin with a dot (also ._a.txt of macOS and .~lock.a.txt# of LibreOffice), with ~$ (Office) or with # (Emacs),
    or have the attribute "hidden" of Windows.
    """
    if path.name.startswith((".", "~$", "#")) or path.name.endswith("~"):
        return True
    try:
        attributes = getattr(os.lstat(path), "st_file_attributes", 0)
    except OSError:
        return False
    return bool(attributes & getattr(stat, "FILE_ATTRIBUTE_HIDDEN", 2))
