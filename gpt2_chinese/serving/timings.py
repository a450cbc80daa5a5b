"""How long requests take, counted in the buckets of a histogram; metrics.py reports them."""

from __future__ import annotations

from bisect import bisect_left

FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds in seconds of the time to the first token."""
PER_TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
"""Upper bounds in seconds of the time per token after the first."""


class Histogram:
    """Counts of values by bucket, and their sum.

    Not prometheus_client's Histogram, which needs its labels before the first value: the device is one of them, and is
    known only when the model has been loaded. Observing a value is also several times faster here.
    """

    def __init__(self, upper_bounds: tuple[float, ...]) -> None:
        self.upper_bounds = upper_bounds
        self.counts = [0] * (len(upper_bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.upper_bounds, value)] += 1
        self.sum += value


class Timings:
    """How fast one model answers: the time to the first token of a request, and the time per token after it."""

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN_BUCKETS)
        self.per_token = Histogram(PER_TOKEN_BUCKETS)

    def observe_request(self, arrived: float, first_token_at: float, finished: float, longest: int) -> None:
        """Add one request: three times in seconds of one clock, and the tokens of its longest completion."""
        self.first_token.observe(first_token_at - arrived)
        if longest > 1:
            self.per_token.observe((finished - first_token_at) / (longest - 1))
