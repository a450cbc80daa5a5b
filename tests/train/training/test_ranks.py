"""How a run on several devices ends when one of its ranks does."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import torch

from gpt2_chinese.training.ranks import Rank, run_on_all

DEVICES = [torch.device("cpu")] * 2


def work(rank: Rank, what: str) -> int:
    """Rank 0 waits for rank 1 when that ends, or the other way round."""
    failing = 0 if what == "a full disk" else 1
    rank.sum(torch.ones(1))
    if rank.number == failing:
        if what == "a full disk":
            raise OSError(errno.ENOSPC, "No space left on device", "model/metrics.jsonl")
        if what == "a mistake":
            raise ValueError("--lr is too large")
        if what == "a bug":
            raise KeyError("of a bug")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    elif what != "nothing":
        rank.sum(torch.ones(1))
    return 3 + rank.number


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("a full disk", ValueError, r"^model/metrics.jsonl: No space left on device$"),
        ("a mistake", ValueError, r"^--lr is too large$"),
        ("kill", OSError, r"^a rank was killed, or memory ran out; the same command with --resume goes on"),
        ("a bug", RuntimeError, r"(?s)^rank 1:\n.*KeyError: 'of a bug'"),
    ],
)
def test_the_rank_that_fails_says_why_and_the_others_nothing(what, error, message, capfd):
    with pytest.raises(error, match=message):
        run_on_all(DEVICES, work, what)
    assert "Traceback" not in capfd.readouterr().err


def test_the_status_is_that_of_the_main_rank():
    assert run_on_all(DEVICES, work, "nothing") == 3
