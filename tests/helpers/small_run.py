"""A corpus, a shape and a call of train.py, small enough to be run in every test of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from book_order import CLS_ID, MASK_ID
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2_chinese.artifacts import sha256_of, write_lines
from gpt2_chinese.text.vocabulary import SPECIAL_TOKENS

torch.set_num_threads(1)
N_CTX = 8


def write_corpus(piece_lengths: list[int], *, words: int = 30) -> list[list[int]]:
    """Pieces of pseudo-random ids, a document each and without its marks, as `write_pieces` leaves them."""
    generator = np.random.default_rng(0)
    pieces = [generator.integers(5, words + 5, length).tolist() for length in piece_lengths]
    write_pieces(pieces, words=words)
    return pieces


def write_documents(lengths: list[int], *, num_pieces: int = 2, words: int = 30) -> list[list[int]]:
    """Documents of pseudo-random ids between `[MASK]` and `[CLS]`, dealt to pieces in order; gives the documents."""
    generator = np.random.default_rng(0)
    documents = [[MASK_ID, *generator.integers(5, words + 5, length).tolist(), CLS_ID] for length in lengths]
    size = -(-len(documents) // num_pieces)
    write_pieces([sum(documents[begin : begin + size], []) for begin in range(0, len(documents), size)], words=words)
    return documents


def write_pieces(pieces: list[list[int]], *, words: int) -> None:
    """Pieces, their vocabulary and manifest, as make-tokenized.py leaves them."""
    folder, vocab_file = Path("tokenized"), Path("vocab/vocab_user.txt")
    write_lines(vocab_file, [*SPECIAL_TOKENS, *(chr(0x4E00 + number) for number in range(words))])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries = []
    for number, ids in enumerate(pieces):
        path = folder / f"tokenized_train_{number}.txt"
        path.write_text("".join(f"{id_} " for id_ in ids), encoding="utf-8")
        entries.append({"file": path.name, "sha256": sha256_of(path), "tokens": len(ids), "documents": 1})
    manifest = {
        "format": 1,
        "vocabulary": {"path": str(vocab_file), "sha256": sha256_of(vocab_file), "size": words + 5},
        "options": {"num_pieces": len(pieces), "min_length": 128, "compat": False},
        "pieces": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def write_shape(**changes: object) -> None:
    shape = {"n_ctx": N_CTX, "n_positions": N_CTX, "n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 50005}
    shape |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    Path("shape.json").write_text(json.dumps(shape | changes), encoding="utf-8")


def run(train, *flags: str, device: str = "cpu", **named: object) -> int:
    argv = ["--device", device, "--model_config", "shape.json", "--lr", "1e-2", "--precision", "fp32"]
    argv += ["--val_fraction", "0", *flags]
    for name, value in named.items():
        argv += [f"--{name}", str(value)]
    if "--resume" in flags:
        # TensorBoard reads files in the order of their names: the second, then a count without leading zeros.
        second = int(time.time())
        while int(time.time()) == second:
            time.sleep(0.02)
    return train.main(argv)


@contextmanager
def stopped_after(train, monkeypatch, updates: int) -> Iterator[None]:
    """This process gets SIGTERM at so manyth an update of a run."""
    original, calls = train.train_update, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_update", stopping)
        yield


def weights(folder: str = "model/final_model") -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def scalars(folder: str = "tensorboard_summary") -> dict[str, list[float]]:
    events = EventAccumulator(folder)
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
