"""The compiled part of sampling.py: sampling with a small top-k, and greedy decoding, one sequence after the other.

Importing this module imports Numba; sampling.py does so only where the machine code is not cached yet. The numbers are
those of `sampling._sample_from_top_k`, which needs some forty PyTorch operations: for a small model they take longer
than the model, and each of them releases Python's global lock.
"""

# mypy: allow-untyped-defs
# Numba infers the types of the compiled functions from their calls.

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, njit, types

from gpt2_chinese.decoding.decoder_kernel import int8_at
from gpt2_chinese.decoding.distinct import END_LIMIT, MAX_ROUNDS, MIN_ESCAPE, STUCK, UNIT
from gpt2_chinese.decoding.sampling import BLOCK_SIZE, MAX_CANDIDATES, MAX_PARTIAL_TOP_K, NOT_SAMPLED

MAX_DISTANCE = np.float32(1e30)  # below the greatest logit; no candidate is so far below it
MAX_BISECTIONS = 24
INVERSE_OF_LN_2 = 1.4426950408889634
LN_2_HIGH, LN_2_LOW = (
    6.93147180369123816490e-01,
    1.90821492927058770002e-10,
)  # their sum; multiples of the first are exact
# Coefficients of exp's Taylor series, the highest power first; the remainder is below half a unit in the last place.
TAYLOR_COEFFICIENTS = tuple(1 / math.factorial(power) for power in range(14, -1, -1))

compiled = njit(error_model="numpy")


@compiled
def exp(x):
    """e to the power of x, for x up to 0, in float64 to some units in the last place."""
    if not x > -708.0:
        return 0.0
    power = np.int64(0.5 - x * INVERSE_OF_LN_2)  # of one half
    rest = x + power * LN_2_HIGH + power * LN_2_LOW
    series = 0.0
    for coefficient in TAYLOR_COEFFICIENTS:
        series = series * rest + coefficient
    half = 0.5
    while power:
        if power & 1:
            series *= half
        half *= half
        power >>= 1
    return series


@compiled
def apply_temperature(logit, greatest, temperature):
    """As sampling.apply_temperature, in float32."""
    return (logit - greatest) / max(temperature, np.float32(1.1754943508222875e-38))


@compiled
def block_maxima(logits, num_blocks, maxima):
    """The maximum of each block of logits.

    A block is every `num_blocks`-th logit, BLOCK_SIZE in all, so that one vector instruction compares many blocks.
    """
    for block in range(num_blocks):
        maxima[block] = logits[block]
    for part in range(1, BLOCK_SIZE):
        for block in range(num_blocks):
            logit = logits[part * num_blocks + block]
            maxima[block] = logit if logit > maxima[block] else maxima[block]


@compiled
def maximum(values, begin, end, greatest):
    """The maximum of `greatest` and the values from `begin` to `end`."""
    for index in range(begin, end):
        if values[index] > greatest:
            greatest = values[index]
    return greatest


@compiled
def count_at_least(values, size, threshold):
    count = 0
    for index in range(size):
        count += values[index] >= threshold
    return count


@compiled
def find_threshold(values, size, wanted, greatest):
    """A threshold that `wanted` of the values, or not many more, reach; -inf if none is found."""
    distance = np.float32(1)
    low, high = greatest - distance, greatest
    count = count_at_least(values, size, low)
    while count < wanted:
        if distance > MAX_DISTANCE:
            return np.float32(-np.inf)
        distance *= np.float32(2)
        low, high = greatest - distance, low
        count = count_at_least(values, size, low)
    for _ in range(MAX_BISECTIONS):
        if count <= wanted + wanted // 2 + 4:
            break
        middle = low + (high - low) * np.float32(0.5)
        count_of_middle = count_at_least(values, size, middle)
        if count_of_middle >= wanted:
            low, count = middle, count_of_middle
        else:
            high = middle
    return low


@compiled
def first_index(logits, vocab_size, value):
    """The least id with this logit; NOT_SAMPLED if there is none, since all logits are NaN."""
    for index in range(vocab_size):
        if logits[index] == value:
            return index
    return NOT_SAMPLED


@compiled
def insert_candidate(logits, index, greatest, temperature, threshold, ids, candidates, count):
    """Insert a token that reaches the threshold into the sorted candidates: descending, equal ones by their id.

    Returns:
        The number of candidates; more than MAX_CANDIDATES if there is no room.
    """
    if not (logits[index] >= threshold and logits[index] > -np.inf):
        return count
    if count >= MAX_CANDIDATES:
        return MAX_CANDIDATES + 1
    logit = apply_temperature(logits[index], greatest, temperature)
    rank = count
    while rank and (candidates[rank - 1] < logit or (candidates[rank - 1] == logit and ids[rank - 1] > index)):
        candidates[rank], ids[rank] = candidates[rank - 1], ids[rank - 1]
        rank -= 1
    candidates[rank], ids[rank] = logit, index
    return count + 1


@compiled
def find_candidates(logits, vocab_size, greatest, temperature, top_k, maxima, ids, candidates):
    """Find what top-k keeps, sorted; returns the number of candidates, NOT_SAMPLED if there is no room for them."""
    num_blocks = vocab_size // BLOCK_SIZE
    if num_blocks >= top_k:
        threshold = find_threshold(maxima, num_blocks, top_k, greatest)
    else:
        threshold = find_threshold(logits, vocab_size, top_k, greatest)
    # A logit that is below it by less than the rounding may become equal when it is divided by the temperature.
    threshold -= (greatest - threshold) * np.float32(2**-20)
    count = 0
    for block in range(num_blocks):
        if maxima[block] >= threshold:
            for part in range(BLOCK_SIZE):
                index = part * num_blocks + block
                count = insert_candidate(logits, index, greatest, temperature, threshold, ids, candidates, count)
    for index in range(BLOCK_SIZE * num_blocks, vocab_size):
        count = insert_candidate(logits, index, greatest, temperature, threshold, ids, candidates, count)
    if count > MAX_CANDIDATES:
        return NOT_SAMPLED
    while count > top_k and candidates[count - 1] < candidates[top_k - 1]:
        count -= 1
    while count > 1 and candidates[count - 1] == -np.inf:
        count -= 1
    return count


@compiled
def filter_candidates(candidates, weights, count, top_p, min_p):
    """Top-p, then min-p, as sampling.top_k_top_p_mask; returns how many stay and the sum of their weights."""
    total = 0.0
    for rank in range(count):
        weights[rank] = exp(np.float64(candidates[rank]))
        total += weights[rank]
    kept, kept_total = count, total
    if 0 < top_p < 1:
        limit = np.float64(top_p) * total
        kept, kept_total = 1, weights[0]
        while kept < count and kept_total <= limit:
            kept_total += weights[kept]
            kept += 1
    if min_p > 0:
        few, few_total = 1, weights[0]
        while few < kept and weights[few] >= min_p:
            few_total += weights[few]
            few += 1
        kept, kept_total = few, few_total
    return kept, kept_total


@compiled
def sample_from_candidates(ids, weights, count, total, uniform):
    """Inverse transform sampling."""
    target = uniform * total
    cumulative = 0.0
    for rank in range(count):
        cumulative += weights[rank]
        if cumulative > target:
            return ids[rank]
    return ids[count - 1]


@compiled
def is_limited(probability, escape, scale):
    return (1.0 - escape) * scale * probability > END_LIMIT


@compiled
def choose_by_code(ids, weights, count, total, code, mass, remaining, ends, doubt, next_code, next_mass):
    """A token by the code of a sequence, as distinct.choose; each of the last three arguments is an array of its own.

    `ends` tells by token whether it ends a text.
    """
    others = 0.0
    for rank in range(count):
        weights[rank] /= total
        if rank:
            others += weights[rank]
    doubt[0] += others
    doubt[1] += 1
    mean, escape = doubt[0] / doubt[1], 0.0
    for _ in range(remaining - 1):
        escape += mean * (1.0 - escape)
    escape = max(MIN_ESCAPE, escape)
    scale = np.float64(mass)
    limited_before = 0
    exhausted = False
    for _ in range(MAX_ROUNDS):
        limited, slope = 0, 0.0
        for rank in range(count):
            own = 0.0 if remaining <= 1 or ends[ids[rank]] else escape
            if limited_before and is_limited(weights[rank], own, scale):
                limited += 1
                slope += weights[rank] * own
            else:
                slope += weights[rank]
        if slope <= 0:
            exhausted = True
            break
        scale = (mass - END_LIMIT * limited) / slope
        now = 0
        for rank in range(count):
            own = 0.0 if remaining <= 1 or ends[ids[rank]] else escape
            now += is_limited(weights[rank], own, scale)
        if now == limited:
            break
        limited_before = now
    cumulative = 0.0
    begin = np.int64(0)
    for rank in range(count):
        own = 0.0 if remaining <= 1 or ends[ids[rank]] else escape
        length = scale * weights[rank]
        if exhausted:
            length = END_LIMIT if weights[rank] > 0 else 0.0
        elif is_limited(weights[rank], own, scale):
            length = length * own + END_LIMIT
        cumulative += length
        end = np.int64(cumulative)
        if code < end or (rank == count - 1 and not cumulative < mass - 64.0 * count):
            next_code[0] = code - begin
            next_mass[0] = max(end, code + 1) - begin
            return ids[rank]
        begin = end
    return STUCK


@compiled
def sample_sequence(
    logits, vocab_size, uniform, temperature, top_k, top_p, min_p, has_code, code, mass, remaining, ends, doubt,
    next_code, next_mass, maxima, ids, candidates, weights,
):  # fmt: skip
    """A token for one sequence, or NOT_SAMPLED; STUCK if nothing is left."""
    if temperature > 0 and not 0 < top_k < min(MAX_PARTIAL_TOP_K, vocab_size):
        return NOT_SAMPLED
    num_blocks = vocab_size // BLOCK_SIZE
    if num_blocks:
        block_maxima(logits, num_blocks, maxima)
    greatest = maximum(maxima, 0, num_blocks, np.float32(-np.inf))
    greatest = maximum(logits, BLOCK_SIZE * num_blocks, vocab_size, greatest)
    if greatest == -np.inf and logits[0] == -np.inf:  # it is also -inf where all logits are NaN
        return STUCK
    if not temperature > 0:
        return first_index(logits, vocab_size, greatest)
    if not -np.inf < greatest < np.inf:
        return NOT_SAMPLED
    count = find_candidates(logits, vocab_size, greatest, temperature, top_k, maxima, ids, candidates)
    if count == NOT_SAMPLED:
        return NOT_SAMPLED
    count, total = filter_candidates(candidates, weights, count, top_p, min_p)
    if has_code:
        return choose_by_code(ids, weights, count, total, code, mass, remaining, ends, doubt, next_code, next_mass)
    return sample_from_candidates(ids, weights, count, total, uniform)


def sample_batch(
    logits, vocab_size, batch, uniform, temperature, top_k, top_p, min_p, has_codes, mass, code, remaining, ends,
    doubt, next_code, next_mass, tokens, maxima, ids, candidates, weights,
):  # fmt: skip
    """A token for each row of logits [batch, vocab_size], or NOT_SAMPLED; see sampling.sample_tokens.

    All but `vocab_size`, `batch` and `has_codes` are addresses; those from `mass` to `next_mass` are 0 where no
    sequence has a code, and the last four are those of CompiledSampler's scratch memory.
    """
    results = carray(tokens, batch)
    for row in range(batch):
        row_logits = carray(logits, batch * vocab_size)[row * vocab_size : (row + 1) * vocab_size]
        has_code = has_codes != 0 and mass[row] > UNIT
        place = row if has_code else 0
        results[row] = sample_sequence(
            row_logits,
            vocab_size,
            uniform[row],
            temperature[row],
            top_k[row],
            top_p[row],
            min_p[row],
            has_code,
            code[row] if has_code else 0,
            mass[row] if has_code else 0,
            remaining[row] if has_code else 0,
            carray(int8_at(ends[row] if has_code else 0), vocab_size),
            carray(doubt, 2 * place + 2)[2 * place :],
            carray(next_code, place + 1)[place:],
            carray(next_mass, place + 1)[place:],
            carray(maxima, vocab_size),
            carray(ids, MAX_CANDIDATES),
            carray(candidates, MAX_CANDIDATES),
            carray(weights, MAX_CANDIDATES),
        )


def compile_entry():
    """Compile sample_batch; compiled.py caches the machine code."""
    float32, float64, int64 = (types.CPointer(kind) for kind in (types.float32, types.float64, types.int64))
    size = types.int64
    inputs = (float32, size, size, float64, float32, int64, float32, float32)
    codes = (size, int64, int64, int64, int64, float64, int64, int64)
    arguments = (*inputs, *codes, int64, float32, int64, float32, float64)
    return cfunc(types.void(*arguments), error_model="numpy")(sample_batch)
