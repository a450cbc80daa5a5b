"""train.py as a module, beside the files of one small run."""

from __future__ import annotations

import pytest
from small_run import write_corpus, write_shape


@pytest.fixture
def train(script, monkeypatch, tmp_path):
    """train.py as a module, with the files of one small run in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    write_corpus([30, 47])
    write_shape()
    return script("train")
