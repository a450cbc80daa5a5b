"""OpenMP's threads are told how long to spin before torch loads OpenMP, unless the user has said it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_chinese.openmp import SPINS

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Finder())
import train
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_it_is_set_before_torch_is_imported(given, expected):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_WAIT"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
