"""From logits to tokens: temperature, top-k, top-p, min-p and seeded sampling, for a batch at once.

The functions take logits [B, V] and one value of each parameter for each of the B sequences. The token of a sequence
depends on its own logits, parameters and random number only, never on the other sequences of the batch.
batch_sampler.py keeps the parameters and the random state of every batch slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2_chinese.compiled import load_function
from gpt2_chinese.decoding import distinct
from gpt2_chinese.decoding.distinct import STUCK, UNIT, Codes
from gpt2_chinese.precision import to_device

# With a top-k below MAX_PARTIAL_TOP_K only the top_k + EXTRA_CANDIDATES greatest logits are sorted, unless ties at the
# k-th need more. They are found by way of the greatest logit of each block of BLOCK_SIZE.
MAX_PARTIAL_TOP_K = 128
EXTRA_CANDIDATES = 8
BLOCK_SIZE = 16
MAX_CANDIDATES = 512
"""Candidates, ties included, that the compiled sampler has room for; PyTorch samples sequences with more."""
KERNEL_MODULE = "gpt2_chinese.decoding.sampling_kernel"
KERNEL_SOURCES = tuple(Path(__file__).with_name(f"{name}.py") for name in ("sampling", "sampling_kernel", "distinct"))


# The sampling parameters.


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """The logits over the temperature [B], shifted so that the greatest of a sequence is 0 and nothing overflows."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted / temperature.to(logits.dtype).clamp_min(torch.finfo(logits.dtype).tiny)[:, None]


def top_k_top_p_mask(
    sorted_logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which candidates pass top-k, then top-p on what top-k leaves, then min-p.

    Top-k keeps every logit that is not below the k-th, so all ties with it stay. Top-p keeps a token while the
    probability of those before it is not above `top_p`, so the first one always stays. Min-p keeps a token whose
    probability is at least that share of the greatest one.

    Args:
        sorted_logits: [B, C], descending.
        top_k: [B] integers; 0 is off.
        top_p: [B]; 0 and everything from 1 on is off.
        min_p: [B]; 0 is off, as None.

    Returns:
        The mask [B, C] of those that stay and their unnormalized probabilities [B, C] in float64, 0 for the others.
    """
    candidates = sorted_logits.shape[1]
    kth = torch.where(top_k > 0, top_k, candidates).clamp_max(candidates) - 1
    keep = sorted_logits >= sorted_logits.gather(1, kth[:, None])
    # float64 hides the order of the summation, which may change with the shape of the batch.
    weights = (sorted_logits.double() - sorted_logits[:, :1].double()).exp() * keep
    cumulative = weights.cumsum(dim=1)
    limit = torch.where((top_p > 0) & (top_p < 1), top_p.double(), torch.inf)
    keep[:, 1:] &= cumulative[:, :-1] <= limit[:, None] * cumulative[:, -1:]
    if min_p is not None:
        keep &= weights >= min_p.double()[:, None]
    return keep, weights * keep


def apply_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The logits [B, V] with -inf for what top-k [B] and top-p [B] remove; of equal logits the first ones stay."""
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    keep, _ = top_k_top_p_mask(sorted_logits, top_k, top_p)
    return logits.masked_fill(~torch.zeros_like(keep).scatter(1, order, keep), -torch.inf)


# Random numbers.

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's increment of the state: 2^64 over the golden ratio, odd."""


def splitmix64(seeds: Sequence[int] | np.ndarray, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Output number `indices` [B] of SplitMix64 generators that start at `seeds` [B], both of 64 bits: uint64 [B].

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the mixing function
    is that of Java's SplittableRandom. Its state is seed + index * GOLDEN_GAMMA, so no state has to be kept.
    """
    z = np.asarray(seeds, dtype=np.uint64) + np.asarray(indices, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sequence_seed(seed: int, sample: int) -> int:
    """The seed of one sample of a request: another one for each sample, whatever the number of samples."""
    mixed = splitmix64([seed % 2**64], [0])
    return int(splitmix64(mixed, [sample + 1])[0])


def request_bits(seed: int) -> int:
    """64 random bits that all samples of a request share; those of `sequence_seed` are others."""
    mixed = splitmix64([seed % 2**64], [0])
    return int(splitmix64(mixed, [0])[0])


def uniform_random(seeds: Sequence[int] | np.ndarray, indices: Sequence[int] | np.ndarray) -> Tensor:
    """A random number above 0 and below 1 for each sequence, from its seed and the index of its token: float64 [B].

    The generator is counter-based, so a sequence may be admitted, released or moved without a change of its numbers.
    They have 48 bits, so that a number times a sum is never rounded up to the sum.
    """
    bits = splitmix64(seeds, indices) >> np.uint64(16)
    return torch.from_numpy((bits.astype(np.float64) + 0.5) / 2.0**48)


# Sampling.


@cache
def load_sampling_kernel() -> Callable[..., None]:
    """The compiled code; see sampling_kernel.sample_batch for its arguments."""
    # It keeps Python's global lock, since getting that back may take longer than the sampling.
    return load_function(KERNEL_MODULE, KERNEL_SOURCES, arguments=21)


class SlotArrays(NamedTuple):
    """The addresses of what a draw needs of all slots of a batch, each with an element for a slot (`doubt`: two)."""

    uniform: int  # float64
    temperature: int  # float32
    top_k: int  # int64
    top_p: int  # float32
    min_p: int  # float32
    mass: int  # these and the following as in Codes
    code: int
    remaining: int
    ends: int
    doubt: int
    next_code: int
    next_mass: int

    def of(self, slot: int) -> tuple[int, ...]:
        """The addresses of the elements of a slot."""
        return tuple(address + slot * size for address, size in zip(self, SLOT_ELEMENT_SIZES, strict=True))


SLOT_ELEMENT_SIZES = SlotArrays(8, 4, 8, 4, 4, 8, 8, 8, 8, 16, 8, 8)
"""Bytes between two slots in each array."""


class CompiledSampler:
    """Compiled sampling on the CPU, for temperature 0 and for a top-k from 1 to MAX_PARTIAL_TOP_K - 1.

    A call takes the arguments of `sample_tokens` and returns the tokens [B], NOT_SAMPLED for a sequence left to
    PyTorch: the place to leave those with a new parameter that sampling_kernel.py does not know.
    """

    def __init__(self, vocab_size: int) -> None:
        self._function = load_sampling_kernel()
        # Scratch memory for one sequence: the maxima of its blocks; the candidates' ids, logits and weights.
        scratch = (
            np.empty(vocab_size, np.float32),
            np.empty(MAX_CANDIDATES, np.int64),
            np.empty(MAX_CANDIDATES, np.float32),
            np.empty(MAX_CANDIDATES, np.float64),
        )
        self._vocab_size, self._scratch = vocab_size, scratch
        self._addresses = [array.ctypes.data for array in scratch]

    def __call__(
        self,
        logits: Tensor,
        uniform: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor | None = None,
        codes: Codes | None = None,
    ) -> Tensor:
        batch = len(logits)
        min_p = torch.zeros(batch) if min_p is None else min_p
        inputs = (logits, uniform, temperature, top_k, top_p, min_p)
        dtypes = (torch.float32, torch.float64, torch.float32, torch.int64, torch.float32, torch.float32)
        assert logits.shape == (batch, self._vocab_size)
        assert all(part.is_contiguous() and part.dtype == dtype for part, dtype in zip(inputs, dtypes, strict=True))
        addresses = [part.data_ptr() for part in inputs[1:]]
        if codes is None:
            addresses += [0] * 7
        else:
            arrays = (
                codes.mass,
                codes.code,
                codes.remaining,
                codes.ends,
                codes.doubt,
                codes.next_code,
                codes.next_mass,
            )
            assert all(array.flags.c_contiguous for array in arrays)
            addresses += [array.ctypes.data for array in arrays]
        return torch.from_numpy(self._sample(logits, addresses, has_codes=codes is not None))

    def sample_slots(self, logits: Tensor, first_slot: int, arrays: SlotArrays, *, has_codes: bool) -> np.ndarray:
        """The same for slots that follow each other, from `first_slot` on; the numbers stay where they are."""
        return self._sample(logits, arrays.of(first_slot), has_codes=has_codes)

    def _sample(self, logits: Tensor, addresses: Sequence[int], *, has_codes: bool) -> np.ndarray:
        tokens = np.empty(len(logits), dtype=np.int64)
        parameters, codes = addresses[:5], addresses[5:]
        self._function(
            logits.data_ptr(),
            self._vocab_size,
            len(tokens),
            *parameters,
            int(has_codes),
            *codes,
            tokens.ctypes.data,
            *self._addresses,
        )
        return tokens


NOT_SAMPLED = -1
"""A token that the compiled sampler, or sampling among the greatest logits, has left to another method."""


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor | None = None,
    *,
    codes: Codes | None = None,
    compiled: CompiledSampler | None = None,
) -> Tensor:
    """Sample one token for each sequence: the greatest logit at temperature 0, else one of what the filters keep.

    This is inverse transform sampling from one uniform number: the candidates are in descending order (equal ones by
    their id; in the order of the vocabulary where no filter is on), and the first one is taken whose cumulative
    probability is above the number.

    The parameters and the numbers are on the CPU wherever the logits are, so that the choice of a method for each
    sequence needs no synchronization with a GPU; there is one, for the tokens.

    Args:
        logits: [B, V], on any device; -inf for what must not be sampled.
        uniform: [B] in (0, 1), see `uniform_random`.
        temperature: [B], 0 or more.
        top_k: [B] integers; 0 is off.
        top_p: [B]; 0 and everything from 1 on is off.
        min_p: [B]; 0 is off, as None.
        codes: of sequences that take their tokens by distinct.py; their next codes are written there.
        compiled: samples the sequences that it can; the tokens are the same.

    Returns:
        Token ids [B], int64, on the CPU; STUCK where nothing is left for a sequence with a code.
    """
    min_p = torch.zeros(len(logits)) if min_p is None else min_p
    if compiled is not None:
        tokens = compiled(logits, uniform, temperature, top_k, top_p, min_p, codes)
        sample_rest(tokens.numpy(), logits, uniform, temperature, top_k, top_p, min_p, codes=codes)
        return tokens
    has_code = torch.zeros(len(logits), dtype=torch.bool)
    if codes is not None:
        has_code = torch.from_numpy(codes.mass > UNIT) & (temperature > 0)
    is_random = (temperature > 0) & ~has_code
    has_filter = ((top_p > 0) & (top_p < 1)) | (min_p > 0)
    is_partial = is_random & (top_k > 0) & (top_k < min(MAX_PARTIAL_TOP_K, logits.shape[1]))
    is_sorted = is_random & ~is_partial & ((top_k > 0) | has_filter)
    is_unfiltered = is_random & ~is_partial & ~is_sorted

    def sample_rows(method: Callable[..., Tensor], rows: list[int]) -> Tensor:
        parameters = (to_device(part[rows], logits.device) for part in (uniform, temperature, top_k, top_p, min_p))
        return method(_select_rows(logits, rows), *parameters)

    # As many candidates for all as the greatest top_k needs; more candidates do not change a token.
    num_candidates = min(int((top_k * is_partial).max()) + EXTRA_CANDIDATES, logits.shape[1])
    methods: list[tuple[Tensor, Callable[..., Tensor]]] = [
        (~is_random & ~has_code, _sample_greedy),
        (is_partial, partial(_sample_from_top_k, num_candidates=num_candidates)),
        (is_sorted, _sample_from_sorted),
        (is_unfiltered, _sample_from_all),
    ]
    groups = [
        (rows, sample_rows(method, rows)) for mask, method in methods if (rows := mask.nonzero().flatten().tolist())
    ]
    tokens = torch.empty(len(logits), dtype=torch.int64)
    if groups:  # .cpu() synchronizes with a GPU
        tokens[[row for rows, _ in groups for row in rows]] = torch.cat([part for _, part in groups]).cpu()
    if rows := ((tokens == NOT_SAMPLED) & ~has_code).nonzero().flatten().tolist():
        tokens[rows] = sample_rows(_sample_from_sorted, rows).cpu()
    if codes is not None and (rows := has_code.nonzero().flatten().tolist()):
        parameters = (to_device(part[rows], logits.device) for part in (temperature, top_k, top_p, min_p))
        tokens[rows] = _choose_by_codes(codes, rows, _select_rows(logits, rows), *parameters)
    return tokens


def sample_rest(tokens: np.ndarray, logits: Tensor, *parameters: Tensor, codes: Codes | None) -> None:
    """Replace those of the tokens [B] that are NOT_SAMPLED; the other arguments are those of `sample_tokens`."""
    rows = np.flatnonzero(tokens == NOT_SAMPLED).tolist()
    if not rows:
        return
    part_of_codes = None if codes is None else select_codes(codes, rows)
    rest = (part[rows] for part in parameters)
    tokens[rows] = sample_tokens(_select_rows(logits, rows), *rest, codes=part_of_codes).numpy()
    if codes is not None and part_of_codes is not None:
        for name in ("doubt", "next_code", "next_mass"):
            getattr(codes, name)[rows] = getattr(part_of_codes, name)


def select_codes(codes: Codes, rows: list[int]) -> Codes:
    """Copies of some rows; what a draw writes into them must be copied back."""
    fields = {name: part[rows] for name, part in vars(codes).items() if isinstance(part, np.ndarray)}
    return Codes(**fields, end_tables=[codes.end_tables[row] for row in rows])


def _choose_by_codes(
    codes: Codes, rows: list[int], logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The tokens of sequences with codes, see distinct.py."""
    best, ids = apply_temperature(logits, temperature).sort(dim=-1, descending=True, stable=True)
    _, weights = top_k_top_p_mask(best, top_k, top_p, min_p)
    tokens = np.full(len(rows), STUCK, dtype=np.int64)
    for index, row in enumerate(rows):
        kept = weights[index].nonzero().flatten()
        if not len(kept) or not bool(torch.isfinite(weights[index]).all()):
            continue
        candidates = ids[index, kept].cpu().numpy()
        table = codes.end_tables[row]
        is_end = np.zeros(len(candidates), dtype=bool) if table is None else table[candidates] > 0
        chosen, codes.next_code[row], codes.next_mass[row] = distinct.choose(
            weights[index, kept].cpu().numpy(),
            is_end,
            int(codes.code[row]),
            int(codes.mass[row]),
            codes.doubt[row],
            int(codes.remaining[row]),
        )
        if chosen != STUCK:
            tokens[index] = candidates[chosen]
    return torch.from_numpy(tokens)


def _sample_greedy(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _sample_from_top_k(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    num_candidates: int,
) -> Tensor:
    """Sample with top-k from the greatest logits; NOT_SAMPLED where these may not be all that top-k keeps."""
    # The temperature keeps the order, so only the candidates need it. Logits that it makes equal are ties, see below.
    best, ids = _greatest(logits, num_candidates)
    best = apply_temperature(best, temperature)
    # topk promises no order among equal logits: sort by id first, then stably by logit.
    ids, by_id = ids.sort(dim=-1)
    best, by_logit = best.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    _, weights = top_k_top_p_mask(best, top_k, top_p, min_p)
    tokens = _sample_from_weights(weights, uniform, ids.gather(1, by_logit))
    # If ties with the k-th logit reach the last candidate, there may be more of them: such rows are sorted as a whole.
    kth = best.gather(1, top_k[:, None] - 1)[:, 0]
    return tokens.masked_fill((best[:, -1] == kth) & kth.isfinite(), NOT_SAMPLED)


def _sample_from_sorted(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    best, ids = apply_temperature(logits, temperature).sort(dim=-1, descending=True, stable=True)
    _, weights = top_k_top_p_mask(best, top_k, top_p, min_p)
    return _sample_from_weights(weights, uniform, ids)


def _sample_from_all(logits: Tensor, uniform: Tensor, temperature: Tensor, *_: Tensor) -> Tensor:
    return _sample_from_weights(apply_temperature(logits, temperature).double().exp(), uniform, None)


def _select_rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Some rows, in ascending order; no copy where they are all."""
    return logits if len(rows) == len(logits) else logits.index_select(0, to_device(torch.tensor(rows), logits.device))


def _greatest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row [B, V] and their ids, equal ones in any order.

    The greatest logits are in the `count` blocks of the greatest maxima, so `topk` need not search all of a row.
    """
    size = logits.shape[1] // BLOCK_SIZE * BLOCK_SIZE
    num_blocks = size // BLOCK_SIZE
    if num_blocks <= 2 * count:
        return logits.topk(count, dim=-1)
    # A block is every `num_blocks`-th logit, so that many blocks are compared by one vector instruction.
    blocks = logits[:, :size].unflatten(1, (BLOCK_SIZE, num_blocks))
    chosen = blocks.amax(dim=1).topk(count, dim=-1, sorted=False).indices
    ids = (torch.arange(0, size, num_blocks, device=logits.device)[:, None] + chosen[:, None]).flatten(1)
    rest = torch.arange(size, logits.shape[1], device=logits.device).expand(len(logits), -1)
    ids = torch.cat([ids, rest], dim=1)
    best, indices = logits.gather(1, ids).topk(count, dim=-1, sorted=False)
    return best, ids.gather(1, indices)


def _sample_from_weights(weights: Tensor, uniform: Tensor, ids: Tensor | None) -> Tensor:
    """Inverse transform sampling from unnormalized probabilities [B, C] of tokens `ids` [B, C], or of 0 to C - 1."""
    cumulative = weights.cumsum(dim=1)
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    # Only NaN logits lead past the end; the last candidate then, rather than an error for the whole batch.
    index = index.clamp_max(weights.shape[1] - 1)
    return (index if ids is None else ids.gather(1, index))[:, 0]
