"""Training checkpoints: all that a run needs to go on as if it had never stopped, in folders that are whole or absent.

`{output_dir}/checkpoints/step_{n}/` is the state after update n:

| file | what |
|---|---|
| `state.pt` | weights, optimizer, loss scaler, position, and the random states of every rank |
| `manifest.json` | its size and SHA-256, and the settings that a run which goes on from it must share |
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2_chinese.artifacts import disk_errors, flush_folder, make_folder, read_json, sha256_of, write_json

STATE, MANIFEST = "state.pt", "manifest.json"
_FOLDER = re.compile(r"step_(0|[1-9]\d*)")
_LEFT_OVER = re.compile(r"\.step_\d+\.(tmp|old)")  # half written or half deleted by a run that was killed
_FORMAT = 1
_CONTENTS = {"model", "optimizer", "scaler", "random", "progress"}
_MEND = "resume from another checkpoint, or start over with --resume none"


NGRAM_ADDS, TEACHERS_PREDICT = "what --ngram_share adds", "when --teacher predicts"
_FOLLOWING = {  # from others, which are named instead where they differ
    NGRAM_ADDS: {"--ngram_share"},
    TEACHERS_PREDICT: {"--teacher", "--epochs", "the number of updates"},
}

ADDED_SETTINGS: dict[str, Any] = {
    "--weight_decay": 0.0,
    "--muon_weight_decay": None,
    "--calibrate": False,
    "--shift_windows": False,
    "--document_mask": False,
    "--teacher": "",
    "--teacher_share": 0.6,
    TEACHERS_PREDICT: "in every window",
    "--ngram_share": 0.0,
    NGRAM_ADDS: "a trigram",
    "--character_lr": 0.0,
    "the span of windows": "a piece",
    "--val_bytes": None,
}
"""What checkpoints of earlier versions, which did not have these settings, were made with."""


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run and their steps, the latest first; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return sorted(found, reverse=True)


def write_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], settings: Mapping[str, Any], *, is_last: bool = False
) -> Path:
    """Write `folder/step_{step}` whole or not at all, in the place of one of that name; gives its path.

    Args:
        state: what `torch.load(weights_only=True)` reads back: tensors, numbers, strings and containers of them.
        settings: JSON values, checked by `check_settings` before a run goes on.
        is_last: the run ends here.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path, new = folder / f"step_{step}", folder / f".step_{step}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    make_folder(folder)
    new.mkdir()
    try:
        with open(new / STATE, "wb") as file, disk_errors(path):
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        files = {STATE: {"bytes": (new / STATE).stat().st_size, "sha256": sha256_of(new / STATE)}}
        manifest = {"format": _FORMAT, "step": step, "is_last": is_last, "files": files, "settings": dict(settings)}
        write_json(new / MANIFEST, manifest | {"sha256": _digest(manifest)})
        flush_folder(new)
        if path.exists():
            _delete(path)  # the same step of the same run, so nothing is lost if it ends here
        os.replace(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    flush_folder(folder)
    return path


def delete_old(folder: Path, *, keep: int, up_to: int | None = None) -> None:
    """Delete all but the latest `keep` checkpoints, all after step `up_to`, and what killed runs left half written."""
    whole = checkpoints_in(folder)
    beyond = [path for step, path in whole if up_to is not None and step > up_to]
    kept = [path for _, path in whole if path not in beyond][:keep]
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if _FOLDER.fullmatch(path.name) and path not in kept:
            _delete(path)
        elif _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)


def verify(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and compare its files with it.

    Raises:
        ValueError: a file is missing, cut off or changed; the message names it.
    """
    manifest = path / MANIFEST
    try:
        found = read_json(manifest)
        if not isinstance(found["settings"], dict) or type(found["step"]) is not int:
            raise TypeError
        if found.pop("sha256") != _digest(found):
            raise ValueError(f"{manifest} is damaged: it is not as it was written")
        files = dict(found["files"])
    except OSError as error:
        raise ValueError(f"{manifest} cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} is damaged: it is no manifest of a checkpoint") from error
    for name, expected in files.items():
        file = path / name
        if Path(name).name != name or not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise ValueError(f"{manifest} is damaged: it is no manifest of a checkpoint")
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{file} is damaged: it has {size:,} bytes and was written with {expected['bytes']:,}")
        if sha256_of(file) != expected["sha256"]:
            raise ValueError(f"{file} is damaged: its SHA-256 is not that of {MANIFEST}")
    return dict(found)


def latest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The latest checkpoint that is whole; `warn` is told of every later one that is not. None if there is none at all.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    found = checkpoints_in(folder)
    for number, (_, path) in enumerate(found):
        try:
            verify(path)
        except ValueError as error:
            following = f"falling back to {found[number + 1][1]}" if number + 1 < len(found) else "it was the last one"
            warn(f"{error}: {following}")
        else:
            return path
    if found:
        raise ValueError(f"no checkpoint in {folder} is valid; start over with --resume none, which deletes them")
    return None


def check_settings(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of a run with other settings.

    Raises:
        ValueError: they differ; the message names what, with both values.
    """
    saved = ADDED_SETTINGS | dict(saved)
    differing = [name for name in current if saved.get(name) != current[name]]
    differing = [name for name in differing if not _FOLLOWING.get(name, set()) & set(differing)]
    if differing:
        named = ""
        for name in differing:
            was, now = saved.get(name), current[name]
            named = f"{named}; {name} was {was}, is {now}" if named else f"{name} was {was}, is {now}"
        raise ValueError(
            f"{path} cannot be resumed: {named}. Give what it was made with, or take another --output_dir, "
            "or start over with --resume none"
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint that `verify` has found whole; its tensors are on the CPU.

    Raises:
        ValueError: it is no state that this version of torch can read.
    """
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise ValueError(f"{path / STATE} cannot be read: {reason}; {_MEND}") from error
    missing = sorted(_CONTENTS - state.keys()) if isinstance(state, dict) else sorted(_CONTENTS)
    if missing:
        raise ValueError(f"{path / STATE} is no state of a run: it has no {missing[0]}; {_MEND}")
    return dict(state)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator of this process: Python's, NumPy's, torch's and the device's."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _delete(path: Path) -> None:
    """Delete a checkpoint, which is whole or gone at any moment."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    shutil.rmtree(old)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
