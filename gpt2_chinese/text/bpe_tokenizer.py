"""Byte-level BPE, by the `tokenizers` package: a `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from gpt2_chinese.text.vocabulary import Marks

END_OF_TEXT = ("<|endoftext|>", "<|im_end|>", "</s>", "[EOS]", "<eos>")
"""Names that an end-of-text token has, the likeliest first."""


@lru_cache(maxsize=1)
def bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for, as GPT-2 has it.

    A byte that is a printable character of Latin-1 stands for itself; the others, in order, for those from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def bytes_of_token(token: str) -> bytes:
    """The bytes that a byte-level token stands for.

    Raises:
        ValueError: it has another character than those of bytes; the message begins with a verb.
    """
    table = bytes_of_characters()
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        raise ValueError(f"has the token {token[:40]!r}, which is not of bytes; copy it again") from None


def check_ids(ids: Mapping[str, int]) -> None:
    """Refuse ids that are far beyond their number, before memory is taken for all that are below them.

    Raises:
        ValueError: there is one, or one below 0, or none at all; the message begins with a verb.
    """
    least, most = min(ids.values(), default=-1), max(ids.values(), default=-1)
    if least < 0 or most > 2 * len(ids) + 1000:  # some have tokens left out
        raise ValueError(f"is damaged: {len(ids):,} tokens have ids from {least:,} to {most:,}; copy it again")


class BpeJoiner:
    """Joins byte-level tokens to text; bytes are held back until their character is whole, or cannot become one."""

    def __init__(self, token_bytes: Sequence[bytes], end: int) -> None:
        self._token_bytes = token_bytes
        self._end = end
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_first = True

    def push(self, id_: int) -> str:
        """Give the text that this token adds to those before it."""
        is_first, self._is_first = self._is_first, False
        if id_ == self._end:  # it begins a document too
            return "" if is_first else self._decoder.decode(b"", final=True) + "\n\n"
        return self._decoder.decode(self._token_bytes[id_])


class BpeTokenizer:
    """
    Args:
        definition: the text of a `tokenizer.json`.
        end: the token that begins and ends a document; None looks for one of `END_OF_TEXT`.

    Raises:
        ValueError: it is not byte-level BPE, or has no such token; the message begins with a verb.

    Example:
        >>> tokenizer = BpeTokenizer(Path("tokenizer.json").read_text(encoding="utf-8"))
        >>> tokenizer.decode(tokenizer.encode("Hello, 世界"))
        'Hello, 世界'
    """

    kind = "bpe"
    compat = False

    def __init__(self, definition: str, *, end: str | None = None) -> None:
        self.definition = definition
        self._tokenizer = read_definition(definition)
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        check_ids(ids)
        self.vocabulary = [""] * (max(ids.values()) + 1)
        for token, id_ in ids.items():
            self.vocabulary[id_] = token
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: id_ for id_, token in added.items() if token.special}
        names = END_OF_TEXT if end is None else (end,)
        found = [ids[name] for name in names if name in ids]
        if not found:
            wanted = f"no {end}" if end is not None else f"none of {', '.join(END_OF_TEXT)}"
            raise ValueError(f"has {wanted}, which ends a document; name the one it has with --document_marks")
        self.marks = Marks(
            begin=found[0],
            end=found[0],
            line_break=None,
            padding=next((special[name] for name in ("<pad>", "[PAD]", "<|pad|>") if name in special), None),
            unknown=None,
            never_produced=tuple(sorted(id_ for id_ in special.values() if id_ != found[0])),
        )
        self.token_bytes = [
            added[id_].content.encode() if id_ in added else bytes_of_token(token)
            for id_, token in enumerate(self.vocabulary)
        ]
        for id_ in special.values():
            self.token_bytes[id_] = b""

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text, without the marks of a document; the name of a special token is ordinary text."""
        # As a batch of one: for a single text the package holds Python's lock, and a server would wait.
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of many texts at once."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def tokenize(self, text: str) -> list[str]:
        """Give the tokens of a text; their ids are those of `encode`."""
        return [self.vocabulary[id_] for id_ in self.encode(text)]

    def joiner(self) -> BpeJoiner:
        """Turns ids to text, one after the other."""
        return BpeJoiner(self.token_bytes, self.marks.end)

    def decode(self, ids: Iterable[int]) -> str:
        """Give the text of ids; the bytes of a character that is not whole at the end are left out.

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
        """What the tokenizer keeps of a text: all of it."""
        return text


def definition_of_gpt2(ids: Mapping[str, int], merges: Iterable[str]) -> str:
    """The text of a tokenizer.json that does what GPT-2's vocab.json and the lines of its merges.txt say.

    Raises:
        ValueError: they make no tokenizer; the message begins with a verb, whose subject is the vocab.json.
    """
    check_ids(ids)
    parted = [line.partition(" ") for line in merges if line and not line.startswith("#version")]
    try:
        tokenizer = Tokenizer(BPE(dict(ids), [(first, second) for first, _, second in parted]))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = Decoder()
        tokenizer.add_special_tokens([name for name in ("<|endoftext|>",) if name in ids])
        return str(tokenizer.to_str())
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"does not fit the merges.txt beside it: {_first_line(error)}; copy both again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _replaces_nothing(step: Any) -> bool:
    """Whether a normalizer, or one of a sequence, replaces the empty text, at which the package panics."""
    if not isinstance(step, dict):
        return False
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and "" in pattern.values():
        return True
    steps = step.get("normalizers")
    return isinstance(steps, list) and any(map(_replaces_nothing, steps))


def read_definition(definition: str) -> Tokenizer:
    """Read a `tokenizer.json`, and set what makes the names of special tokens in a text ordinary text.

    Raises:
        ValueError: it is not byte-level BPE; the message begins with a verb, whose subject is the file.
    """
    try:
        described = json.loads(definition)
        kind = described["model"]["type"]
        steps = json.dumps([described.get("pre_tokenizer"), described.get("decoder")])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("is not a tokenizer.json of the tokenizers package; copy it again") from error
    if kind != "BPE" or "ByteLevel" not in steps:
        kind = str(kind)[:40]
        raise ValueError(
            f"is a {kind} tokenizer{'' if kind != 'BPE' else ' without bytes'}, and only byte-level BPE is read from a "
            "tokenizer.json; for WordPiece give its vocab.txt with --tokenizer char"
        )
    if _replaces_nothing(described.get("normalizer")):
        raise ValueError("is damaged: its normalizer replaces the empty text; copy it again")
    try:
        tokenizer = Tokenizer.from_str(definition)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("a 一\n", add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the package raises nothing more specific, and its panics are no Exception
        raise ValueError(f"is damaged: {_first_line(error)}; copy it again") from error
    return tokenizer
