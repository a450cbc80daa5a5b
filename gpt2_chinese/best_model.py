"""The best model of a training run, beside the others; without torch, since server.py asks for it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2_chinese.artifacts import read_json

MANIFEST = "manifest.json"
BEST_MODEL, FINAL_MODEL = "best_model", "final_model"
"""The folders that train.py writes beside the others: the model with the fewest bits per character, and the last."""


def model_of_run(folder: str | Path) -> Path:
    """The best model in an --output_dir of train.py, or else the last; any other folder is given back."""
    for name in (BEST_MODEL, FINAL_MODEL):
        if (Path(folder) / name).is_dir():
            return Path(folder) / name
    return Path(folder)


def note_of_a_better_model(folder: str | Path) -> str | None:
    """A sentence about the best model of the same run, if it lies beside this one and is another one."""
    folder = Path(folder)
    beside = folder.resolve().parent / BEST_MODEL
    if beside == folder.resolve():
        return None
    own, best = _facts(folder), _facts(beside)
    measured = best.get("best_validation")
    bits = measured.get("bits_per_character") if isinstance(measured, dict) else None
    updates, best_updates = own.get("updates"), best.get("updates")
    if not isinstance(bits, float) or not isinstance(updates, int) or not isinstance(best_updates, int):
        return None
    if updates == best_updates:
        return None
    return (
        f"{beside} is the best model of this run on its validation set, {bits:.4f} bits per character after update "
        f"{best_updates:,}; {folder} is of update {updates:,}"
    )


def _facts(folder: Path) -> dict[str, Any]:
    """What train.py has written about a model, or nothing if there is nothing that can be read."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    facts = manifest.get("facts") if isinstance(manifest, dict) else None
    return facts if isinstance(facts, dict) else {}
