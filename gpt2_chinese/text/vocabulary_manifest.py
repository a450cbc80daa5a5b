"""The manifest that make-vocab.py writes beside a vocabulary: which corpus and options it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2_chinese.artifacts import has_shape, read_json

_CONTENTS = {"vocabulary": {"sha256": str}, "corpus": {"path": str}, "options": (dict, None)}


def manifest_of(vocab_file: Path) -> Path:
    """Where the manifest of a vocabulary is."""
    return vocab_file.with_name(f"{vocab_file.stem}.manifest.json")


def read_vocabulary_manifest(vocab_file: Path) -> dict[str, Any] | None:
    """Read what make-vocab.py says about a vocabulary; None where it says nothing.

    Raises:
        ValueError: the manifest is damaged, or is of another program.
    """
    path = manifest_of(vocab_file)
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not has_shape(manifest, _CONTENTS):
        raise ValueError(f"{path} is not a manifest of make-vocab.py; delete it, and run make-vocab.py again")
    return dict(manifest)
