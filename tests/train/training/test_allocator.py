"""Memory that is freed stays with the process, so that an update does not ask the system for it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import torch
from gpt2_chinese.training.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        tensors = [torch.ones(10_000_000) for _ in range(2)]  # 40 MB each
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
kept = keep_freed_memory()
faults()
print(kept, before, faults())
"""


def test_tensors_of_freed_memory_cost_no_page_faults():
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc's allocator")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(before) > 10_000 and int(after) < int(before) / 20
