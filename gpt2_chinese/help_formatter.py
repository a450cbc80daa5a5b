"""How --help is written: defaults behind what flags say, in Chinese where the messages are, wrapped by its width."""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections.abc import Iterable

from gpt2_chinese.command_line import message_language
from gpt2_chinese.help_zh import DESCRIPTIONS, FLAGS

_DEFAULT = " (default: %(default)s)"
_HEADINGS = {"options": "选项", "positional arguments": "位置参数"}
# What a line is not broken in: a word of Latin letters, or a character with the marks that belong to it.
_UNBREAKABLE = re.compile(
    r"\s+|[（《“「]*(?:[^\s\u2e80-\uffef]+|[^（《“「])[，。；：、！？）》”」]*|[（《“「]+", re.DOTALL
)


class HelpFormatter(argparse.HelpFormatter):
    """A help text is followed by its flag's default, unless it says that itself or the flag is off by default.

    A description of several lines stays as it is.
    """

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Iterable, prefix: str | None = None
    ) -> None:
        super().add_usage(usage, actions, groups, "用法：" if _is_chinese() else prefix)

    def start_section(self, heading: str | None) -> None:
        super().start_section(_HEADINGS.get(heading or "", heading) if _is_chinese() else heading)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").removesuffix(_DEFAULT)  # Python adds it to flags with a --no- twin
        is_value = isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool)
        show_default = is_value and action.default != argparse.SUPPRESS and "default" not in text
        if _is_chinese():
            return FLAGS.get(text, text) + ("（默认：%(default)s）" if show_default else "")
        return text + (_DEFAULT if show_default else "")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if _is_chinese():
            text = DESCRIPTIONS.get(self._prog, text)
        if "\n" in text.strip():
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return "\n".join(indent + line for line in self._split_lines(text, width))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(text, width) if _is_chinese() else super()._split_lines(text, width)


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text of Chinese and Latin letters that are at most so many columns wide on a terminal.

    A line begins with no closing mark and ends with no opening one; a Latin word that is too long for a line stands
    alone.
    """
    lines, used = [""], 0
    for part in _UNBREAKABLE.findall(text):
        if part.isspace():
            part = " "
        columns = display_width(part)
        if used and used + columns > width:
            lines.append("")
            used = 0
        if used or part != " ":
            lines[-1] += part
            used += columns
    return [line.rstrip() for line in lines]


def display_width(text: str) -> int:
    """Columns of a terminal that a text takes: two for a Chinese character or mark."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _is_chinese() -> bool:
    return message_language() == "zh"
