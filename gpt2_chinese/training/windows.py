"""The windows of a training run: where they begin, in which order they come, which rank reads which.

Example:
    >>> starts = window_starts(corpus.piece_lengths, n_ctx=128, stride=127)
    >>> order = epoch_order(len(starts), seed=42, epoch=0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gpt2_chinese.text.vocabulary import Marks

_DISTANCES = 1  # tells the random numbers of the distances from those of the order


def effective_stride(stride: int, n_ctx: int) -> int:
    """The stride that leaves no token out: one less than a window, since a window's first token is not predicted."""
    return min(stride, n_ctx - 1)


def window_starts(piece_lengths: Sequence[int], n_ctx: int, stride: int) -> npt.NDArray[np.int64]:
    """Where the windows begin in `Corpus.tokens`: `n_ctx` tokens every `stride`, the last one of a piece right-aligned.

    A piece that is shorter than a window is joined with the next ones, at the end with the one before, so every token
    is in a window; there is none if all pieces together are shorter than one. With `stride` below `n_ctx` every
    token but the first of a piece is also predicted from one before it.

    Example:
        >>> window_starts([10], n_ctx=4, stride=3)
        array([0, 3, 6])
        >>> window_starts([2, 3, 9, 1], n_ctx=4, stride=3)
        array([ 0,  1,  5,  8, 11])
    """
    assert 1 <= stride <= n_ctx
    starts = [
        np.append(np.arange(begin, end - n_ctx, stride), end - n_ctx) for begin, end in spans(piece_lengths, n_ctx)
    ]
    return np.concatenate([np.empty(0, np.int64), *starts])


def joined_pieces(tokens: npt.NDArray[Any], piece_lengths: Sequence[int], marks: Marks) -> tuple[int, ...]:
    """The lengths of pieces, joined where one ends with a document and the next begins with another.

    Each piece has windows of its own, and where they are shifted, tokens at its ends are left out or come twice: of a
    small text in a hundred pieces a seventh of them.

    Example:
        >>> marks = Marks(begin=0, end=0, line_break=None, padding=None, unknown=None, never_produced=())
        >>> joined_pieces(np.array([0, 5, 0, 0, 6, 7, 8, 0]), [3, 3, 2], marks)
        (6, 2)
    """
    joined: list[int] = []
    begin = 0
    for length in filter(None, piece_lengths):
        if joined and tokens[begin] == marks.begin and tokens[begin - 1] == marks.end:
            joined[-1] += length
        else:
            joined.append(length)
        begin += length
    return tuple(joined)


def shifted_starts(
    piece_lengths: Sequence[int], n_ctx: int, stride: int, *, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """As many windows as `window_starts` has, each piece's moved by a distance below `stride`, another one each epoch.

    A model that sees a text cut at the same places in every epoch memorises what follows what at those places; cut
    elsewhere each time, a token has other ones before it. The windows that would cross a piece's end are moved back to
    it. What stands before a piece's first window is trained on where a second window at the end can be spared, and
    otherwise left out of that epoch: less than a window a piece.

    Example:
        >>> [shifted_starts([12], n_ctx=4, stride=3, seed=0, epoch=epoch).tolist() for epoch in (3, 4)]
        [[2, 5, 8, 0], [1, 4, 7, 8]]
    """
    distances = np.random.default_rng([seed, epoch, _DISTANCES])
    starts: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for begin, end in spans(piece_lengths, n_ctx):
        last = end - n_ctx
        own: npt.NDArray[np.int64] = np.append(np.arange(begin, last, stride), last)
        own = np.minimum(own + distances.integers(stride), last)
        if len(own) > 1 and own[-2] == last:
            own[-1] = begin
        starts.append(own)
    return np.concatenate(starts)


def spans(piece_lengths: Sequence[int], n_ctx: int) -> list[tuple[int, int]]:
    """Begin and end of each piece, or of several joined ones, that has room for a window; no window crosses an end."""
    found: list[tuple[int, int]] = []
    begin = end = 0
    for length in piece_lengths:
        end += length
        if end - begin >= n_ctx:
            found.append((begin, end))
            begin = end
    if end > begin and found:
        found[-1] = (found[-1][0], end)
    return found


def epoch_order(count: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch's windows: a permutation that only the seed and the epoch decide."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def window_batch(tokens: npt.NDArray[Any], starts: npt.NDArray[np.int64], n_ctx: int) -> torch.Tensor:
    """Cut windows out of the corpus: int64 [len(starts), n_ctx]."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(n_ctx)].astype(np.int64))


def document_positions(
    document_starts: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], n_ctx: int
) -> torch.Tensor:
    """The positions of windows' tokens, counted from where their document begins, or the window if that is later.

    Args:
        document_starts: where documents begin in the corpus, the first at 0, in ascending order.

    Returns:
        int64 [len(starts), n_ctx].

    Example:
        >>> document_positions(np.array([0, 4, 6]), np.array([3]), n_ctx=5)
        tensor([[0, 0, 1, 0, 1]])
    """
    places = starts[:, None] + np.arange(n_ctx)
    begins = document_starts[np.searchsorted(document_starts, places, side="right") - 1]
    return torch.from_numpy(places - np.maximum(begins, starts[:, None]))


class MicroBatch(NamedTuple):
    """Windows that go through the model at once, on its device, as `WindowLoss` takes them.

    Attributes:
        input_ids: int64 [windows, n_ctx].
        position_ids: int64 [windows, n_ctx]; None counts from each window's begin.
        starts: where the windows begin in the text, int64 [windows]; None where that is of no use.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None = None
    starts: torch.Tensor | None = None


def share_of_rank(
    starts: npt.NDArray[np.int64], rank: int, world_size: int, batch_size: int
) -> list[npt.NDArray[np.int64]]:
    """Split an update's windows into the micro-batches of one rank; every window is in exactly one of one rank.

    A micro-batch of all ranks together has `batch_size` windows. The list is empty if there are fewer windows than
    ranks.
    """
    own = starts[rank::world_size]
    size = math.ceil(batch_size / world_size)
    return [own[begin : begin + size] for begin in range(0, len(own), size)]


def to_device(integers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a GPU from pinned memory, so that the copy waits for no update; nothing on a CPU."""
    return integers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else integers
