"""Vocabulary files, one token a line, its id is its line number from 0; and the special tokens, found by name.

A copy of this file travels in the model folders of word vocabularies (see tokenization_gpt2_chinese.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SPECIAL_TOKENS = ("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]")
"""In the order in which make-vocab.py writes them before words; other vocabularies may have them anywhere."""

BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In BERT's order, in which make-vocab.py writes them before characters; it tells such a file from one of words."""

MAX_EMPTY_LINES = 1000  # in a vocabulary; some that were published have a few


@dataclass(frozen=True)
class Marks:
    """The ids of special tokens, by what they do.

    Attributes:
        begin: begins a document.
        end: ends it; may be the same as `begin`.
        line_break: a line break within a document; None where a line break is white space, or text as any other.
        padding, unknown: None where the vocabulary has none.
        never_produced: mean nothing in a completion; every decoder leaves them out.
    """

    begin: int
    end: int
    line_break: int | None
    padding: int | None
    unknown: int | None
    never_produced: tuple[int, ...]


def find_marks(
    ids: Mapping[str, int], *, begin: str = "[MASK]", end: str = "[CLS]", line_break: str | None = "[SEP]"
) -> Marks:
    """Find the special tokens of a vocabulary by name.

    Args:
        ids: the id of each token.
        begin, end, line_break: the names of those that mark a document; those of GPT2-Chinese by default. A line break
            is white space where its token is None or missing.

    Raises:
        ValueError: the token that begins or ends a document is missing.
    """
    for token, role in ((begin, "begins a document"), (end, "ends a document")):
        if token not in ids:
            raise ValueError(
                f"has no {token}, which {role}; put it on a line of its own where the model was trained with it, or "
                "name the tokens that begin and end a document with --document_marks"
            )
    known = {name: ids.get(name) for name in ("[MASK]", "[PAD]", "[UNK]")}
    break_id = ids.get(line_break) if line_break is not None else None
    never = [id_ for id_ in [ids[begin], *known.values()] if id_ is not None and id_ not in (ids[end], break_id)]
    return Marks(
        begin=ids[begin],
        end=ids[end],
        line_break=break_id,
        padding=known["[PAD]"],
        unknown=known["[UNK]"],
        never_produced=tuple(dict.fromkeys(never)),
    )


def read_vocabulary(path: str | Path, *, strict: bool = True) -> list[str]:
    """Read a vocabulary file; the id of a token is its index in the list.

    Args:
        strict: refuse empty lines and tokens that stand there twice; vocabularies that were published have some.

    Raises:
        FileNotFoundError: there is no such file; the message says which script writes it.
        ValueError: not UTF-8, no token, an empty line, or a token that stands there twice; the message names the line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no vocabulary {path}: run make-vocab.py first, or name the file with --vocab_file "
            "(make-vocab.py) or --vocab_filename (make-tokenized.py)"
        ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte {error.start} is not UTF-8; build it with make-vocab.py") from None
    if data.count(b"\n\n") + data.count(b"\n\r\n") > MAX_EMPTY_LINES:  # before a list is made of them
        raise ValueError(f"{path} has thousands of empty lines; build the vocabulary with make-vocab.py")
    # Not splitlines(): a token may be one of the other line separators of Unicode.
    tokens = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not any(tokens):
        raise ValueError(f"{path} is empty; build the vocabulary with make-vocab.py")
    if strict:
        check_tokens(path, tokens)
    return tokens


def check_tokens(path: str | Path, tokens: Sequence[str]) -> None:
    """Refuse empty tokens, and those that stand in the vocabulary twice; errors as in `read_vocabulary`."""
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if not token:
            raise ValueError(f"{path}, line {number} is empty; delete it, or build the vocabulary with make-vocab.py")
        if token in seen:
            raise ValueError(
                f"{path}, line {number}: {token!r} stands in line {seen[token]} already; delete one of them, "
                "or build the vocabulary with make-vocab.py"
            )
        seen[token] = number
