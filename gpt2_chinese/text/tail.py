"""The ids at the end of a long text, without tokenizing what stands before them.

A model keeps n_ctx tokens of a context, so of 64 KiB only the end need be tokenized. That is right only where a text
can be cut so that what is left has the ids that it has in the whole. `find_cut` gives such places alone; where it
knows none, the whole is tokenized. Why the ids are the same, by tokenizer:

* Every tokenizer but BPE works line by line, and carries nothing over a line break.
* Characters: an ideograph is a word by itself, so that no word reaches over the place before one, and folding and
  WordPiece look at one word at a time. What begins with an ideograph is not white space alone, which `compat` reads
  in another way.
* Words: in a line, the place after a full stop between ideographs, 甲乙。丙 (`_SENTENCE`). THULAC gives that mark the
  label of a word of one character, since none of its neighbours may be joined to it; by Viterbi's algorithm the best
  labels after a character with one possible label do not depend on those before it, only on the weights, which look
  two characters back: these, 甲乙, stay before the cut and their words are dropped. No entry of its dictionaries goes
  on behind such a mark, and no space stands behind it, so that joining and spelling begin anew too. Excluded is what
  THULAC decides for a line as a whole: lines of 50,000 characters and more, short titles in 《》, and lines that may
  have no possible labels at all (`_CONTRADICTION`, and all that do not end as `_ENDS_PLAINLY`), where every character
  is a word.
* BPE with GPT-2's pattern: no piece of the pattern goes on from an ideograph or a letter of ASCII to a punctuation
  mark, a line break or a space, and none looks back.

tests/both/text/test_tail.py compares random texts of all kinds with the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.segmenter import CLOSED_PARTICLES, MAX_LENGTH, OTHER_MARKS, PARTICLES, SINGLE_MARKS
from gpt2_chinese.text.tokenizers import HasDefinition, Tokenizer
from gpt2_chinese.text.word_tokenizer import LINE_BREAK, WordTokenizer

CHARACTERS_PER_TOKEN = 4
"""Of the first try; if it gives too few tokens, the next one takes `GROWTH` times as many characters."""
GROWTH = 4
_BLOCK = 4096  # characters in which a cut is looked for at a time

_PLAIN = f"(?![{PARTICLES}])[一-鿿]"
_SENTENCE = re.compile(f"[一-鿿]{{2}}[。！](?={_PLAIN})")
_ENDS_PLAINLY = re.compile(f"(?:{_PLAIN}{_PLAIN}|[。！])$")
# A particle that must be a word, and behind it a character that must be inside of one.
_CONTRADICTION = re.compile(
    rf"[\s{re.escape(PARTICLES + SINGLE_MARKS + OTHER_MARKS)}][{CLOSED_PARTICLES}]"
    f"(?![{CLOSED_PARTICLES}])[{re.escape(PARTICLES + OTHER_MARKS)}]"
)
_CONTEXT = 3  # characters of `_SENTENCE`, whose words are dropped
_IDEOGRAPH = re.compile("[一-鿿]")
_BPE_EDGE = re.compile("(?<=[一-鿿A-Za-z])[，。！？、；：\n ]")


@dataclass(frozen=True)
class Cut:
    """Where the tokens of a text's end begin.

    Attributes:
        start: the first character that is tokenized.
        context: characters from there on that only the segmenter sees, and whose words are dropped.
    """

    start: int
    context: int = 0


def encode_tail(tokenizer: Tokenizer, text: str, count: int) -> tuple[list[int], int]:
    """The last ids of a text: at least `count` of them, or all.

    Returns:
        The ids, which end those of the whole text, and how many characters before theirs were not tokenized.
    """
    length = CHARACTERS_PER_TOKEN * count
    while 2 * length < len(text):
        cut = find_cut(tokenizer, text, len(text) - length)
        if cut is None:
            break
        ids = _encode_from(tokenizer, text, cut)
        if len(ids) >= count:
            return ids, cut.start + cut.context
        length *= GROWTH
    return tokenizer.encode(text), 0


def _encode_from(tokenizer: Tokenizer, text: str, cut: Cut) -> list[int]:
    if cut.context:
        assert isinstance(tokenizer, WordTokenizer)
        return tokenizer.encode(text[cut.start :], context=cut.context)
    return tokenizer.encode(text[cut.start :])


def find_cut(tokenizer: Tokenizer, text: str, latest: int) -> Cut | None:
    """The last place at or before `latest` from which on the ids are those of the whole; None where none is known."""
    if isinstance(tokenizer, HasDefinition):
        return _last(_BPE_EDGE, text, latest) if _splits_as_gpt2(tokenizer.definition) else None
    if isinstance(tokenizer, WordTokenizer) and tokenizer.rules.keeps_spaces:
        return None  # a space beside Chinese is marked in the whole text
    if isinstance(tokenizer, CharTokenizer):
        return _later(_last_line(text, latest), _last(_IDEOGRAPH, text, latest))
    line = _last_line(text, latest)
    if isinstance(tokenizer, WordTokenizer) and not tokenizer.compat:
        return _later(line, _last_sentence(tokenizer, text, latest))
    return line


def _later(one: Cut | None, other: Cut | None) -> Cut | None:
    return max((cut for cut in (one, other) if cut is not None), key=lambda cut: cut.start + cut.context, default=None)


def _last_line(text: str, latest: int) -> Cut | None:
    """From a line break on; with the break itself, so that what is left is never blank."""
    start = text.rfind(LINE_BREAK, 0, latest + 1)
    return Cut(start) if start > 0 else None


def _last_sentence(tokenizer: WordTokenizer, text: str, latest: int) -> Cut | None:
    begin = text.rfind(LINE_BREAK, 0, latest) + 1
    end = text.find(LINE_BREAK, latest)
    line = text[begin : end if end >= 0 else len(text)]
    if len(line) >= MAX_LENGTH or "《" in line or not _ENDS_PLAINLY.search(line) or _CONTRADICTION.search(line):
        return None
    if not all(map(tokenizer.rules.clean_character, set(line))):
        return None  # it has characters that are dropped
    cut = _last(_SENTENCE, line, latest - begin - _CONTEXT)
    return None if cut is None else Cut(begin + cut.start, _CONTEXT)


def _last(pattern: re.Pattern[str], text: str, latest: int) -> Cut | None:
    """The last match that begins at or before `latest`, and not at the beginning."""
    for begin in _blocks(latest):
        found = None
        for match in pattern.finditer(text, max(1, begin), begin + _BLOCK + _CONTEXT):
            if match.start() <= latest:
                found = match.start()
        if found is not None:
            return Cut(found)
    return None


def _blocks(latest: int) -> Iterator[int]:
    begin = latest - _BLOCK + 1
    while begin > -_BLOCK:
        yield begin
        begin -= _BLOCK


def _splits_as_gpt2(definition: str) -> bool:
    """Whether a tokenizer.json cuts a text with GPT-2's own pattern, as it is, and knows no tokens beside."""
    value = json.loads(definition)
    step = value.get("pre_tokenizer") or {}
    return (
        value.get("normalizer") is None
        and step.get("type") == "ByteLevel"
        and not step.get("add_prefix_space")
        and step.get("use_regex", True)
        and all(token.get("special") for token in value.get("added_tokens") or ())
    )
