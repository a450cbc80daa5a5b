"""From logits to a token: repetition penalty, temperature, top-k, top-p and a seeded draw, for many rows at once.

Every function takes a batch of logits [B, V] and one setting a row. What a row gets depends on its own logits, settings
and random number only, never on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2_chinese.compiled import load_function
from gpt2_chinese.precision import to_device

MASK_64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: the step of the SplitMix64 generator."""

# Of a row with top-k, at most FEW, only top_k and SPARE more of the greatest logits are looked at, unless ties at its
# edge need more.
FEW = 128
SPARE = 8
BLOCK = 16
MAX_CANDIDATES = 512
"""Ties included; the compiled draw leaves a row with more to PyTorch."""
KERNEL = "gpt2_chinese.decoding.sampling_kernel"
SOURCES = (Path(__file__), Path(__file__).with_name("sampling_kernel.py"))


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """CTRL's repetition penalty: a positive logit of a seen token is divided by it, a negative one multiplied.

    Args:
        logits: [B, V].
        seen: [B, V], true for the tokens so far.
        penalty: [B]; 1 changes nothing.
    """
    penalty = penalty.to(logits.dtype)[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """The logits over the temperature [B], shifted so that the greatest of a row is 0 and nothing overflows."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted / temperature.to(logits.dtype).clamp_min(torch.finfo(logits.dtype).tiny)[:, None]


def top_k_top_p_mask(ranked: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the logits, sorted in descending order, pass top-k first and then top-p on what is left.

    Top-k keeps every logit that is not below the k-th, so ties at the edge all stay. Top-p keeps a token while the
    probability of those before it is not above `top_p`, so the first one always stays.

    Args:
        ranked: [B, C], descending.
        top_k: [B] integers; 0 is off.
        top_p: [B]; 0 and everything from 1 on is off.

    Returns:
        The mask [B, C] of those that stay and the unnormalised probabilities [B, C] in float64, 0 for the others.
    """
    candidates = ranked.shape[1]
    edge = torch.where(top_k > 0, top_k, candidates).clamp_max(candidates) - 1
    keep = ranked >= ranked.gather(1, edge[:, None])
    # In float64 the order of the sum, which may change with the shape of the batch, does not show in the result.
    weights = (ranked.double() - ranked[:, :1].double()).exp() * keep
    cumulative = weights.cumsum(dim=1)
    limit = torch.where((top_p > 0) & (top_p < 1), top_p.double(), torch.inf)
    keep[:, 1:] &= cumulative[:, :-1] <= limit[:, None] * cumulative[:, -1:]
    return keep, weights * keep


def apply_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The logits [B, V] with -inf for what top-k [B] and top-p [B] remove; of equal logits the first ones stay."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    keep, _ = top_k_top_p_mask(ranked, top_k, top_p)
    return logits.masked_fill(~torch.zeros_like(keep).scatter(1, order, keep), -torch.inf)


def row_seed(seed: int, sample: int) -> int:
    """The seed of one sample of a request: another one for each sample, the same however many there are."""
    return _mixed(_mixed(seed & MASK_64) + (sample + 1) * GOLDEN)


def _mixed(value: int) -> int:
    """SplitMix64's finaliser, on a Python integer."""
    value &= MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def uniforms(seeds: Sequence[int] | np.ndarray, steps: Sequence[int] | np.ndarray) -> Tensor:
    """One number above 0 and below 1 for each row, from its seed and the count of its tokens alone: float64 [B].

    A counter-based generator (SplitMix64): no state to keep or to share, so a row may join, leave and move. 48 bits,
    so that a number times a sum is never rounded up to the sum.
    """
    value = np.asarray(seeds, dtype=np.uint64) + np.asarray(steps, dtype=np.uint64) * np.uint64(GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return torch.from_numpy(((value >> np.uint64(16)).astype(np.float64) + 0.5) / 2.0**48)


@cache
def load_draw() -> Callable[..., None]:
    """The compiled code; see sampling_kernel.draw_few for its arguments."""
    return load_function(KERNEL, SOURCES, arguments=12)  # to get Python's lock back may take longer than the draw


class CompiledDraw:
    """The draw of rows on the CPU whose temperature is 0 or whose top-k is on and below FEW, by our own compiled code.

    Args of a call are those of `draw`. Returns the tokens [B], -1 for a row that PyTorch is to draw.
    """

    def __init__(self, vocab_size: int) -> None:
        self._function = load_draw()
        # Room for one row: the greatest of its blocks, the candidates' ids, apply_temperature logits and weights.
        scratch = (
            np.empty(vocab_size, np.float32),
            np.empty(MAX_CANDIDATES, np.int64),
            np.empty(MAX_CANDIDATES, np.float32),
            np.empty(MAX_CANDIDATES, np.float64),
        )
        self._vocab_size, self._scratch = vocab_size, scratch
        self._addresses = [part.ctypes.data for part in scratch]

    def __call__(self, logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
        rows = len(logits)
        tokens = np.empty(rows, dtype=np.int64)
        given = (logits, uniform, temperature, top_k, top_p)
        kinds = (torch.float32, torch.float64, torch.float32, torch.int64, torch.float32)
        assert logits.shape == (rows, self._vocab_size)
        assert all(part.is_contiguous() and part.dtype == kind for part, kind in zip(given, kinds, strict=True))
        addresses = [part.data_ptr() for part in given[1:]]
        self._function(logits.data_ptr(), self._vocab_size, rows, *addresses, tokens.ctypes.data, *self._addresses)
        return torch.from_numpy(tokens)


def draw(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    *,
    compiled: CompiledDraw | None = None,
) -> Tensor:
    """One token for each row: the greatest logit where the temperature is 0, else a draw from what the filter keeps.

    The draw turns one uniform number into a token: candidates stand in descending order (equal ones by their id; in
    the order of the vocabulary where neither top-k nor top-p is on), and the first is taken whose cumulative
    probability is above the number.

    The settings and numbers are on the CPU, wherever the logits are: which rows go which way is decided there, and all
    that a GPU is waited for is its tokens, once.

    Args:
        logits: [B, V], on any device; -inf for what must not be drawn.
        uniform: [B] in (0, 1), see `uniforms`.
        temperature: [B], 0 or more.
        top_k: [B] integers; 0 is off.
        top_p: [B]; 0 and everything from 1 on is off.
        compiled: draws the rows that it can; the tokens are the same.

    Returns:
        Token ids [B], int64, on the CPU.
    """
    if compiled is not None:
        tokens = compiled(logits, uniform, temperature, top_k, top_p)
        if rows := np.flatnonzero(tokens.numpy() < 0).tolist():
            left = (part[rows] for part in (uniform, temperature, top_k, top_p))
            tokens[rows] = draw(_rows(logits, rows), *left)
        return tokens
    random = temperature > 0
    has_top_p = (top_p > 0) & (top_p < 1)
    few = random & (top_k > 0) & (top_k < min(FEW, logits.shape[1]))
    ranked = random & ~few & ((top_k > 0) | has_top_p)
    plain = random & ~few & ~ranked

    def drawn(way: Callable[..., Tensor], rows: list[int]) -> Tensor:
        settings = (to_device(part[rows], logits.device) for part in (uniform, temperature, top_k, top_p))
        return way(_rows(logits, rows), *settings)

    ways: list[tuple[Tensor, Callable[..., Tensor]]]
    # Where rows differ, as many candidates as the greatest top_k needs: a row's token is the same with more.
    count = min(int((top_k * few).max()) + SPARE, logits.shape[1])
    of_few = partial(_draw_of_few, count=count)
    ways = [(~random, _draw_greatest), (few, of_few), (ranked, _draw_of_ranked), (plain, _draw_of_all)]
    groups = [(rows, drawn(way, rows)) for mask, way in ways if (rows := mask.nonzero().flatten().tolist())]
    tokens = torch.empty(len(logits), dtype=torch.int64)
    # A GPU is waited for here.
    tokens[[row for rows, _ in groups for row in rows]] = torch.cat([part for _, part in groups]).cpu()
    if rows := (tokens < 0).nonzero().flatten().tolist():
        tokens[rows] = drawn(_draw_of_ranked, rows).cpu()
    return tokens


def _draw_greatest(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _draw_of_few(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, *, count: int
) -> Tensor:
    """Draw with top-k from the `count` greatest; -1 where they may not hold all that top-k keeps."""
    # The temperature keeps the order, so only the candidates need it; what it makes equal is a tie, see below.
    best, ids = _greatest(logits, count)
    best = apply_temperature(best, temperature)
    # topk promises no order among equal logits: first by id, then stably by logit.
    ids, by_id = ids.sort(dim=-1)
    best, by_logit = best.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    _, weights = top_k_top_p_mask(best, top_k, top_p)
    tokens = _pick(weights, uniform, ids.gather(1, by_logit))
    # Ties at top-k's edge that reach the last candidate may go on behind it: such rows are ranked whole.
    edge = best.gather(1, top_k[:, None] - 1)[:, 0]
    return tokens.masked_fill((best[:, -1] == edge) & edge.isfinite(), -1)


def _draw_of_ranked(logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    best, ids = apply_temperature(logits, temperature).sort(dim=-1, descending=True, stable=True)
    _, weights = top_k_top_p_mask(best, top_k, top_p)
    return _pick(weights, uniform, ids)


def _draw_of_all(logits: Tensor, uniform: Tensor, temperature: Tensor, *_: Tensor) -> Tensor:
    return _pick(apply_temperature(logits, temperature).double().exp(), uniform, None)


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Some rows; no copy where they are all."""
    return logits if len(rows) == len(logits) else logits.index_select(0, to_device(torch.tensor(rows), logits.device))


def _greatest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row [B, V], in no particular order among equals, and their ids.

    Looks for the blocks that hold them first: no more blocks than tokens can.
    """
    size = logits.shape[1] // BLOCK * BLOCK
    columns = size // BLOCK
    if columns <= 2 * count:
        return logits.topk(count, dim=-1)
    # A block is every `columns`-th logit, for so the processor compares many blocks at once.
    blocks = logits[:, :size].unflatten(1, (BLOCK, columns))
    chosen = blocks.amax(dim=1).topk(count, dim=-1, sorted=False).indices
    ids = (torch.arange(0, size, columns, device=logits.device)[:, None] + chosen[:, None]).flatten(1)
    rest = torch.arange(size, logits.shape[1], device=logits.device).expand(len(logits), -1)
    ids = torch.cat([ids, rest], dim=1)
    best, places = logits.gather(1, ids).topk(count, dim=-1, sorted=False)
    return best, ids.gather(1, places)


def _pick(weights: Tensor, uniform: Tensor, ids: Tensor | None) -> Tensor:
    """The token in whose share of the cumulative weights [B, C] the number [B] falls; its place where ids is None."""
    cumulative = weights.cumsum(dim=1)
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    # Past the end only if a logit was not a number; the last candidate rather than a crash of every row.
    place = place.clamp_max(weights.shape[1] - 1)
    return (place if ids is None else ids.gather(1, place))[:, 0]
