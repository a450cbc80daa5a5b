"""Models that another one learns from, and their predictions of a small text, the soft targets, computed once.

A text is shown several times. Teachers that compute their predictions in every window anew take up to half of a small
pupil's updates; for the whole text it takes them as long as half an epoch of their own training. These predictions have
a quarter of a window and more before them, a pupil's window often less; what that changes is within what seeds change.
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
from gpt2_chinese.training.windows import document_positions, spans, to_device, window_batch

DTYPE = torch.float16  # what is below 6e-8 becomes 0
MOST_BYTES = 1 << 30  # of soft targets
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


def bytes_of_soft_targets(tokens: int, vocab_size: int, epochs: float) -> int:
    """What they take in memory; 0 where the teachers predict in every update instead."""
    needed = tokens * vocab_size * DTYPE.itemsize
    return needed if epochs >= FEWEST_EPOCHS and needed <= MOST_BYTES else 0


class _Stretch(NamedTuple):
    """A window of the text, and those of its tokens after which the predictions are kept."""

    start: int
    first: int
    end: int


def _stretches(begin: int, end: int, n_ctx: int) -> Iterator[_Stretch]:
    """Windows of a span that overlap by a quarter: behind the first one a prediction has so much before it.

    Example:
        >>> [tuple(one) for one in _stretches(0, 12, n_ctx=8)]
        [(0, 0, 7), (4, 3, 7)]
    """
    done, last = begin, end - n_ctx
    for start in [*range(begin, last, max(1, n_ctx * 3 // 4)), last]:
        yield _Stretch(start, done - start, n_ctx - 1)
        done = start + n_ctx - 1


@torch.no_grad()
def soft_targets(
    teachers: Sequence[GPT2LMHeadModel],
    text: npt.NDArray[Any],
    piece_lengths: Sequence[int],
    document_starts: npt.NDArray[np.int64] | None,
    *,
    rows: int,
    n_ctx: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    rank: int = 0,
    world_size: int = 1,
) -> torch.Tensor:
    """The mean of the teachers' distributions after each token of a text, `DTYPE` [tokens, rows].

    The last token of a piece has zeros, since no window predicts what follows. A rank computes its share of the text
    and has zeros elsewhere; their sum is the whole.

    Args:
        text: ids of tokens, at least `n_ctx`.
        piece_lengths: of the text, as for `window_starts`.
        document_starts: where documents begin, the first at 0, for tokens that attend to their own document only.
        rows: of the teachers' heads, those that are tokens.
    """
    use_causal_attention(*teachers)
    device = teachers[0].device
    targets = torch.zeros(len(text), rows, dtype=DTYPE, device=device)
    stretches = [one for span in spans(piece_lengths, n_ctx) for one in _stretches(*span, n_ctx)][rank::world_size]
    interval = 0.1 if sys.stderr.isatty() else 10  # in a log file every refresh is a line
    for begin in tqdm(
        range(0, len(stretches), _WINDOWS_AT_ONCE),
        desc=localized("predictions of the teachers"),
        unit=localized(" batches"),
        leave=False,
        delay=5,
        mininterval=interval,
        disable=rank > 0 or is_quiet(),
    ):
        batch = stretches[begin : begin + _WINDOWS_AT_ONCE]
        starts = np.array([stretch.start for stretch in batch])
        positions = None
        if document_starts is not None:
            positions = to_device(document_positions(document_starts, starts, n_ctx), device)
        with autocast():
            taught = states_of_teachers(teachers, rows, to_device(window_batch(text, starts, n_ctx), device), positions)
            pairs = [(states, head.to(states.dtype)) for states, head in zip(taught[::2], taught[1::2], strict=True)]
            for number, (start, first, end) in enumerate(batch):
                own = slice(number * (n_ctx - 1) + first, number * (n_ctx - 1) + end)
                mean = torch.zeros(end - first, rows, device=device)
                for states, head in pairs:
                    mean += torch.softmax(states[own] @ head.T, 1, dtype=torch.float32)
                targets[start + first : start + end] = mean / len(teachers)
    return targets
