"""What GET /metrics says, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Histogram:
    """Counts of values up to each bound, their sum and number."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Timings:
    """How long the tokens of one model took."""

    def __init__(self) -> None:
        self.first_token = Histogram(SECONDS)
        self.per_token = Histogram(TOKEN_SECONDS)

    def observe_completion(self, arrived: float, first_token_at: float, ended: float, longest: int) -> None:
        """One request: times in seconds of one clock, and the number of tokens of its longest sample."""
        self.first_token.observe(first_token_at - arrived)
        if longest > 1:
            self.per_token.observe((ended - first_token_at) / (longest - 1))


class Exposition:
    """The text of a scrape: the samples of a metric stand together, whoever adds them in whatever order.

    Example:
        >>> page = Exposition()
        >>> page.add("ready", "gauge", 1, model="a")
        >>> str(page)
        '# TYPE gpt2_ready gauge\\ngpt2_ready{model="a"} 1\\n'
    """

    def __init__(self) -> None:
        self._metrics: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, value: float, **labels: object) -> None:
        """A sample of a gauge or a counter."""
        self._lines(name, kind).append(_sample(name, value, labels.items()))

    def add_histogram(self, name: str, histogram: Histogram, **labels: object) -> None:
        lines = self._lines(name, "histogram")
        total = 0
        for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
            total += count
            lines.append(_sample(f"{name}_bucket", total, [*labels.items(), ("le", bound)]))
        lines.append(_sample(f"{name}_sum", histogram.sum, labels.items()))
        lines.append(_sample(f"{name}_count", total, labels.items()))

    def __str__(self) -> str:
        return "".join(f"{line}\n" for lines in self._metrics.values() for line in lines)

    def _lines(self, name: str, kind: str) -> list[str]:
        return self._metrics.setdefault(name, [f"# TYPE gpt2_{name} {kind}"])


def _sample(name: str, value: float, labels: Iterable[tuple[str, object]]) -> str:
    listed = ",".join(f'{label}="{_escaped(str(text))}"' for label, text in labels)
    return f"gpt2_{name}{{{listed}}} {value}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
