"""Models that another one learns from: read, and where the text is small asked only once what they predict of it.

A text is shown several times, and what its teachers predict after a token changes little with where the window begins.
Asked in every window, two teachers of a small model take half of an update's time; asked once for the whole text, they
take less than two of their pupil's epochs do with them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from gpt2_chinese.best_model import model_of_run
from gpt2_chinese.command_line import is_quiet, localized
from gpt2_chinese.model_folder import load_model
from gpt2_chinese.training.loss import states_of_teachers, use_causal_attention
from gpt2_chinese.training.windows import document_positions, to_device, window_batch

STORED_TYPE = torch.float16  # what is below 6e-8 becomes 0
MOST_BYTES = 1 << 30  # of stored predictions
FEWEST_EPOCHS = 2  # in which they pay: made from windows that overlap by a quarter, they cost as much as 1.3
_WINDOWS_AT_ONCE = 8


def read_teachers(args: argparse.Namespace, vocab_file: Path, n_ctx: int) -> list[GPT2LMHeadModel]:
    """The models of --teacher, to be learnt from and not to be trained.

    Raises:
        ValueError, FileNotFoundError: one is no model folder, or has another vocabulary or shorter windows.
    """
    teachers = []
    for folder in filter(None, args.teacher.split(",")):
        model, _ = load_model(model_of_run(folder), vocab_file=vocab_file)
        if model.config.n_positions < n_ctx:
            raise ValueError(
                f"--teacher {folder} knows {model.config.n_positions} positions, and a window of this run has {n_ctx} "
                "(n_ctx): take a --model_config with smaller windows, or another teacher"
            )
        teachers.append(model.requires_grad_(False).eval())
    return teachers


def stored_bytes(tokens: int, vocab_size: int, epochs: int) -> int:
    """What the predictions for a text take in memory; 0 where they are not stored but asked for in every update."""
    needed = tokens * vocab_size * STORED_TYPE.itemsize
    return needed if epochs >= FEWEST_EPOCHS and needed <= MOST_BYTES else 0


class _Stretch(NamedTuple):
    """A window of the text, and after which of its tokens the predictions are stored."""

    start: int
    first: int
    end: int


def _stretches(tokens: int, n_ctx: int) -> Iterator[_Stretch]:
    """Windows that overlap by a quarter: behind the first one a prediction has a quarter of a window before it.

    Example:
        >>> [tuple(one) for one in _stretches(12, n_ctx=8)]
        [(0, 0, 7), (4, 3, 7)]
    """
    done = 0
    last = tokens - n_ctx
    for start in [*range(0, last, max(1, n_ctx * 3 // 4)), last]:
        yield _Stretch(start, done - start, n_ctx - 1)
        done = start + n_ctx - 1


@torch.no_grad()
def mean_distributions(
    teachers: Sequence[GPT2LMHeadModel],
    text: npt.NDArray[Any],
    document_starts: npt.NDArray[np.int64] | None,
    *,
    rows: int,
    n_ctx: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    is_main: bool = True,
) -> torch.Tensor:
    """The mean of the teachers' distributions after each token of a text but the last, `STORED_TYPE` [tokens, rows].

    Args:
        text: ids of tokens, at least `n_ctx`.
        document_starts: where documents begin, the first at 0, for tokens that attend to their own document only.
        rows: of the teachers' heads, those that are tokens.
        is_main: whether this is the rank that shows progress.
    """
    use_causal_attention(*teachers)
    device = teachers[0].device
    stored = torch.zeros(len(text), rows, dtype=STORED_TYPE, device=device)
    stretches = list(_stretches(len(text), n_ctx))
    batches = [stretches[begin : begin + _WINDOWS_AT_ONCE] for begin in range(0, len(stretches), _WINDOWS_AT_ONCE)]
    interval = 0.1 if sys.stderr.isatty() else 10  # in a log file every refresh is a line
    for batch in tqdm(
        batches,
        desc=localized("asking the teachers"),
        unit=localized(" batches"),
        leave=False,
        delay=5,
        mininterval=interval,
        disable=not is_main or is_quiet(),
    ):
        starts = np.array([stretch.start for stretch in batch])
        positions = None
        if document_starts is not None:
            positions = to_device(document_positions(document_starts, starts, n_ctx), device)
        with autocast():
            taught = states_of_teachers(teachers, rows, to_device(window_batch(text, starts, n_ctx), device), positions)
            for number, stretch in enumerate(batch):
                own = slice(number * (n_ctx - 1) + stretch.first, number * (n_ctx - 1) + stretch.end)
                mean = torch.zeros(stretch.end - stretch.first, rows, device=device)
                for states, head in zip(taught[::2], taught[1::2], strict=True):
                    logits = states[own] @ head.to(states.dtype).T
                    mean += torch.softmax(logits, 1, dtype=torch.float32)
                stored[stretch.start + stretch.first : stretch.start + stretch.end] = mean / len(teachers)
    return stored
