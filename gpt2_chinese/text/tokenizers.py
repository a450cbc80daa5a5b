"""Which tokenizer a vocabulary, a tokenizer.json or a model folder has: words, characters or byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gpt2_chinese.artifacts import MAX_LARGE, read_json, read_text_file
from gpt2_chinese.text.char_tokenizer import CharTokenizer
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS, Marks, check_tokens, read_vocabulary
from gpt2_chinese.text.word_tokenizer import (
    BYTE_TOKENS,
    KEEP_CASE,
    KEEP_SPACES,
    RULES,
    RULES_VERSION,
    SPACE_TOKEN,
    CutsWords,
    WordTokenizer,
)

KINDS = ("word", "char", "bpe")
VOCABULARY, TOKENIZER_JSON, TOKENIZER_CONFIG = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
_FIRST_IDEOGRAPH, _LAST_IDEOGRAPH = "一", "鿿"


class Joiner(Protocol):
    """Turns ids to text, one after the other."""

    def push(self, id_: int) -> str: ...


class Tokenizer(Protocol):
    """What the three tokenizers have in common.

    Attributes:
        kind: word, char or bpe.
        compat: whether it is GPT2-Chinese's to the byte.
        vocabulary: the tokens in the order of their ids.
        marks: what begins a document, what ends it, what a line break is, what is never produced.
    """

    kind: str
    compat: bool
    vocabulary: list[str]
    marks: Marks

    def __len__(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def tokenize(self, text: str) -> list[str]: ...
    def normalize(self, text: str) -> str: ...
    def joiner(self) -> Joiner: ...


@runtime_checkable
class HasDefinition(Protocol):
    """A tokenizer that a tokenizer.json defines, whose tokens are bytes of the text.

    Attributes:
        definition: the text of the tokenizer.json.
        token_bytes: of each token; those of special tokens are none.
    """

    definition: str
    token_bytes: list[bytes]


@dataclass(frozen=True)
class TokenizerSpec:
    """All that makes a tokenizer; equal ones give equal ids. It travels to worker processes.

    Attributes:
        kind: word, char or bpe.
        vocabulary: the tokens in the order of their ids; empty for bpe.
        definition: the text of a tokenizer.json, for bpe.
        compat: as GPT2-Chinese, to the byte.
        rules: of words, see word_tokenizer.RULES.
        lowercase: of characters.
        begin, end, line_break: the tokens that mark a document; for bpe `begin` is `end`, and None is found.
    """

    kind: str
    vocabulary: tuple[str, ...] = ()
    definition: str = ""
    compat: bool = False
    rules: int = RULES_VERSION
    lowercase: bool = True
    begin: str | None = "[MASK]"
    end: str | None = "[CLS]"
    line_break: str | None = "[SEP]"

    def build(self, *, segmenter: CutsWords | None = None) -> Tokenizer:
        """Make the tokenizer.

        Args:
            segmenter: for words, used instead of loading one.

        Raises:
            ValueError: a special token is missing; the message begins with a verb, whose subject is the vocabulary.
        """
        if self.kind == "bpe":
            from gpt2_chinese.text.bpe_tokenizer import BpeTokenizer  # needs the package tokenizers

            return BpeTokenizer(self.definition, end=self.end)
        if self.kind == "char":
            assert self.begin is not None and self.end is not None
            return CharTokenizer(
                self.vocabulary,
                lowercase=self.lowercase,
                compat=self.compat,
                begin=self.begin,
                end=self.end,
                line_break=self.line_break,
            )
        return WordTokenizer(self.vocabulary, compat=self.compat, rules=self.rules, segmenter=segmenter)

    def settings(self) -> dict[str, Any]:
        """What a manifest keeps beside the vocabulary: JSON values."""
        names = (field.name for field in fields(self))
        return {name: getattr(self, name) for name in names if name not in ("vocabulary", "definition")}

    def keeping(self, *, case: bool, spaces: bool) -> TokenizerSpec:
        """The same tokenizer, with case and with white space beside Chinese kept.

        Raises:
            ValueError: it cannot; the message begins with the flag.
        """
        if not case and not spaces:
            return self
        flags = " and ".join(["--keep_case"] * case + ["--keep_spaces"] * spaces)
        if self.kind == "bpe":
            raise ValueError(f"{flags}: BPE keeps both anyway; leave it out")
        if self.compat:
            raise ValueError(f"{flags}: GPT2-Chinese keeps neither; leave out --compat or {flags}")
        if spaces and SPACE_TOKEN not in self.vocabulary:
            raise ValueError(
                f"{flags}: the vocabulary has no token {SPACE_TOKEN} for white space; build it with make-vocab.py "
                "--keep_spaces"
            )
        if self.kind == "char":
            return replace(self, lowercase=self.lowercase and not case)
        base = self.rules % KEEP_CASE
        if base != RULES_VERSION:
            raise ValueError(f"{flags}: the model is of older rules ({base}), which keep neither")
        kept = (self.rules - base) | (KEEP_CASE if case else 0) | (KEEP_SPACES if spaces else 0)
        return replace(self, rules=base + kept)

    def with_marks(self, begin: str, end: str) -> TokenizerSpec:
        """The same tokenizer with other tokens around a document.

        Raises:
            ValueError: words have marks that are part of how they are tokenized.
        """
        if (begin, end) == (self.begin, self.end):
            return self
        if self.kind == "word":
            raise ValueError("--document_marks is for vocabularies of characters and BPE; words have [MASK] and [CLS]")
        return replace(self, begin=begin, end=end, line_break=None if end == self.line_break else self.line_break)


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes | None]:
    """What each token adds to the bytes of a text; None for one that is whole characters, or a special token.

    Words have tokens for single bytes, byte-level BPE has tokens that begin or end within a character. A token that is
    U+FFFD itself gives its bytes, so that who draws tokens can see it.
    """
    if isinstance(tokenizer, HasDefinition):
        return [data or None for data in tokenizer.token_bytes]
    has_bytes = isinstance(tokenizer, WordTokenizer) and not tokenizer.compat
    values = {token: byte for byte, token in enumerate(BYTE_TOKENS)} if has_bytes else {}
    return [
        bytes([values[token]]) if token in values else token.encode() if "\ufffd" in token else None
        for token in tokenizer.vocabulary
    ]


def spec_of(tokenizer: Tokenizer) -> TokenizerSpec:
    """What makes a tokenizer again, in another process."""
    if isinstance(tokenizer, HasDefinition):
        end = tokenizer.vocabulary[tokenizer.marks.end]
        return TokenizerSpec("bpe", definition=tokenizer.definition, begin=end, end=end, line_break=None)
    vocabulary = tuple(tokenizer.vocabulary)
    if isinstance(tokenizer, WordTokenizer):
        return TokenizerSpec("word", vocabulary, compat=tokenizer.compat, rules=tokenizer.rules.number)
    assert isinstance(tokenizer, CharTokenizer)
    begin, end, line_break = tokenizer.mark_names
    return TokenizerSpec(
        "char",
        vocabulary,
        compat=tokenizer.compat,
        lowercase=tokenizer.lowercase,
        begin=begin,
        end=end,
        line_break=line_break,
    )


def read_tokenizer(
    path: str | Path, *, kind: str | None = None, compat: bool | None = None, settings: dict[str, Any] | None = None
) -> TokenizerSpec:
    """Read a vocabulary file, a tokenizer.json, a folder with one of them, or GPT-2's vocab.json with merges.txt.

    Args:
        kind: word, char or bpe; None tells by what is there (`recognise`).
        compat: as GPT2-Chinese; None is no for a file, and for a folder what it tells, or yes where it tells nothing.
        settings: what a manifest kept (`TokenizerSpec.settings`), which decides instead.

    Raises:
        FileNotFoundError: there is no such file, or a folder without one.
        ValueError: the file is of another kind, or lacks a special token; the message names it and the mend.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder_tokenizer(path, kind=kind, compat=compat)
    if path.suffix == ".json":
        spec = TokenizerSpec("bpe", definition=_bpe_definition(path), begin=None, end=None, line_break=None)
        return _checked(path, spec)
    tokens = read_vocabulary(path, strict=False)
    if settings is not None:
        spec = TokenizerSpec(**settings, vocabulary=tuple(tokens))
    else:
        spec = TokenizerSpec(kind or recognise(tokens), tuple(tokens), compat=bool(compat))
    if spec.kind == "bpe":
        raise ValueError(f"{path} is a vocabulary of words or characters; for --tokenizer bpe give a tokenizer.json")
    if spec.kind == "word" and not spec.compat:
        check_tokens(path, tokens)
    return _checked(path, spec)


def _checked(path: Path, spec: TokenizerSpec) -> TokenizerSpec:
    """The same, once it is seen that it makes a tokenizer; the message of an error names the file."""
    try:
        spec.build()
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return spec


def recognise(tokens: list[str]) -> str:
    """Tell a vocabulary of words from one of characters.

    Words of several Chinese characters are in no vocabulary of characters. One without any is of characters, unless
    it begins with the special tokens in the order in which make-vocab.py writes them before words.
    """
    for token in tokens:
        if len(token) > 1 and sum(_FIRST_IDEOGRAPH <= character <= _LAST_IDEOGRAPH for character in token) > 1:
            return "word"
    return "word" if tuple(tokens[: len(SPECIAL_TOKENS)]) == SPECIAL_TOKENS else "char"


def vocabulary_of_folder(folder: str | Path) -> Path | None:
    """The vocabulary file of a model folder, or None: by its hash pieces and models are known to fit."""
    names = (VOCABULARY, TOKENIZER_JSON, "vocab.json")
    return next((path for name in names if (path := Path(folder) / name).is_file()), None)


def read_folder_tokenizer(folder: Path, *, kind: str | None = None, compat: bool | None = None) -> TokenizerSpec:
    """Read the tokenizer of a model folder, of ours, of GPT2-Chinese or of the hub; errors as in `read_tokenizer`."""
    config = _read_object(folder / TOKENIZER_CONFIG)
    model = _read_object(folder / "config.json")
    special = _read_object(folder / "special_tokens_map.json") | config
    name = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    has_vocabulary = (folder / VOCABULARY).is_file()
    if kind in (None, "bpe") and (folder / TOKENIZER_JSON).is_file() and not (has_vocabulary and "Bert" in name):
        return _read_folder_bpe(folder, folder / TOKENIZER_JSON, special)
    if kind in (None, "bpe") and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_folder_bpe(folder, folder / "vocab.json", special)
    path = folder / VOCABULARY
    if not has_vocabulary:
        raise FileNotFoundError(
            f"{folder} has no {VOCABULARY}, {TOKENIZER_JSON} or vocab.json with merges.txt; name the vocabulary that "
            "the model was trained with (--vocab_file), or copy it there under its name"
        )
    tokens = read_vocabulary(path, strict=False)
    if name == "GPT2ChineseTokenizer":  # ours, of words
        manifest = _read_object(folder / "manifest.json")
        was_compat, rules = bool(config.get("compat", manifest.get("compat", False))), config.get("rules", 1)
        if type(rules) is not int or rules not in RULES:
            raise ValueError(
                f"{folder / TOKENIZER_CONFIG}: rules is {json.dumps(rules)[:40]}, this version has {sorted(RULES)}; "
                "copy the file again, or update this program"
            )
        return _checked(path, TokenizerSpec("word", tuple(tokens), compat=was_compat, rules=rules))
    if "Bert" in name and kind in (None, "char"):
        lowercase = bool(config.get("do_lower_case", True))
        begin, end = _token(special.get("bos_token")), _token(special.get("eos_token"))
        if begin is None or end is None or begin not in tokens or end not in tokens:
            begin, end = "[CLS]", "[SEP]"  # as UER's checkpoints and CKIP's were trained
        return _checked(
            path,
            TokenizerSpec(
                "char",
                tuple(tokens),
                compat=bool(config.get("compat", False)),
                lowercase=lowercase,
                begin=begin,
                end=end,
                line_break=None if end == "[SEP]" else "[SEP]",
            ),
        )
    # A folder without a word of its tokenizer is GPT2-Chinese's.
    return read_tokenizer(path, kind=kind, compat=True if compat is None else compat)


def _read_folder_bpe(folder: Path, path: Path, special: dict[str, Any]) -> TokenizerSpec:
    definition = _bpe_definition(path)
    end = _token(special.get("eos_token"))
    spec = TokenizerSpec("bpe", definition=definition, begin=end, end=end, line_break=None)
    return _checked(path, spec)


def _bpe_definition(path: Path) -> str:
    """The text of a tokenizer.json; one is made of GPT-2's vocab.json and merges.txt."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give a vocabulary, a tokenizer.json or a model folder")
    value = read_json(path, most=MAX_LARGE)
    if isinstance(value, dict) and "model" in value:
        return read_text_file(path, most=MAX_LARGE)
    merges = path.with_name("merges.txt")
    are_ids = isinstance(value, dict) and all(type(id_) is int for id_ in value.values())
    if not are_ids or not merges.is_file():
        raise ValueError(f"{path} is neither a tokenizer.json nor GPT-2's vocab.json with a merges.txt beside it")
    from gpt2_chinese.text.bpe_tokenizer import definition_of_gpt2  # needs the package tokenizers

    lines = read_text_file(merges, most=MAX_LARGE).splitlines()
    try:
        return definition_of_gpt2(value, lines)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _token(value: Any) -> str | None:
    """The text of a special token, which some files have as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, it is {json.dumps(value)[:40]}; copy it again")
    return value
