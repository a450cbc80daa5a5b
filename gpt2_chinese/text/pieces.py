"""The tokenized pieces and their manifest: what make-tokenized.py and train.py agree on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2_chinese.artifacts import MAX_LARGE, has_shape, read_json, sha256_of
from gpt2_chinese.text.tokenizers import KINDS, HasDefinition, Tokenizer, TokenizerSpec, read_tokenizer
from gpt2_chinese.text.vocabulary import Marks
from gpt2_chinese.text.word_tokenizer import BYTE_TOKENS, PART_PREFIX, RULES

MANIFEST = "manifest.json"
PROGRESS = ".progress.jsonl"  # there while make-tokenized.py is at work, or when it was interrupted
_PIECE = re.compile(r"tokenized_train_(0|[1-9]\d*)\.txt")
_BLOCK = 1 << 22  # bytes of a piece in memory at a time
UNKNOWN_WARNING, UNKNOWN_ERROR = 0.01, 0.20  # shares of [UNK] among tokens
HOW_TO_FIX = "run make-tokenized.py again"
ENTRY = {"file": str, "sha256": str, "tokens": int, "documents": int}
"""What a manifest says of a piece, as `artifacts.has_shape` takes it."""
_CONTENTS = {
    "pieces": [ENTRY],
    "vocabulary": {"path": str, "sha256": str, "size": int},
}
_COUNTS = {"tokens": int, "documents": int, "unknown_tokens": int}
_SETTINGS = {
    "kind": str,
    "compat": bool,
    "rules": int,
    "lowercase": bool,
    "begin": (str, None),
    "end": (str, None),
    "line_break": (str, None),
}


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Read what make-tokenized.py says about the pieces; None where there is no manifest (files of the reference).

    Raises:
        ValueError: the manifest is damaged, or make-tokenized.py has not come to its end.
    """
    path = Path(folder) / MANIFEST
    if path.with_name(PROGRESS).exists():
        raise ValueError(f"{folder}: make-tokenized.py is still running or was interrupted; {HOW_TO_FIX} (it resumes)")
    return read_manifest_file(path) if path.is_file() else None


def read_manifest_file(path: Path) -> dict[str, Any]:
    """Read a manifest, also one beside pieces that are being made again.

    Raises:
        ValueError: it is damaged.
    """
    manifest = read_json(path, most=MAX_LARGE)
    # Earlier versions did not count what is unknown.
    if not has_shape(manifest, _CONTENTS) or ("unknown_tokens" in manifest and not has_shape(manifest, _COUNTS)):
        raise ValueError(f"{path} is not a manifest of make-tokenized.py; {HOW_TO_FIX}")
    return dict(manifest)


def check_unknown(unknown: int, tokens: int, vocab_file: str | Path, *, allow: bool) -> str | None:
    """Judge the share of `[UNK]` among tokens; gives a warning where there is much of it.

    Args:
        allow: whether it is a warning also where it would be an error: `--allow_unk`, or `--compat`.

    Raises:
        ValueError: the vocabulary is not one of this text; the message has the mend.
    """
    share = unknown / max(tokens, 1)
    if share < UNKNOWN_WARNING:
        return None
    problem = (
        f"{share:.1%} of the tokens are [UNK]: {vocab_file} has not the characters of this text; make one of it with "
        "make-vocab.py, which spells every character in bytes, or with --tokenizer bpe"
    )
    if share >= UNKNOWN_ERROR and not allow:
        raise ValueError(f"{problem}, or go on all the same with --allow_unk")
    return f"warning: {problem}"


def check_vocabulary(folder: str | Path, manifest: dict[str, Any] | None, vocab_file: str | Path) -> None:
    """Refuse a vocabulary other than the one that the pieces were made with.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another; the message names both files and the command that mends it.
    """
    if not Path(vocab_file).is_file():
        raise FileNotFoundError(
            f"there is no vocabulary {vocab_file}: run make-vocab.py first, or name the file with --vocab_file"
        )
    if manifest is not None and manifest["vocabulary"]["sha256"] != sha256_of(vocab_file):
        raise ValueError(
            f"{vocab_file} is not the vocabulary that {Path(folder) / MANIFEST} was made with; "
            f"{HOW_TO_FIX}, with --vocab_filename {vocab_file}"
        )


def read_pieces_tokenizer(manifest: dict[str, Any] | None, vocab_file: str | Path) -> TokenizerSpec:
    """The tokenizer that pieces were made with, given its vocabulary; without a manifest they are the reference's."""
    if manifest is None:
        return read_tokenizer(vocab_file, compat=True)
    settings = manifest.get("tokenizer")
    if settings is None and has_shape(manifest.get("options"), {"compat": bool}):
        # written before there were others than words
        rules = manifest.get("tokenizer_rules", 1)
        settings = {"kind": "word", "compat": manifest["options"]["compat"], "rules": rules}
    if isinstance(settings, dict) and "kind" in settings:  # some others were added later
        settings = TokenizerSpec("word").settings() | settings
    if not _are_settings(settings):
        raise ValueError(f"the tokenizer in {MANIFEST} is of another version of this program; {HOW_TO_FIX}")
    return read_tokenizer(vocab_file, settings=settings)


def _are_settings(settings: Any) -> bool:
    """Whether they are those of a tokenizer of this version (`TokenizerSpec.settings`)."""
    if not has_shape(settings, _SETTINGS) or settings.keys() != _SETTINGS.keys():
        return False
    has_marks = settings["kind"] != "char" or None not in (settings["begin"], settings["end"])
    return settings["kind"] in KINDS and settings["rules"] in RULES and has_marks


def text_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """What each token adds to a text, without case and the spaces between words: much the same for every vocabulary."""
    marks = tokenizer.marks
    special = dict.fromkeys([marks.begin, marks.end, marks.padding, *marks.never_produced], b"")
    special[marks.unknown] = "\ufffd".encode()
    if marks.line_break is not None:
        special[marks.line_break] = b"\n"
    if isinstance(tokenizer, HasDefinition):
        texts = [text.replace(b" ", b"").lower() for text in tokenizer.token_bytes]
    else:
        byte_of = {token: bytes([value]) for value, token in enumerate(BYTE_TOKENS)} | {BYTE_TOKENS[0x20]: b""}
        texts = [
            byte_of[token] if token in byte_of else token.removeprefix(PART_PREFIX).encode("utf-8", "surrogatepass")
            for token in tokenizer.vocabulary
        ]
    return [special.get(id_, text) for id_, text in enumerate(texts)]


def document_begins(ids: npt.NDArray[Any], marks: Marks, *, inside: bool = False) -> npt.NDArray[np.int64]:
    """Where documents begin among ids; where one token begins and ends them, at every second one.

    Args:
        inside: whether the first of the ids is inside a document whose end is still to come.
    """
    found = np.flatnonzero(ids == marks.begin).astype(np.int64)
    return found[int(inside) :: 2] if marks.begin == marks.end else found


def piece_numbers(folder: Path) -> list[int]:
    """The numbers of the pieces, which must be 0, 1, 2, ..."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: run make-tokenized.py first, or name it with --tokenized_data_path"
        )
    numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := _PIECE.fullmatch(path.name)))
    if not numbers:
        raise FileNotFoundError(f"there is no tokenized_train_0.txt in {folder}: run make-tokenized.py first")
    missing = sorted(set(range(numbers[-1])) - set(numbers))
    if missing:
        names = ", ".join(f"tokenized_train_{number}.txt" for number in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(
            f"{folder} has tokenized_train_{numbers[-1]}.txt, but not {names}{more}; {HOW_TO_FIX}, or delete the "
            "pieces left from an earlier run"
        )
    return numbers


def read_piece(path: Path, vocab_size: int, digest: Any) -> Iterator[npt.NDArray[np.int64]]:
    """Read the ids of one piece block by block; `digest` is told its bytes."""
    count = position = 0  # ids and bytes before this block
    rest = b""
    with open(path, "rb") as file:
        while True:
            block = file.read(_BLOCK)
            digest.update(block)
            text = rest + block
            # A number may go on in the next block.
            end = len(text) if not block else max(text.rfind(b" "), text.rfind(b"\n")) + 1
            text, rest = text[:end], text[end:]
            strange = text.translate(None, b"0123456789 \r\n\t")
            if strange:
                offset = position + text.index(strange[:1])
                raise ValueError(f"{path}, byte {offset}: {strange[:1]!r} is no part of an id; {HOW_TO_FIX}")
            # A number too long for 64 bits becomes the largest of them, which is no id of any vocabulary.
            ids = np.fromstring(text, dtype=np.int64, sep=" ") if text.strip() else np.empty(0, np.int64)
            wrong = np.flatnonzero(ids >= vocab_size)
            if len(wrong):
                raise ValueError(
                    f"{path}, number {count + int(wrong[0]) + 1}: id {text.split()[wrong[0]].decode()} is outside the "
                    f"vocabulary of {vocab_size} tokens; the piece was made with another vocabulary: {HOW_TO_FIX}"
                )
            yield ids
            count += len(ids)
            position += len(text)
            if not block:
                return
