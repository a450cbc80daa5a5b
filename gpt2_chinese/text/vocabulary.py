"""The special tokens, and vocabulary files: one token a line, its id is its line number from 0.

A copy of this file travels in every model folder (see tokenization_gpt2_chinese.py).
"""

from __future__ import annotations

from pathlib import Path

SPECIAL_TOKENS = ("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]")
SEP_ID, CLS_ID, MASK_ID, PAD_ID, UNK_ID = range(5)
"""A line break, the end of a document, its beginning, padding, and what the vocabulary cannot spell."""
NEVER_PRODUCED = (MASK_ID, PAD_ID, UNK_ID)
"""They mean nothing in a completion; every decoder leaves them out."""


def read_vocabulary(path: str | Path) -> list[str]:
    """Read a vocabulary file; the id of a token is its index in the list.

    Raises:
        FileNotFoundError: there is no such file; the message says which script writes it.
        ValueError: not UTF-8, the first five lines are not the special tokens, an empty line, white space inside a
            token, or a token that stands there twice; the message names the line.
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
    # Not splitlines(): a token may be one of the other line separators of Unicode.
    tokens = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    first = tuple(tokens[: len(SPECIAL_TOKENS)])
    if first != SPECIAL_TOKENS:
        raise ValueError(
            f"{path}: the first five lines must be {' '.join(SPECIAL_TOKENS)}, they are {' '.join(first) or 'empty'}; "
            "put them there, or build the vocabulary with make-vocab.py"
        )
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
    return tokens
