"""BERT's WordPiece over single characters, the tokenizer of GPT2-Chinese's default and of the checkpoints on the hub.

Chinese characters and punctuation stand alone; what is left between white space is looked up as the longest parts from
the left, `##` before all but the first. With `compat` a digit stands alone too, and the names of special tokens in a
text are read as these, as GPT2-Chinese's tokenization_bert.py does.

A copy of this file travels in model folders (tokenization_gpt2_chinese.py), so it needs numpy alone.

`tokenizers` has the same in Rust, at 1.2 MB/s a core where this has 10 and more (docs/architecture.md); the tests hold
the two together.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .vocabulary import SPECIAL_TOKENS, Marks, find_marks
from .word_tokenizer import (
    LINE_BREAK,
    PART_PREFIX,
    SPACE_TOKEN,
    TextJoiner,
    clean,
    clean_bert_character,
    fold_as_bert,
    join_marked,
    mark_spaces,
    split_punctuation,
    word_pieces,
)

_SPECIAL_PATTERN = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
# As in word_tokenizer.py: memory stays bounded whatever the words are.
_CACHED_WORDS = 1 << 15
_CACHED_LENGTH = 16
_CODES = 0x110000

# First and last code point of what BERT takes for a Chinese character.
_IDEOGRAPHS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


@lru_cache(maxsize=2)
def standing_alone(digits: bool) -> npt.NDArray[np.bool_]:
    """Whether each code point is a word by itself: ideographs, white space, and digits where these are wanted."""
    alone = np.zeros(_CODES, dtype=np.bool_)
    for first, last in _IDEOGRAPHS:
        alone[first : last + 1] = True
    alone[[ord(" "), ord("\n")]] = True
    if digits:
        alone[[code for code in range(_CODES) if chr(code).isdigit()]] = True
    return alone


class CharSegmenter:
    """Cuts cleaned text into what WordPiece is looked up in: single characters, and runs of others between them."""

    def __init__(self, *, digits: bool) -> None:
        self._digits = digits

    def segment(self, code_points: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The text as it is, and where each word ends in it; a word starts where the one before ends."""
        alone = standing_alone(self._digits)[code_points]
        ends = np.flatnonzero(alone | np.append(alone[1:], True)) + 1 if len(alone) else np.empty(0, np.int64)
        return code_points, ends


def fold_characters(raw: str, *, lowercase: bool = True) -> list[str]:
    """The words of a single character or of a run of others: folded, punctuation apart, white space gone."""
    return " ".join(split_punctuation(fold_as_bert(raw) if lowercase else raw)).split()


class CharJoiner:
    """Joins WordPiece tokens to text. White space is lost in them and so it is guessed: a space between two words of
    letters or digits, also with a comma, colon, semicolon, question or exclamation mark behind the first, but not
    within a number; a point may stand in a number or a name.
    """

    def __init__(self, vocabulary: Sequence[str], marks: Marks, *, compat: bool) -> None:
        self._vocabulary = vocabulary
        self._space = vocabulary.index(SPACE_TOKEN) if SPACE_TOKEN in vocabulary and not compat else -1
        silent = [marks.begin, marks.padding, marks.unknown, *marks.never_produced]
        self._special = {id_: "" for id_ in silent if id_ is not None} | {marks.end: "\n\n"}
        if marks.line_break is not None:
            self._special[marks.line_break] = "\n"
        self._compat = TextJoiner(compat=True) if compat else None
        self._tail = ""  # the last two characters, where a space may follow

    def push(self, id_: int) -> str:
        """Give the text that this token adds to those before it."""
        if id_ == self._space:
            return self.break_off(" ")
        text = self._special.get(id_)
        return self.write(self._vocabulary[id_]) if text is None else self.break_off(text)

    def break_off(self, text: str) -> str:
        """Give the text of a special token, behind which no space stands."""
        self._tail = ""
        if self._compat is not None:
            self._compat.push("[PAD]")  # which has no text
        return text

    def write(self, token: str) -> str:
        """Give the text that a token adds which is none of the special ones."""
        if self._compat is not None:
            return self._compat.push(token)
        attached = token.startswith(PART_PREFIX) and len(token) > len(PART_PREFIX)
        body = token[len(PART_PREFIX) :] if attached else token
        text = " " + body if body and not attached and self._space_before(body[0]) else body
        self._tail = (self._tail + text)[-2:]
        return text

    def _space_before(self, character: str) -> bool:
        if not self._tail or not _is_word(character):
            return False
        before, last = self._tail[:-1], self._tail[-1]
        if last in ",:;?!":
            return bool(before) and _is_word(before) and not (before.isdigit() and character.isdigit())
        return _is_word(last)


@lru_cache(maxsize=1 << 16)
def _is_word(character: str) -> bool:
    """A letter, digit or mark of a script that writes spaces."""
    kind = unicodedata.category(character)[0]
    return kind in "LNM" and unicodedata.east_asian_width(character) not in "WF"


class CharTokenizer:
    """
    Args:
        vocabulary: the tokens in the order of their ids (`read_vocabulary`); of one that stands there twice the last.
            White space beside Chinese is kept if SPACE_TOKEN is among them.
        lowercase: fold case and accents, as the `do_lower_case` of a folder says.
        compat: as GPT2-Chinese.
        begin, end, line_break: the tokens that mark a document; a line break is white space where it is None, save
            with `compat`.

    Raises:
        ValueError: a special token is missing; the message begins with a verb, whose subject is the vocabulary.

    Example:
        >>> tokenizer = CharTokenizer(read_vocabulary("vocab.txt"))
        >>> tokenizer.tokenize("体温38.5℃, OK?")
        ['体', '温', '38', '.', '5', '℃', ',', 'ok', '?']
    """

    kind = "char"

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        lowercase: bool = True,
        compat: bool = False,
        begin: str = "[MASK]",
        end: str = "[CLS]",
        line_break: str | None = "[SEP]",
    ) -> None:
        self.vocabulary = list(vocabulary)
        self.compat = compat
        self.lowercase = lowercase
        if compat:
            line_break = "[SEP]"  # the reference writes it into the text, whatever the marks are
        self.mark_names = begin, end, line_break
        self._id_of = {token: id_ for id_, token in enumerate(self.vocabulary)}
        self.marks = find_marks(self._id_of, begin=begin, end=end, line_break=line_break)
        if self.marks.unknown is None:
            raise ValueError("has no [UNK], which stands for characters that are not in it; add a line [UNK]")
        self._unknown = self.marks.unknown
        self.keeps_spaces = SPACE_TOKEN in self._id_of and not compat
        self._word_ids: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def words(self, text: str) -> list[str]:
        """The words of a text before they are looked up; a line break is the word "\\n"."""
        if self.compat:
            return self._reference_words(text)
        return self._plain_words(text)

    def _plain_words(self, text: str) -> list[str]:
        words: list[str] = []
        if self.keeps_spaces:
            text = mark_spaces(text)
        for number, line in enumerate(text.split(LINE_BREAK)):
            if number:
                words.append(LINE_BREAK)
            cleaned = " ".join(clean(line, clean_bert_character).split())
            code_points = np.frombuffer(cleaned.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            _, ends = CharSegmenter(digits=self.compat).segment(code_points)
            begin = 0
            for end in ends.tolist():
                words += self.fold(cleaned[begin:end])
                begin = end
        return join_marked(words) if self.keeps_spaces else words

    def fold(self, raw: str) -> list[str]:
        """The words of a single character or of a run of others, folded as `lowercase` says."""
        return fold_characters(raw, lowercase=self.lowercase)

    def _reference_words(self, text: str) -> list[str]:
        """As `words`, with the special tokens that a text names."""
        text = text.replace(LINE_BREAK, " [SEP] ")
        if text and not text.strip():
            return ["[SEP]"]  # an oddity of transformers 2.1.1: white space alone is a special token
        words: list[str] = []
        position = 0
        for special in [*_SPECIAL_PATTERN.finditer(text), None]:
            end = len(text) if special is None else special.start()
            words += self._plain_words(text[position:end])
            if special is not None:
                words.append(special.group())
                position = special.end()
        return words

    def word_ids(self, word: str) -> list[int]:
        """The ids of one word of `words()`; `[UNK]` for one that the vocabulary has not the parts of."""
        ids = self._word_ids.get(word)
        if ids is None:
            ids = self._look_up(word)
            if len(word) <= _CACHED_LENGTH:
                if len(self._word_ids) >= _CACHED_WORDS:
                    self._word_ids.clear()
                self._word_ids[word] = ids
        return ids

    def _look_up(self, word: str) -> list[int]:
        if word == LINE_BREAK:
            return [] if self.marks.line_break is None else [self.marks.line_break]
        if self.compat and word in SPECIAL_TOKENS:
            return [self._id_of.get(word, self._unknown)]
        return word_pieces(word, self._id_of) or [self._unknown]

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text, without the marks of a document."""
        return [id_ for word in self.words(text) for id_ in self.word_ids(word)]

    def tokenize(self, text: str) -> list[str]:
        """Give the tokens of a text; their ids are those of `encode`."""
        return [self.vocabulary[id_] for id_ in self.encode(text)]

    def joiner(self) -> CharJoiner:
        """Turns ids to text, one after the other."""
        return CharJoiner(self.vocabulary, self.marks, compat=self.compat)

    def decode(self, ids: Iterable[int]) -> str:
        """Give the text of ids; more ids only append to it.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        joiner = self.joiner()
        pieces = []
        for id_ in ids:
            if not 0 <= id_ < len(self.vocabulary):
                raise ValueError(f"id {id_} is not in the vocabulary of {len(self.vocabulary)} tokens")
            pieces.append(joiner.push(id_))
        return "".join(pieces)

    def normalize(self, text: str) -> str:
        """What the tokenizer keeps of a text: folded as `lowercase` says, and white space as `decode` writes it.

        For text whose characters are in the vocabulary, `decode(encode(text)) == normalize(text)`.
        """
        joiner = self.joiner()
        special = {LINE_BREAK: "" if self.marks.line_break is None else "\n"}
        if self.compat:
            special |= dict.fromkeys(SPECIAL_TOKENS, "") | {"[SEP]": "\n", "[CLS]": "\n\n"}
        pieces = []
        if self.keeps_spaces:
            special[SPACE_TOKEN] = " "
        for word in self.words(text):
            if word in special:
                pieces.append(joiner.break_off(special[word]) if special[word] else "")
            else:  # the reference's spaces hang on the tokens, ours on the characters
                known = self.compat and self._unknown not in self.word_ids(word)
                pieces += map(joiner.write, [self.vocabulary[i] for i in self.word_ids(word)] if known else [word])
        return "".join(pieces)
