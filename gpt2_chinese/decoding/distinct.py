"""Different samples of one request: arithmetic sampling with a limit for what could come twice.

Arithmetic sampling (Vilnis et al., "Arithmetic sampling: parallel diverse decoding for large language models", ICML
2023) gives each of N samples a code, a place on a line on which every text has a length in proportion to its
probability; the codes stand one unit apart, with one random number for all. Each sample finds its text from its code
alone: in a decode step the tokens divide the interval of the tokens so far, and the sample takes the one whose part its
code is in. Every sample has the model's distribution, whatever the others are.

A text longer than a unit would be drawn twice. So the lengths are not N p, but min(1 unit, c p) with the c that makes
the sum N, as in systematic sampling without replacement with unequal probabilities (Madow 1949). Whether a token leads
to such a text is known only where it ends a text. Before that it is estimated: of a token's probability, all but the
share `escape` belongs to its most probable text. The share is what the likeliest tokens have left to the others so far,
step by step, carried on over the tokens to come. So the samples part where the model is least sure, and not at the last
token. Where no estimate exceeds a unit nothing is limited, and each sample has the model's distribution exactly. In any
case an end of a text has at most one unit, so that no two codes can be in it.

An interval of at most one unit holds one code at most: its sample goes on with random numbers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNIT = 1 << 40
"""The distance of two codes. They are integers, so that all samples of a request divide an interval alike."""

END_LIMIT = float(UNIT - 4)
"""The length of an end of a text, at most; the bounds of its interval are rounded."""

MIN_ESCAPE = 1e-15
MAX_ROUNDS = 64

STUCK = -2
"""Instead of a token: no text is left for this sample here."""


@dataclass(frozen=True)
class Codes:
    """The samples of a batch on their ways, [B] each; a row whose `mass` is at most a UNIT draws by itself.

    Attributes:
        code: int64, the place in the interval of the tokens so far.
        mass: int64, its length.
        remaining: int64, tokens that the text may still get, the next one included.
        ends: int64, addresses of int8 [V], which tokens end a text.
        end_tables: the same tables, for NumPy.
        doubt: float64 [B, 2], the sum of what the likeliest tokens have left to the others, and the number of tokens.
        next_code, next_mass: of the tokens that were chosen, written by the draw.
    """

    code: np.ndarray
    mass: np.ndarray
    remaining: np.ndarray
    ends: np.ndarray
    end_tables: list[np.ndarray | None]
    doubt: np.ndarray
    next_code: np.ndarray
    next_mass: np.ndarray


def first_code(random_bits: int, sample: int, samples: int) -> int:
    """The code of a sample: all are a UNIT apart, from a random place on, around the line of `samples` units."""
    whole = samples * UNIT
    return (random_bits % whole + sample * UNIT) % whole


def escape_probability(doubt: np.ndarray, remaining: int) -> float:
    """The estimated probability that not all of `remaining` more tokens are the likeliest ones."""
    escape, mean = 0.0, doubt[0] / doubt[1]
    for _ in range(remaining):
        escape += mean * (1.0 - escape)  # 1 - (1 - mean)^remaining, without its rounding
    return max(MIN_ESCAPE, escape)


def divide(probabilities: np.ndarray, is_end: np.ndarray, mass: int, escape: float) -> np.ndarray:
    """Divide an interval among the tokens.

    Args:
        probabilities: [C], with the sum 1.
        is_end: bool [C], which tokens end a text.
        mass: the length of the interval.
        escape: for the other tokens, what does not belong to their most probable text.

    Returns:
        Lengths [C]. Their sum is the mass, or less if all tokens end a text and are too few.
    """
    escapes = np.where(is_end, 0.0, escape)
    limited = np.zeros(len(probabilities), dtype=bool)
    scale = float(mass)
    for _ in range(MAX_ROUNDS):
        slope = float((probabilities * np.where(limited, escapes, 1.0)).sum())
        if slope <= 0:
            return np.where(probabilities > 0, END_LIMIT, 0.0)
        scale = (mass - END_LIMIT * limited.sum()) / slope
        now = (1.0 - escapes) * scale * probabilities > END_LIMIT
        if (now == limited).all():
            break
        limited = now
    lengths = scale * probabilities
    return np.where(limited, lengths * escapes + END_LIMIT, lengths)


def choose(
    weights: np.ndarray, is_end: np.ndarray, code: int, mass: int, doubt: np.ndarray, remaining: int
) -> tuple[int, int, int]:
    """The candidate whose interval the code is in.

    Args:
        weights: [C], unnormalized probabilities of the candidates.
        is_end: bool [C], which of them end a text.
        code, mass: of the sample.
        doubt: [2], as in Codes; this step is added.
        remaining: tokens that the text may still get, this one included.

    Returns:
        The index of the candidate, or STUCK, and the sample's code and mass after it.
    """
    likeliest = int(weights.argmax())
    others = weights[:likeliest].sum() + weights[likeliest + 1 :].sum()
    probabilities = weights / weights.sum()
    doubt += others / weights.sum(), 1
    if remaining <= 1:
        is_end = np.ones_like(is_end)
    escape = escape_probability(doubt, remaining - 1)
    bounds = np.floor(np.cumsum(divide(probabilities, is_end, mass, escape))).astype(np.int64)
    index = int(np.searchsorted(bounds, code, side="right"))
    if index == len(bounds):
        if bounds[-1] < mass - 64 * len(bounds):
            return STUCK, code, mass
        index = int(np.flatnonzero(probabilities > 0)[-1])  # the sum of the lengths was rounded down
    begin = int(bounds[index - 1]) if index else 0
    end = max(int(bounds[index]), code + 1)
    return index, code - begin, end - begin
