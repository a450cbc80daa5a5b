"""What GET /metrics says, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

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

    def lines(self, name: str, labels: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self.sum}"
        yield f"{name}_count{{{labels}}} {total}"


class Metrics:
    """Requests by route and status, and how long tokens took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first_token = Histogram(SECONDS)
        self.per_token = Histogram(TOKEN_SECONDS)

    def observe_completion(self, arrived: float, first_token_at: float, ended: float, longest: int) -> None:
        """One request: times in seconds of one clock, and the number of tokens of its longest sample."""
        self.first_token.observe(first_token_at - arrived)
        if longest > 1:
            self.per_token.observe((ended - first_token_at) / (longest - 1))

    def render(self, labels: Mapping[str, str], gauges: Mapping[str, float], counters: Mapping[str, int]) -> str:
        """The whole text; every line carries `labels`."""
        common = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
        lines = []
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in values.items():
                lines += [f"# TYPE gpt2_{name} {kind}", f"gpt2_{name}{{{common}}} {value}"]
        lines.append("# TYPE gpt2_http_requests_total counter")
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'gpt2_http_requests_total{{{common},route="{_escaped(route)}",status="{status}"}} {count}')
        for name, histogram in (
            ("time_to_first_token_seconds", self.first_token),
            ("time_per_token_seconds", self.per_token),
        ):
            lines += [f"# TYPE gpt2_{name} histogram", *histogram.lines(f"gpt2_{name}", common)]
        return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
