"""The compiled part of sampling.py: the draw with a small top-k, and the greatest logit, row by row.

Importing this module imports Numba; sampling.py does so only where the machine code is not on disk yet. It does, number
for number, what `sampling._draw_of_few` does in PyTorch, which needs some forty operations for it: for a small model
they take longer than the model, and each of them asks for Python's lock.
"""

# mypy: allow-untyped-defs
# Numba finds the types of the compiled functions from their calls.

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, njit, types

from gpt2_chinese.decoding.sampling import BLOCK, FEW, MAX_CANDIDATES

LEFT = -1  # a row that PyTorch is to draw
MOST_STEP = np.float32(1e30)  # below the greatest logit; nothing so far down is ever drawn
HALVINGS = 24
INVERSE_OF_LN_2 = 1.4426950408889634
LN_2_HIGH, LN_2_LOW = (
    6.93147180369123816490e-01,
    1.90821492927058770002e-10,
)  # their sum; multiples of the first are exact
# Of Taylor's series, the smallest first; what is left out is below half a unit in the last place.
FACTORS = tuple(1 / math.factorial(power) for power in range(14, -1, -1))

compiled = njit(error_model="numpy")


@compiled
def exponential(x):
    """e to the power of x, which is 0 or below, in float64 to some units in the last place."""
    if not x > -708.0:
        return 0.0
    power = np.int64(0.5 - x * INVERSE_OF_LN_2)  # of one half
    rest = x + power * LN_2_HIGH + power * LN_2_LOW
    series = 0.0
    for factor in FACTORS:
        series = series * rest + factor
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
def greatest_of_blocks(logits, columns, maxima):
    """A block is every `columns`-th logit, BLOCK of them, for so the processor compares many blocks at once."""
    for column in range(columns):
        maxima[column] = logits[column]
    for part in range(1, BLOCK):
        for column in range(columns):
            logit = logits[part * columns + column]
            maxima[column] = logit if logit > maxima[column] else maxima[column]


@compiled
def greatest_of(numbers, first, last, greatest):
    for index in range(first, last):
        if numbers[index] > greatest:
            greatest = numbers[index]
    return greatest


@compiled
def count_from(numbers, size, threshold):
    count = 0
    for index in range(size):
        count += numbers[index] >= threshold
    return count


@compiled
def threshold_for(numbers, size, wanted, greatest):
    """A number that `wanted` of the numbers, or not many more, are not below; -inf if it is not found."""
    step = np.float32(1)
    low, high = greatest - step, greatest
    count = count_from(numbers, size, low)
    while count < wanted:
        if step > MOST_STEP:
            return np.float32(-np.inf)
        step *= np.float32(2)
        low, high = greatest - step, low
        count = count_from(numbers, size, low)
    for _ in range(HALVINGS):
        if count <= wanted + wanted // 2 + 4:
            break
        middle = low + (high - low) * np.float32(0.5)
        at_middle = count_from(numbers, size, middle)
        if at_middle >= wanted:
            low, count = middle, at_middle
        else:
            high = middle
    return low


@compiled
def first_of(logits, vocab_size, wanted):
    """The least id with this logit; LEFT if there is none, for no logit is a number."""
    for index in range(vocab_size):
        if logits[index] == wanted:
            return index
    return LEFT


@compiled
def consider(logits, index, greatest, temperature, threshold, ids, ranked, count):
    """Put a token that is not below the threshold among the candidates, greatest first, equal ones by their id.

    Returns:
        The number of candidates; more than MAX_CANDIDATES where there is no room.
    """
    if not (logits[index] >= threshold and logits[index] > -np.inf):
        return count
    if count >= MAX_CANDIDATES:
        return MAX_CANDIDATES + 1
    logit = apply_temperature(logits[index], greatest, temperature)
    place = count
    while place and (ranked[place - 1] < logit or (ranked[place - 1] == logit and ids[place - 1] > index)):
        ranked[place], ids[place] = ranked[place - 1], ids[place - 1]
        place -= 1
    ranked[place], ids[place] = logit, index
    return count + 1


@compiled
def draw_row(logits, vocab_size, uniform, temperature, top_k, top_p, maxima, ids, ranked, weights):
    if temperature > 0 and not 0 < top_k < min(FEW, vocab_size):
        return LEFT
    columns = vocab_size // BLOCK
    if columns:
        greatest_of_blocks(logits, columns, maxima)
    greatest = greatest_of(maxima, 0, columns, np.float32(-np.inf))
    greatest = greatest_of(logits, BLOCK * columns, vocab_size, greatest)
    if not temperature > 0:
        return first_of(logits, vocab_size, greatest)
    if not -np.inf < greatest < np.inf:
        return LEFT
    if columns >= top_k:
        threshold = threshold_for(maxima, columns, top_k, greatest)
    else:
        threshold = threshold_for(logits, vocab_size, top_k, greatest)
    # What is below it by less than rounding may be equal to it over the temperature.
    threshold -= (greatest - threshold) * np.float32(2**-20)
    count = 0
    for column in range(columns):
        if maxima[column] >= threshold:
            for part in range(BLOCK):
                index = part * columns + column
                count = consider(logits, index, greatest, temperature, threshold, ids, ranked, count)
    for index in range(BLOCK * columns, vocab_size):
        count = consider(logits, index, greatest, temperature, threshold, ids, ranked, count)
    if count > MAX_CANDIDATES:
        return LEFT
    while count > top_k and ranked[count - 1] < ranked[top_k - 1]:
        count -= 1
    while count > 1 and ranked[count - 1] == -np.inf:
        count -= 1
    return pick(ids, ranked, weights, count, uniform, top_p)


@compiled
def pick(ids, ranked, weights, count, uniform, top_p):
    """Top-p on the candidates, as sampling.top_k_top_p_mask, and the token in whose share the number falls."""
    total = 0.0
    for place in range(count):
        weights[place] = exponential(np.float64(ranked[place]))
        total += weights[place]
    kept_total = total
    if 0 < top_p < 1:
        limit = np.float64(top_p) * total
        kept_total = weights[0]
        for place in range(1, count):
            if kept_total > limit:
                break
            kept_total += weights[place]
    wanted = uniform * kept_total
    cumulative = 0.0
    for place in range(count):
        cumulative += weights[place]
        if cumulative > wanted:
            return ids[place]
    return ids[count - 1]


def draw_few(logits, vocab_size, rows, uniform, temperature, top_k, top_p, tokens, maxima, ids, ranked, weights):
    """A token for each row of logits [rows, vocab_size], LEFT for one with other settings; see sampling.draw."""
    tokens_there = carray(tokens, rows)
    for row in range(rows):
        row_logits = carray(logits, rows * vocab_size)[row * vocab_size : (row + 1) * vocab_size]
        tokens_there[row] = draw_row(
            row_logits,
            vocab_size,
            uniform[row],
            temperature[row],
            top_k[row],
            top_p[row],
            carray(maxima, vocab_size),
            carray(ids, MAX_CANDIDATES),
            carray(ranked, MAX_CANDIDATES),
            carray(weights, MAX_CANDIDATES),
        )


def compile_entry():
    """Compile draw_few; compiled.py keeps the machine code."""
    float32, float64, int64 = (types.CPointer(kind) for kind in (types.float32, types.float64, types.int64))
    size = types.int64
    given = (float32, size, size, float64, float32, int64, float32)
    arguments = (*given, int64, float32, int64, float32, float64)
    return cfunc(types.void(*arguments), error_model="numpy")(draw_few)
