"""Text to ids and ids to text: THULAC words, looked up in the vocabulary or spelled with its parts.

Two behaviours share this module:

* the default loses nothing that the vocabulary can spell. The words of make-vocab.py and make-tokenized.py come from
  one function (`WordSplitter`), a word outside the vocabulary is spelled with parts and characters, and a character
  outside it in UTF-8 bytes (`<0xE9>`) where the vocabulary has them;
* `compat` gives the ids of GPT2-Chinese's word-level BERT tokenizer, with its `[UNK]`s.

How white space survives: scripts that write spaces between words ("spaced": Latin, Cyrillic, digits, ASCII
punctuation) are told from those that do not ("wide": Chinese characters, full-width forms, other symbols). Two
neighbouring tokens are joined with a space if both touching characters are spaced and the second token has no `##`;
so `38.5℃` is `38 ##. ##5 ℃`, `hello, world` is `hello ##, world`, and spaces beside Chinese characters are dropped.

A copy of this file travels in every model folder, where the package is not (tokenization_gpt2_chinese.py): it needs
nothing but Python and the modules that it imports relatively.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, cast

from .vocabulary import SEP_ID, SPECIAL_TOKENS, UNK_ID, read_vocabulary

RULES_VERSION = 1
"""Raised when the same text and vocabulary would give other ids, so that old pieces are not taken for current ones."""

LINE_BREAK = "\n"
PART_PREFIX = "##"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""What spells a character that the vocabulary does not have, in UTF-8; SentencePiece's names for them."""

_BYTE_OF = {token: byte for byte, token in enumerate(BYTE_TOKENS)}
_REFERENCE_MAX_WORD = 100  # the reference's word piece gives up on longer parts
_SPECIAL_PATTERN = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
_IDEOGRAPHS = re.compile("[一-鿿]+")  # the block of CJK Unified Ideographs
_LATIN_WORD = re.compile("[a-z]+")
_CACHED_WORDS = 1_000_000  # forgotten all at once when there are more, so that memory stays flat


class CutsWords(Protocol):
    """THULAC: `gpt2_chinese.text.segmenter.Segmenter`, or the thulac package where only this file is."""

    def cut(self, text: str) -> list[str]: ...


def load_segmenter(user_words: Sequence[str] = ()) -> CutsWords:
    """Load the compiled segmenter, when text comes and not before."""
    # By name: transformers demands every module that the code in a model folder imports, and this one is not there.
    return cast(CutsWords, importlib.import_module("gpt2_chinese.text.segmenter").Segmenter(user_words))


@lru_cache(maxsize=1 << 16)
def is_spaced(character: str) -> bool:
    """Whether words that end or begin with this character are written with a space between them."""
    if character.isascii():
        return character.isprintable() and character != " "
    if unicodedata.category(character)[0] == "L" or unicodedata.category(character) == "Nd":
        return unicodedata.east_asian_width(character) not in "WF" or "가" <= character <= "힣"
    return False


@lru_cache(maxsize=1 << 16)
def _is_punctuation(character: str) -> bool:
    """BERT's notion: every ASCII character that is neither letter, digit, space nor control, and category P."""
    return (character.isascii() and character.isprintable() and not character.isalnum() and character != " ") or (
        unicodedata.category(character)[0] == "P"
    )


@lru_cache(maxsize=1 << 16)
def clean_character(character: str) -> str:
    """What the reference keeps of a character: nothing of controls, a space for every kind of white space."""
    if character in " \t\n\r\u2028\u2029" or unicodedata.category(character) == "Zs":
        return " "
    if character == "\ufffd" or unicodedata.category(character)[0] == "C":
        return ""
    return character


def clean(text: str) -> str:
    """Drop control characters, U+0000 and U+FFFD, and turn white space into single-width spaces."""
    # Most texts need nothing: only distinct characters are looked at, and only those that change are replaced.
    changes = {ord(character): kept for character in set(text) if (kept := clean_character(character)) != character}
    return text.translate(changes) if changes else text


def dropped_characters(text: str) -> int:
    """How many characters of a text `clean` leaves out."""
    return sum(text.count(character) for character in set(text) if not clean_character(character))


def fold(word: str) -> str:
    """Lower-case a word and strip its accents (NFD without category Mn), as BERT's uncased tokenizers do."""
    lowered = word.lower()
    if lowered.isascii():
        return lowered
    return "".join(c for c in unicodedata.normalize("NFD", lowered) if unicodedata.category(c) != "Mn")


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


class WordSplitter:
    """Cuts text into the words that vocabularies are made of; make-vocab.py and the tokenizer share it.

    A word is lower case, without accents, without white space; punctuation stands alone; a word that follows a spaced
    character without a space in between begins with `##`. A line break is the word "\\n".

    Example:
        >>> WordSplitter(Segmenter())("体温38.5℃, OK?")
        ['体温', '38', '##.', '##5', '℃', ',', 'ok', '##?']
    """

    def __init__(self, segmenter: CutsWords | None = None) -> None:
        self._segmenter = segmenter or load_segmenter()
        self._folded: dict[tuple[str, bool], tuple[list[str], bool]] = {}

    def __call__(self, text: str) -> list[str]:
        words: list[str] = []
        for number, line in enumerate(text.split(LINE_BREAK)):
            if number:
                words.append(LINE_BREAK)
            touching = False  # the character before is spaced, and no space stands in between
            for raw in self._segmenter.cut(" ".join(clean(line).split())):
                if raw.isspace():
                    touching = False
                    continue
                found = self._folded.get((raw, touching))
                if found is None:
                    if len(self._folded) >= _CACHED_WORDS:
                        self._folded.clear()
                    found = self._folded[raw, touching] = fold_word(raw, touching)
                words += found[0]
                touching = found[1]
        return words


def fold_word(raw: str, touching: bool) -> tuple[list[str], bool]:
    """Give the words of one THULAC word, and whether a word behind it would touch a spaced character."""
    if _IDEOGRAPHS.fullmatch(raw):
        return [raw], False  # nearly every word: nothing to fold, to split or to space
    words: list[str] = []
    for number, chunk in enumerate(re.split(r"(\s+)", raw)):
        if number % 2:
            touching = False
            continue
        for part in split_punctuation(fold(chunk)):
            words.append(PART_PREFIX + part if touching and is_spaced(part[0]) else part)
            touching = is_spaced(part[-1])
    return words, touching


def spelling(word: str) -> list[str]:
    """The tokens of one character each that spell a word: `##` before a character that touches a spaced one.

    Example:
        >>> spelling("##38度")
        ['##3', '##8', '度']
    """
    if _IDEOGRAPHS.fullmatch(word):
        return list(word)
    attached = word.startswith(PART_PREFIX) and len(word) > len(PART_PREFIX)
    body = word[len(PART_PREFIX) :] if attached else word
    touching = attached
    tokens = []
    for character in body:
        spaced = is_spaced(character)
        tokens.append(PART_PREFIX + character if touching and spaced else character)
        touching = spaced
    return tokens


class TextJoiner:
    """Joins tokens to text one after the other, so that a text can be streamed while it is decoded.

    Special tokens: `[SEP]` is a line break, `[CLS]` a blank line, the others are nothing.
    """

    def __init__(self, *, compat: bool = False) -> None:
        self._compat = compat
        self._last = ""  # the last character, or "" where no space may follow
        self._bytes = b""

    def push(self, token: str) -> str:
        """Give the text that this token adds; that of a byte token is held back until its character is whole."""
        byte = None if self._compat else _BYTE_OF.get(token)
        if byte is not None:
            self._bytes += bytes([byte])
            return self._pop_bytes(final=False)
        text = self._pop_bytes(final=True) if self._bytes else ""
        if token in SPECIAL_TOKENS:
            self._last = ""
            return text + {"[SEP]": "\n", "[CLS]": "\n\n"}.get(token, "")
        if self._compat:
            # The reference puts a space between two tokens of the letters a to z, and nowhere else.
            latin = _LATIN_WORD.fullmatch(token) is not None
            space = " " if latin and self._last else ""
            self._last = "a" if latin else ""
            return text + space + token.replace(PART_PREFIX, "")
        if token.startswith(PART_PREFIX) and len(token) > len(PART_PREFIX):
            body = token[len(PART_PREFIX) :]
        else:
            body = token
            if self._last and is_spaced(self._last) and is_spaced(body[0]):
                text += " "
        self._last = body[-1]
        return text + body

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
        self._last = ""
        return text


def join_tokens(tokens: Iterable[str], *, compat: bool = False) -> str:
    """Join tokens to text; an incomplete character in byte tokens at the end is left out."""
    joiner = TextJoiner(compat=compat)
    return "".join(joiner.push(token) for token in tokens)


class Tokenizer:
    """A vocabulary and the rules by which text becomes its ids.

    Args:
        vocabulary: the tokens in the order of their ids, the special tokens first (`read_vocabulary`).
        compat: tokenize as the reference does, instead of without avoidable `[UNK]`s.
        segmenter: used instead of loading one.

    Example:
        >>> tokenizer = Tokenizer.from_file("vocab/vocab_user.txt")
        >>> tokenizer.decode(tokenizer.encode("体温38.5℃"))
        '体温38.5℃'
    """

    def __init__(self, vocabulary: Sequence[str], *, compat: bool = False, segmenter: CutsWords | None = None) -> None:
        if tuple(vocabulary[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise ValueError(f"the first tokens of a vocabulary must be {' '.join(SPECIAL_TOKENS)}")
        self.vocabulary = list(vocabulary)
        self.compat = compat
        self._id_of = {token: id_ for id_, token in enumerate(self.vocabulary)}
        self._longest = max(len(token) for token in self.vocabulary)
        self._segmenter = segmenter
        self._splitter: WordSplitter | None = None
        self._word_ids: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: str | Path, *, compat: bool = False) -> Tokenizer:
        """Read the vocabulary from a file; errors as in `read_vocabulary`."""
        return cls(read_vocabulary(path), compat=compat)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def words(self, text: str) -> list[str]:
        """The words of a text before they are looked up: those of `WordSplitter`, or the reference's with `compat`."""
        if self.compat:
            return self._reference_words(text)
        if self._splitter is None:
            self._splitter = WordSplitter(self._segmenter)
        return self._splitter(text)

    def word_ids(self, word: str) -> list[int]:
        """The ids of one word of `words()`; at least one, and `[UNK]` for what the vocabulary cannot spell."""
        ids = self._word_ids.get(word)
        if ids is None:
            if len(self._word_ids) >= _CACHED_WORDS:
                self._word_ids.clear()
            ids = self._reference_pieces(word) if self.compat else self._spell(word)
            self._word_ids[word] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text; a line break is `[SEP]`, and no `[MASK]` or `[CLS]` is put round it."""
        return [id_ for word in self.words(text) for id_ in self.word_ids(word)]

    def tokenize(self, text: str) -> list[str]:
        """Give the tokens of a text; their ids are those of `encode`."""
        return [self.vocabulary[id_] for id_ in self.encode(text)]

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
        return join_tokens(tokens, compat=self.compat)

    def normalize(self, text: str) -> str:
        """What the tokenizer keeps of a text: no control characters, lower case, no accents, white space folded.

        Spaces stay where both neighbours are letters, digits or punctuation of scripts that use spaces. For text whose
        characters are in the vocabulary, `decode(encode(text)) == normalize(text)`.
        """
        return join_tokens("[SEP]" if word == LINE_BREAK else word for word in self.words(text))

    def _spell(self, word: str) -> list[int]:
        """Look a word up, or spell it: longest parts from the left, then characters, then bytes, then `[UNK]`."""
        if word == LINE_BREAK:
            return [SEP_ID]
        known = self._id_of.get(word)
        if known is not None:
            return [known]
        ids: list[int] = []
        characters = spelling(word)
        body = "".join(character[-1] for character in characters)
        start = 0
        while start < len(characters):
            # A part is written as it stands behind its left neighbour: with "##" if its first character touches it.
            for end in range(min(len(characters), start + self._longest), start, -1):
                known = self._id_of.get(characters[start] + body[start + 1 : end])
                if known is not None:
                    ids.append(known)
                    start = end
                    break
            else:
                ids += self._spell_in_bytes(body[start])
                start += 1
        return ids

    def _spell_in_bytes(self, character: str) -> list[int]:
        data = character.encode("utf-8", errors="replace")
        ids = [self._id_of.get(BYTE_TOKENS[byte], UNK_ID) for byte in data]
        return [UNK_ID] if UNK_ID in ids else ids

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
                spaced_out = "".join(f" {c} " if c.isdigit() else c for c in clean(chunk))
                cut = " ".join(word for raw in self._segmenter.cut(spaced_out) if (word := raw.strip()))
                for word in cut.split():
                    parts = split_punctuation(word if word in SPECIAL_TOKENS else fold(word))
                    words += " ".join(parts).split()
            if special is not None:
                words.append(special.group())
                position = special.end()
        return words

    def _reference_pieces(self, word: str) -> list[int]:
        """BERT's word piece: greedy longest match from the left, the whole word `[UNK]` if a part is missing."""
        if word in SPECIAL_TOKENS:
            return [self._id_of[word]]
        if len(word) > _REFERENCE_MAX_WORD:
            return [UNK_ID]
        ids: list[int] = []
        start = 0
        while start < len(word):
            prefix = PART_PREFIX if start else ""
            for end in range(len(word), start, -1):
                known = self._id_of.get(prefix + word[start:end])
                if known is not None:
                    ids.append(known)
                    start = end
                    break
            else:
                return [UNK_ID]
        return ids
