"""THULAC words, looked up in the vocabulary or spelled with its parts: text to ids, and ids to text.

Two behaviours share this module:

* the default loses nothing that the vocabulary can spell. The words of make-vocab.py and make-tokenized.py come from
  one function (`WordSplitter`), a word outside the vocabulary is spelled with parts and characters, and a character
  outside it in UTF-8 bytes (`<0xE9>`) where the vocabulary has them;
* `compat` gives the ids of GPT2-Chinese's word-level BERT tokenizer, with its `[UNK]`s.

How white space survives: Chinese is written without spaces ("wide": ideographs, their punctuation, full-width forms),
everything else with them ("spaced"). Two neighbouring tokens are joined with a space if both touching characters are
spaced and the second token has no `##`; so `38.5` is `38 ##. ##5`, `hello, world` is `hello ##, world`, and spaces
beside Chinese characters are dropped, or are tokens of their own where the rules keep them. A word that begins with a
character in bytes has the byte of a space before it instead (`<0x20>`), for bytes have no `##`.

A copy of this file travels in every model folder, where the package is not (tokenization_gpt2_chinese.py): it needs
nothing but Python and the modules that it imports relatively.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Protocol, cast

from .vocabulary import SPECIAL_TOKENS, Marks, find_marks

LINE_BREAK = "\n"
PART_PREFIX = "##"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""What spells a character that the vocabulary does not have, in UTF-8; SentencePiece's names for them."""

_BYTE_OF = {token: byte for byte, token in enumerate(BYTE_TOKENS)}
_SPACE_BYTE = BYTE_TOKENS[0x20]
SPACE_TOKEN = "〿"
"""A kept white space beside Chinese: U+303F, Unicode's visible sign of a half-width space."""
_INNER_SPACE = re.compile(r"(?<=\S)[^\S\n]+(?=\S)")
MAX_BERT_WORD = 100
"""Characters; BERT's word piece gives up on longer words."""
_SPECIAL_PATTERN = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
IDEOGRAPHS = re.compile("[一-鿿]+")  # the block of CJK Unified Ideographs
_LATIN_WORD = re.compile("[a-z]+")
# What is kept of words that were met: at most so many, of at most so many characters, which is 90 MB whatever they are.
# They are forgotten all at once when there are more.
_CACHED_WORDS = 1 << 15
_CACHED_LENGTH = 16

# First and last code point of what is written without spaces.
_WIDE = (
    (0x2E80, 0x303F),  # radicals, description characters, CJK symbols and punctuation
    (0x3100, 0x312F),  # Bopomofo
    (0x31A0, 0x31EF),  # Bopomofo, strokes
    (0x3200, 0x4DBF),  # enclosed letters, units, ideographs
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFE10, 0xFE1F),  # vertical forms
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFF64),  # full-width forms
    (0xFFE0, 0xFFE7),
    (0x20000, 0x3FFFF),
)


class CutsWords(Protocol):
    """THULAC: `gpt2_chinese.text.segmenter.Segmenter`, or the thulac package where only this file is."""

    def cut(self, text: str) -> list[str]: ...


def load_segmenter(user_words: Sequence[str] = ()) -> CutsWords:
    """Load the compiled segmenter, when text comes and not before."""
    # By name: transformers demands every module that the code in a model folder imports, and this one is not there.
    return cast(CutsWords, importlib.import_module("gpt2_chinese.text.segmenter").Segmenter(user_words))


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of a character.


@lru_cache(maxsize=1 << 16)
def clean_character(character: str) -> str:
    """What is kept of a character: a space for every kind of white space, nothing of other control characters."""
    if character.isspace():
        return " "
    return "" if unicodedata.category(character) in ("Cc", "Cs") else character


def fold(word: str) -> str:
    """Lower-case a word."""
    return word.lower()


@lru_cache(maxsize=1 << 16)
def is_spaced(character: str) -> bool:
    """Whether words that end or begin with this character are written with a space between them."""
    code = ord(character)
    return code != 0x20 and not any(first <= code <= last for first, last in _WIDE)


@lru_cache(maxsize=1 << 16)
def clean_bert_character(character: str) -> str:
    """What BERT keeps of a character: nothing of controls, formats, unassigned ones, a space for white space."""
    if character in " \t\n\r\u2028\u2029" or unicodedata.category(character) == "Zs":
        return " "
    if character == "\ufffd" or unicodedata.category(character)[0] == "C":
        return ""
    return character


def fold_as_bert(word: str) -> str:
    """Lower-case a word and strip its accents (NFD without category Mn), as BERT's uncased tokenizers do."""
    lowered = word.lower()
    if lowered.isascii():
        return lowered
    # `unicodedata` takes time that is quadratic in the length of a run of marks, so it gets no more than a character.
    decomposed = "".join(map(_decomposed, lowered))
    kept = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    if not any(map(unicodedata.combining, kept)):
        return kept
    # A few marks are kept; they stand in canonical order, each run of marks sorted by its class.
    runs = groupby(decomposed, key=lambda c: unicodedata.combining(c) == 0)
    ordered = (c for is_base, run in runs for c in (run if is_base else sorted(run, key=unicodedata.combining)))
    return "".join(c for c in ordered if unicodedata.category(c) != "Mn")


@lru_cache(maxsize=1 << 16)
def _decomposed(character: str) -> str:
    return unicodedata.normalize("NFD", character)


@lru_cache(maxsize=1 << 16)
def _is_spaced_by_rules_1(character: str) -> bool:
    """Letters, decimal digits and ASCII; other symbols and marks were taken for wide."""
    if character.isascii():
        return character.isprintable() and character != " "
    if unicodedata.category(character)[0] == "L" or unicodedata.category(character) == "Nd":
        return unicodedata.east_asian_width(character) not in "WF" or "가" <= character <= "힣"
    return False


@dataclass(frozen=True)
class Rules:
    """What becomes of a character, and where a space stands; the tokens and the text of ids depend on it.

    Attributes:
        number: raised when the same text and vocabulary give other ids, so that older models keep theirs; with
            KEEP_CASE or KEEP_SPACES added for the variants.
        keeps_spaces: whether white space beside Chinese is a token.
    """

    number: int
    clean_character: Callable[[str], str]
    fold: Callable[[str], str]
    is_spaced: Callable[[str], bool]
    keeps_spaces: bool = False


RULES_VERSION = 2
KEEP_CASE, KEEP_SPACES = 16, 32
RULES = {
    1: Rules(1, clean_bert_character, fold_as_bert, _is_spaced_by_rules_1),
    2: Rules(2, clean_character, fold, is_spaced),
}
RULES |= {
    RULES_VERSION + case + spaces: Rules(
        RULES_VERSION + case + spaces, clean_character, str if case else fold, is_spaced, bool(spaces)
    )
    for case in (0, KEEP_CASE)
    for spaces in (0, KEEP_SPACES)
}


def mark_spaces(text: str, is_spaced: Callable[[str], bool] = is_spaced) -> str:
    """Put each run of white space within a line that has Chinese beside it on a line of its own, as SPACE_TOKEN.

    So it is cut from its neighbours in every segmenter; `join_marked` takes these line breaks out again.
    """

    def mark(found: re.Match[str]) -> str:
        before, behind = found.string[found.start() - 1], found.string[found.end()]
        return " " if is_spaced(before) and is_spaced(behind) else f"\n{SPACE_TOKEN}\n"

    return _INNER_SPACE.sub(mark, text.replace(SPACE_TOKEN, " "))


def join_marked(words: list[str]) -> list[str]:
    """The words of a text that `mark_spaces` has prepared, without the line breaks beside SPACE_TOKEN."""
    if SPACE_TOKEN not in words:
        return words
    last = len(words) - 1
    return [
        word
        for place, word in enumerate(words)
        if word != LINE_BREAK
        or SPACE_TOKEN not in (words[place - 1] if place else "", words[place + 1] if place < last else "")
    ]


@lru_cache(maxsize=1 << 16)
def _is_punctuation(character: str) -> bool:
    """BERT's notion: every ASCII character that is neither letter, digit, space nor control, and category P."""
    return (character.isascii() and character.isprintable() and not character.isalnum() and character != " ") or (
        unicodedata.category(character)[0] == "P"
    )


def clean(text: str, clean_character: Callable[[str], str] = clean_character) -> str:
    """Drop control characters, and turn white space into single-width spaces."""
    # Most texts need nothing: only distinct characters are looked at, and only those that change are replaced.
    changes = {ord(character): kept for character in set(text) if (kept := clean_character(character)) != character}
    return text.translate(changes) if changes else text


def split_punctuation(word: str) -> list[str]:
    """Split a word so that every punctuation character stands alone."""
    parts: list[str] = []
    open_part = False
    for character in word:
        if _is_punctuation(character):
            parts.append(character)
            open_part = False
        elif open_part:
            parts[-1] += character
        else:
            parts.append(character)
            open_part = True
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# From text to words.


class WordSplitter:
    """Cuts text into the words that vocabularies are made of; make-vocab.py and the tokenizer share it.

    A word is lower case, without white space; punctuation stands alone; a word that follows a spaced character without
    a space in between begins with `##`. A line break is the word "\\n".

    Example:
        >>> WordSplitter(Segmenter())("体温38.5度, OK?")
        ['体温', '38', '##.', '##5', '度', ',', 'ok', '##?']
    """

    def __init__(self, segmenter: CutsWords | None = None, rules: Rules = RULES[RULES_VERSION]) -> None:
        self._segmenter = segmenter or load_segmenter()
        self._rules = rules
        self._folded: dict[tuple[str, bool], tuple[list[str], bool]] = {}

    def __call__(self, text: str, *, context: int = 0) -> list[str]:
        """Cut a text; the words of its first `context` characters are left out (see tail.py)."""
        words: list[str] = []
        if self._rules.keeps_spaces:
            text = mark_spaces(text, self._rules.is_spaced)
        for number, line in enumerate(text.split(LINE_BREAK)):
            if number:
                words.append(LINE_BREAK)
            touching = False  # the character before is spaced, and no space stands in between
            for raw in self._segmenter.cut(" ".join(clean(line, self._rules.clean_character).split())):
                if context > 0:
                    context -= len(raw)
                    continue
                if raw.isspace():
                    touching = False
                    continue
                folded, touching = self._fold(raw, touching)
                words += folded
        return join_marked(words) if self._rules.keeps_spaces else words

    def _fold(self, raw: str, touching: bool) -> tuple[list[str], bool]:
        found = self._folded.get((raw, touching))
        if found is None:
            found = fold_word(raw, touching, self._rules)
            if len(raw) <= _CACHED_LENGTH:
                if len(self._folded) >= _CACHED_WORDS:
                    self._folded.clear()
                self._folded[raw, touching] = found
        return found


def fold_word(raw: str, touching: bool, rules: Rules = RULES[RULES_VERSION]) -> tuple[list[str], bool]:
    """Give the words of one THULAC word, and whether a word behind it would touch a spaced character."""
    if IDEOGRAPHS.fullmatch(raw):
        return [raw], False  # nearly every word: nothing to fold, to split or to space
    words: list[str] = []
    for number, chunk in enumerate(re.split(r"(\s+)", raw)):
        if number % 2:
            touching = False
            continue
        for part in split_punctuation(rules.fold(chunk)):
            words.append(PART_PREFIX + part if touching and rules.is_spaced(part[0]) else part)
            touching = rules.is_spaced(part[-1])
    return words, touching


def spelling(word: str, rules: Rules = RULES[RULES_VERSION]) -> list[str]:
    """The tokens of one character each that spell a word: `##` before a character that touches a spaced one.

    Example:
        >>> spelling("##38度")
        ['##3', '##8', '度']
    """
    if IDEOGRAPHS.fullmatch(word):
        return list(word)
    attached = word.startswith(PART_PREFIX) and len(word) > len(PART_PREFIX)
    body = word[len(PART_PREFIX) :] if attached else word
    touching = attached
    tokens = []
    for character in body:
        spaced = rules.is_spaced(character)
        tokens.append(PART_PREFIX + character if touching and spaced else character)
        touching = spaced
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# From tokens to text.


class TextJoiner:
    """Joins tokens to text one after the other, so that a text can be streamed while it is decoded.

    Special tokens: `[SEP]` is a line break, `[CLS]` a blank line, the others are nothing.
    """

    def __init__(self, *, compat: bool = False, rules: Rules = RULES[RULES_VERSION]) -> None:
        self._compat = compat
        self._rules = rules
        self._last = ""  # the last character, or "" where no space may follow
        self._bytes = b""
        self._space = False  # the byte of a space has come, and is written if what follows is spaced

    def push(self, token: str) -> str:
        """Give the text that this token adds; that of a byte token is held back until its character is whole."""
        byte = None if self._compat else _BYTE_OF.get(token)
        if byte is not None:
            self._bytes += bytes([byte])
            return self._pop_bytes(final=False)
        text = self._pop_bytes(final=True) if self._bytes else ""
        if self._rules.keeps_spaces and token == SPACE_TOKEN and not self._compat:
            self._last, self._space = "", False
            return text + " "
        if token in SPECIAL_TOKENS:
            self._last, self._space = "", False
            return text + {"[SEP]": "\n", "[CLS]": "\n\n"}.get(token, "")
        if self._compat:
            # The reference puts a space between two tokens of the letters a to z, and nowhere else.
            latin = _LATIN_WORD.fullmatch(token) is not None
            space = " " if latin and self._last else ""
            self._last = "a" if latin else ""
            return text + space + token.replace(PART_PREFIX, "")
        attached = token.startswith(PART_PREFIX) and len(token) > len(PART_PREFIX)
        return text + self._append(token[len(PART_PREFIX) :] if attached else token, attached=attached)

    def _append(self, body: str, *, attached: bool) -> str:
        """Write a token or a character, with a space before it where there is one."""
        is_spaced = self._rules.is_spaced
        space = (self._space or not attached) and self._last and is_spaced(self._last) and is_spaced(body[0])
        self._last, self._space = body[-1], False
        return " " + body if space else body

    def _pop_bytes(self, *, final: bool) -> str:
        """Give the whole characters among the bytes held back; bytes that are none become U+FFFD."""
        if not self._bytes:
            return ""
        if not final:
            try:
                text = self._bytes.decode("utf-8")
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return ""
                text = self._bytes.decode("utf-8", errors="replace")
        else:
            text = self._bytes.decode("utf-8", errors="replace")
        self._bytes = b""
        if self._rules.number == 1:
            self._last = ""
            return text
        pieces = []
        for character in text:
            if character == " ":
                self._space = True
            elif self._rules.keeps_spaces and character == SPACE_TOKEN:
                self._last, self._space = "", False
                pieces.append(" ")
            else:
                pieces.append(self._append(character, attached=True))
        return "".join(pieces)


def join_tokens(tokens: Iterable[str], *, compat: bool = False, rules: Rules = RULES[RULES_VERSION]) -> str:
    """Join tokens to text; an incomplete character in byte tokens at the end is left out."""
    joiner = TextJoiner(compat=compat, rules=rules)
    return "".join(joiner.push(token) for token in tokens)


class WordJoiner:
    """A TextJoiner that takes ids."""

    def __init__(self, vocabulary: Sequence[str], joiner: TextJoiner) -> None:
        self._vocabulary = vocabulary
        self._joiner = joiner

    def push(self, id_: int) -> str:
        """Give the text that this token adds to those before it."""
        return self._joiner.push(self._vocabulary[id_])


# ---------------------------------------------------------------------------------------------------------------------


class WordTokenizer:
    """A vocabulary of words, and the rules by which text becomes its ids.

    Args:
        vocabulary: the tokens in the order of their ids (`read_vocabulary`).
        compat: tokenize as the reference does, instead of without avoidable `[UNK]`s.
        rules: the number of the rules, of which older models have older ones.
        segmenter: used instead of loading one.

    Raises:
        ValueError: a special token is missing; the message begins with a verb, whose subject is the vocabulary.

    Example:
        >>> tokenizer = WordTokenizer(read_vocabulary("vocab/vocab_user.txt"))
        >>> tokenizer.decode(tokenizer.encode("体温38.5℃"))
        '体温38.5℃'
    """

    kind = "word"

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        compat: bool = False,
        rules: int = RULES_VERSION,
        segmenter: CutsWords | None = None,
    ) -> None:
        self.vocabulary = list(vocabulary)
        self.compat = compat
        self.rules = RULES[rules]
        self._id_of = {token: id_ for id_, token in enumerate(self.vocabulary)}
        self.marks: Marks = find_marks(self._id_of)
        if self.marks.unknown is None and not all(token in self._id_of for token in BYTE_TOKENS):
            raise ValueError("has neither [UNK] nor the 256 bytes, so some characters have no id; add a line [UNK]")
        self._unknown = [] if self.marks.unknown is None else [self.marks.unknown]
        self._segmenter = segmenter
        self._splitter: WordSplitter | None = None
        self._word_ids: dict[str, list[int]] = {}

    @cached_property
    def _longest_from(self) -> dict[str, int]:
        return longest_from(self.vocabulary)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def words(self, text: str, *, context: int = 0) -> list[str]:
        """The words of a text before they are looked up: those of `WordSplitter`, or the reference's with `compat`."""
        if self.compat:
            return self._reference_words(text)
        if self._splitter is None:
            self._splitter = WordSplitter(self._segmenter, self.rules)
        return self._splitter(text, context=context)

    def word_ids(self, word: str) -> list[int]:
        """The ids of one word of `words()`; `[UNK]` for what the vocabulary cannot spell."""
        ids = self._word_ids.get(word)
        if ids is None:
            ids = self._reference_pieces(word) if self.compat else self._spell(word)
            if len(word) <= _CACHED_LENGTH:
                if len(self._word_ids) >= _CACHED_WORDS:
                    self._word_ids.clear()
                self._word_ids[word] = ids
        return ids

    def encode(self, text: str, *, context: int = 0) -> list[int]:
        """Give the ids of a text; a line break is `[SEP]`, and no mark of a document is put around it.

        The words of its first `context` characters are left out (see tail.py).
        """
        return [id_ for word in self.words(text, context=context) for id_ in self.word_ids(word)]

    def tokenize(self, text: str) -> list[str]:
        """Give the tokens of a text; their ids are those of `encode`."""
        return [self.vocabulary[id_] for id_ in self.encode(text)]

    def joiner(self) -> WordJoiner:
        """Turns ids to text, one after the other."""
        return WordJoiner(self.vocabulary, TextJoiner(compat=self.compat, rules=self.rules))

    def decode(self, ids: Iterable[int]) -> str:
        """Give the text of ids. More ids only append to it, save that a character in bytes appears when it is whole.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        tokens = []
        for id_ in ids:
            if not 0 <= id_ < len(self.vocabulary):
                raise ValueError(f"id {id_} is not in the vocabulary of {len(self.vocabulary)} tokens")
            tokens.append(self.vocabulary[id_])
        return join_tokens(tokens, compat=self.compat, rules=self.rules)

    def normalize(self, text: str) -> str:
        """What the tokenizer keeps of a text: lower case, no control characters, white space folded.

        Spaces stay where no neighbour is Chinese. For text whose characters are in the vocabulary, or one with the 256
        bytes, `decode(encode(text)) == normalize(text)`.
        """
        words = ("[SEP]" if word == LINE_BREAK else word for word in self.words(text))
        return join_tokens(words, rules=self.rules)

    def _spell(self, word: str) -> list[int]:
        """Look a word up, or spell it: longest parts from the left, then characters, then bytes, then `[UNK]`."""
        if word == LINE_BREAK:
            return [] if self.marks.line_break is None else [self.marks.line_break]
        known = self._id_of.get(word)
        if known is not None:
            return [known]
        ids: list[int] = []
        characters = spelling(word, self.rules)
        body = "".join(character[-1] for character in characters)
        start = 0
        while start < len(characters):
            # A part is written as it stands behind its left neighbour: with "##" if its first character touches it.
            first = characters[start]
            for end in range(min(len(characters), start + self._longest_from.get(first, 0)), start, -1):
                known = self._id_of.get(first + body[start + 1 : end])
                if known is not None:
                    ids.append(known)
                    start = end
                    break
            else:
                begins_word = start == 0 and len(characters[0]) == 1
                ids += self._spell_in_bytes(body[start], begins_word=begins_word)
                start += 1
        return ids

    def _spell_in_bytes(self, character: str, *, begins_word: bool) -> list[int]:
        data = character.encode("utf-8", errors="replace")
        if begins_word and self.rules.number > 1 and self.rules.is_spaced(character):
            data = b" " + data
        ids = [self._id_of.get(BYTE_TOKENS[byte], -1) for byte in data]
        return list(self._unknown) if -1 in ids else ids

    def _reference_words(self, text: str) -> list[str]:
        """The reference's words: digits spaced out, THULAC with the special tokens, punctuation apart.

        A line break becomes `[SEP]`, as its make-tokenized.py has it before it calls the tokenizer.
        """
        text = text.replace(LINE_BREAK, " [SEP] ")
        if text and not text.strip():
            return ["[SEP]"]  # an oddity of transformers 2.1.1: white space alone is a special token
        if self._segmenter is None:
            self._segmenter = load_segmenter(SPECIAL_TOKENS)
        words: list[str] = []
        position = 0
        for special in [*_SPECIAL_PATTERN.finditer(text), None]:
            end = len(text) if special is None else special.start()
            chunk = text[position:end].strip()
            if chunk:
                spaced_out = "".join(f" {c} " if c.isdigit() else c for c in clean(chunk, clean_bert_character))
                cut = " ".join(word for raw in self._segmenter.cut(spaced_out) if (word := raw.strip()))
                for word in cut.split():
                    parts = split_punctuation(word if word in SPECIAL_TOKENS else fold_as_bert(word))
                    words += " ".join(parts).split()
            if special is not None:
                words.append(special.group())
                position = special.end()
        return words

    def _reference_pieces(self, word: str) -> list[int]:
        if word in SPECIAL_TOKENS:
            return [self._id_of[word]] if word in self._id_of else list(self._unknown)
        return word_pieces(word, self._id_of) or list(self._unknown)


def longest_from(vocabulary: Iterable[str]) -> dict[str, int]:
    """How many characters, without `##`, the longest token has that begins with each character, or `##` and one."""
    longest: dict[str, int] = {}
    for token in vocabulary:
        attached = token.startswith(PART_PREFIX) and len(token) > len(PART_PREFIX)
        length = len(token) - len(PART_PREFIX) if attached else len(token)
        first = token[: len(PART_PREFIX) + 1] if attached else token[:1]
        longest[first] = max(length, longest.get(first, 0))
        if attached:  # a text may have the two marks itself
            longest[PART_PREFIX[0]] = max(len(token), longest.get(PART_PREFIX[0], 0))
    return longest


def word_pieces(word: str, id_of: dict[str, int]) -> list[int]:
    """BERT's word piece: greedy longest match from the left; nothing if a part is missing."""
    if len(word) > MAX_BERT_WORD:
        return []
    ids: list[int] = []
    start = 0
    while start < len(word):
        prefix = PART_PREFIX if start else ""
        for end in range(len(word), start, -1):
            known = id_of.get(prefix + word[start:end])
            if known is not None:
                ids.append(known)
                start = end
                break
        else:
            return []
    return ids
