"""What the scripts say, in Chinese: a table of two columns, applied where a line is written.

The left column of messages_zh.py is the sentence of the code with {} for its values, and a test finds each of them in
the code; the right column is the same in Chinese, with {0}, {1} … for the values. A value of several words may be a
sentence of the table too. What is not in the table stays English. The words "error:", "warning:" and "note:" stay as
they are, so that they can be searched for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TextIO

from gpt2_chinese.messages_zh import TABLE

_PREFIX = re.compile(r"(?:[\w-]+\.py: )?(?:error: |warning: |note: )?")  # with its name where argparse ends a script


def language_of(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> str:
    """ "zh" or "en": what --lang says, or else the locale of a process, LC_ALL, LC_MESSAGES and LANG, the first set."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--lang":
            return value or "".join(arguments[index + 1 : index + 2])
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if locale := environment.get(name):
            return "zh" if locale.lower().startswith("zh") else "en"
    return "en"


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    # The longer a sentence is, the less it can be mistaken for another.
    ordered = sorted(TABLE, key=lambda row: -len(row[0].replace("{}", "")))
    return [(re.compile(_pattern(english)), chinese) for english, chinese in ordered]


def _pattern(english: str) -> str:
    pattern = "(.*?)".join(map(re.escape, english.split("{}")))
    if english.startswith("{}"):
        pattern = "(?![a-z]+  )" + pattern  # a label, as of "plan       ", is no value but has a row of its own
    # A value right behind another one is an addition to it.
    return pattern.replace("(.*?)(.*?)", r"(.*?)((?: \(|;| ±| and ).*?|)")


def translated(text: str) -> str:
    """A text that a script writes, line by line in Chinese as far as the table has it."""
    return "\n".join(map(_translated_line, text.split("\n")))


def _translated_line(line: str) -> str:
    prefix = _PREFIX.match(line)[0]  # type: ignore[index]
    return prefix + _translated_sentence(line[len(prefix) :])


def _translated_sentence(sentence: str) -> str:
    if not sentence.strip():
        return sentence
    for pattern, chinese in _patterns():
        if found := pattern.fullmatch(sentence):
            return chinese.format(*map(_translated_value, found.groups()))
    return sentence


def _translated_value(value: str) -> str:
    # A single word is a name, a number or a flag, even if a sentence of the table is the same word.
    return _translated_sentence(value) if " " in value else value


class TranslatedStream:
    """A stream that writes what it is given in Chinese; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.untranslated = stream

    def write(self, text: str) -> int:
        return self.untranslated.write(translated(text))

    # What is compared is where the text goes: tqdm clears its bar before a line to the same terminal.
    def __eq__(self, other: object) -> bool:
        return True if other is self or other is self.untranslated else NotImplemented

    def __hash__(self) -> int:
        return hash(self.untranslated)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.untranslated, name)
