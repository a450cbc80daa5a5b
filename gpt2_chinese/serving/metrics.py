"""GET /metrics: what Prometheus scrapes, read from the service at each scrape.

A new metric is one more line in `ServiceCollector.collect`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gpt2_chinese.serving.service import ServedModel, Service
from gpt2_chinese.serving.timings import Histogram

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def metrics_page(service: Service) -> bytes:
    """The metrics of a service in Prometheus' text format, UTF-8. Must be called in the event loop."""
    return generate_latest(ServiceCollector(service))


class ServiceCollector(Collector):
    """Reads a service's state when it is scraped; a request only increments plain counters.

    The label `device` is the same for all of a process and empty until a model has been loaded.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._device = service.device or ""

    def collect(self) -> Iterator[Metric]:
        service = self._service
        gauge = partial(self._of_models, GaugeMetricFamily)
        counter = partial(self._of_models, CounterMetricFamily)  # its name gets the suffix _total
        yield self._of_process("gpt2_admitted_requests", "requests that are being answered", service.admitted)
        yield self._of_process("gpt2_tasks", "asyncio tasks of the process", len(asyncio.all_tasks()))
        yield self._responses()
        yield gauge(
            "gpt2_ready",
            "1 if the model accepts requests",
            lambda model: model.status == "ready" and not service.draining,
        )
        yield gauge(
            "gpt2_full_speed",
            "1 if the model decodes with its final decoder, not with PyTorch while that is compiled",
            lambda model: model.at_full_speed,
        )
        yield gauge("gpt2_running_sequences", "sequences being decoded", lambda model: model.running)
        yield gauge("gpt2_waiting_sequences", "sequences in the queue", lambda model: model.waiting)
        yield counter(
            "gpt2_prompt_tokens",
            "tokens of prompts, reused ones included",
            lambda model: model.prompt_tokens,
        )
        yield counter(
            "gpt2_generated_tokens",
            "tokens generated",
            lambda model: model.generated_tokens,
        )
        yield counter(
            "gpt2_prefix_cache_hits",
            "prompts that began like a former one, whose keys and values were reused",
            lambda model: model.prefix_cache.hits,
        )
        yield counter(
            "gpt2_prefix_cache_reused_tokens",
            "tokens of prompts whose keys and values were reused",
            lambda model: model.prefix_cache.reused_tokens,
        )
        yield gauge(
            "gpt2_prefix_cache_bytes",
            "bytes of the keys and values that the prefix cache holds",
            lambda model: model.prefix_cache.used_bytes,
        )
        yield gauge(
            "gpt2_prefix_cache_capacity_bytes",
            "bytes that the prefix cache may hold; 0 if it is off, or if the decoder has none",
            lambda model: model.prefix_cache.capacity_bytes,
        )
        yield counter("gpt2_model_restarts", "times that the model was started again", lambda model: model.restarts)
        yield counter("gpt2_model_reloads", "times that the model was exchanged", lambda model: model.reloads)
        yield self._histogram(
            "gpt2_time_to_first_token_seconds",
            "seconds from the arrival of a request to its first token",
            lambda model: model.timings.first_token,
        )
        yield self._histogram(
            "gpt2_time_per_token_seconds",
            "seconds per token after the first, of a request's longest completion",
            lambda model: model.timings.per_token,
        )

    def _of_process(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=["device"])
        family.add_metric([self._device], value)
        return family

    def _of_models(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        documentation: str,
        value_of: Callable[[ServedModel], float],
    ) -> Metric:
        family = kind(name, documentation, labels=["model", "device"])
        for model in self._service.models:
            family.add_metric([model.name, self._device], value_of(model))
        return family

    def _responses(self) -> Metric:
        family = CounterMetricFamily(
            "gpt2_http_requests",
            "answered requests by route and status; 499 if the client disconnected before the answer",
            labels=["device", "route", "status"],
        )
        for (route, status), count in sorted(self._service.response_counts.items()):
            family.add_metric([self._device, route, str(status)], count)
        return family

    def _histogram(self, name: str, documentation: str, histogram_of: Callable[[ServedModel], Histogram]) -> Metric:
        family = HistogramMetricFamily(name, documentation, labels=["model", "device"])
        for model in self._service.models:
            histogram = histogram_of(model)
            bounds = [*map(str, histogram.upper_bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
            family.add_metric([model.name, self._device], buckets, histogram.sum)
        return family
