"""Kneser-Ney smoothing straight from the formula, for documents of a few symbols."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

BEGIN, END = "<begin>", "<end>"


class BruteForce:
    """Modified Kneser-Ney, one probability after the other, from counts of tuples in dictionaries.

    Args:
        documents: their symbols, characters or tokens, without those that begin and end one.
        outcomes: of the uniform distribution below the order 1.
    """

    def __init__(self, documents: Sequence[Sequence[Any]], order: int, *, outcomes: int = 0x110000 + 1) -> None:
        self.outcomes = outcomes
        self.counts: dict[int, Counter] = {}
        raw = {n: Counter() for n in range(1, order + 1)}
        before = {n: defaultdict(set) for n in range(1, order + 1)}
        for text in documents:
            symbols = [BEGIN, *text, END]
            for n in range(1, order + 1):
                for start in range(len(symbols) - n + 1):
                    gram = tuple(symbols[start : start + n])
                    raw[n][gram] += 1
                    if start:
                        before[n][gram].add(symbols[start - 1])
        for n in range(1, order + 1):
            self.counts[n] = Counter()
            for gram, count in raw[n].items():
                if gram != (BEGIN,):
                    self.counts[n][gram] = count if n == order or gram[0] == BEGIN else len(before[n][gram])
        self.discounts = {n: self._discounts(list(self.counts[n].values())) for n in self.counts}

    @staticmethod
    def _discounts(counts: list[int]) -> list[float]:
        n = [0, *(sum(count == wanted for count in counts) for wanted in (1, 2, 3, 4))]
        if min(n[1:4]) > 0:
            y = n[1] / (n[1] + 2 * n[2])
            found = [0.0, *(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))]
            if all(0 < found[k] < k for k in (1, 2, 3)):
                return found
        return [0.0, 0.5, 1.0, 1.5]

    def probability(self, context: tuple[Any, ...], symbol: Any) -> float:
        n = len(context) + 1
        lower = self.probability(context[1:], symbol) if context else 1 / self.outcomes
        seen = {gram: count for gram, count in self.counts[n].items() if gram[:-1] == context}
        if not seen:
            return lower
        discounted = {gram: self.discounts[n][min(3, count)] for gram, count in seen.items()}
        gram = (*context, symbol)
        own = seen[gram] - discounted[gram] if gram in seen else 0.0
        return (own + sum(discounted.values()) * lower) / sum(seen.values())

    def bits(self, documents: Sequence[Sequence[Any]], order: int) -> float:
        total = 0.0
        for text in documents:
            symbols = [BEGIN, *text, END]
            for place in range(1, len(symbols)):
                context = tuple(symbols[max(0, place - order + 1) : place])
                total -= math.log2(self.probability(context, symbols[place]))
        return total
