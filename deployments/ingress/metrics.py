"""Metrics: the figures of one ingress replica, in Prometheus' text format.

Those of the engines come from their latest reports. Observing a token takes no lock: each stream
counts its own gaps and hands them over at its end.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from deployments.ingress.adapter_labels import AdapterLabels
from deployments.ingress.engine_metrics import EngineCollector
from engine.messages import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Gaps:
    """Inter-token latencies of one stream, already in buckets."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(TOKEN_SECONDS) + 1)
        self.sum_s = 0.0

    def observe(self, gap_s: float) -> None:
        self.counts[bisect_left(TOKEN_SECONDS, gap_s)] += 1
        self.sum_s += gap_s


class _GapCollector(Collector):
    def __init__(self) -> None:
        self._gaps: dict[str, Gaps] = {}

    def add(self, adapter: str, gaps: Gaps) -> None:
        total = self._gaps.setdefault(adapter, Gaps())
        total.counts = [a + b for a, b in zip(total.counts, gaps.counts, strict=True)]
        total.sum_s += gaps.sum_s

    def collect(self) -> Iterable[HistogramMetricFamily]:
        family = HistogramMetricFamily(
            "reef_inter_token_latency_seconds", "Gap between tokens.", labels=["adapter"]
        )
        for adapter, gaps in self._gaps.items():
            family.add_metric([adapter], _cumulative(gaps.counts), gaps.sum_s)
        yield family


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, TOKEN_SECONDS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


class Metrics:
    """`adapter` labels are `tenant/name@version`, or the id of a base model.

    Of `max_adapter_series` adapters the series have labels of their own, all later ones share one.
    """

    def __init__(self, max_adapter_series: int, base_ids: Iterable[str] = ()) -> None:
        self._labels = AdapterLabels(max_adapter_series, base_ids)
        self._engines = EngineCollector()
        self.registry = CollectorRegistry()
        self.registry.register(self._engines)
        self._gaps = _GapCollector()
        self.registry.register(self._gaps)
        self._queue = self._seconds("reef_request_queue_seconds", "Arrival to first scheduled.")
        self._ttft = self._seconds("reef_time_to_first_token_seconds", "Arrival to first token.")
        self._e2e = self._seconds("reef_request_seconds", "Arrival to last token.")
        self._tpot = Histogram(
            "reef_time_per_output_token_seconds",
            "(E2E - TTFT) / (tokens - 1).",
            ["adapter"],
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self._prompt_tokens = self._count("reef_prompt_tokens", "Prompt tokens.", "adapter")
        self._cached_tokens = self._count(
            "reef_cached_prompt_tokens", "Prompt tokens found in the KV cache.", "adapter"
        )
        self._output_tokens = self._count("reef_generation_tokens", "Billed tokens.", "adapter")
        self._requests = self._count("reef_requests", "Answers.", "route", "status")
        self._refused = self._count(
            "reef_refused_requests", "Requests beyond a tenant's limits.", "tenant", "limit"
        )

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["adapter"], buckets=SECONDS, registry=self.registry)

    def _count(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def count_answer(self, route: str, status: int | str) -> None:
        self._requests.labels(route, str(status)).inc()

    def count_refusal(self, tenant: str, limit: str) -> None:
        self._refused.labels(tenant, limit).inc()

    def count_tokens(self, adapter: str, num_prompt: int, num_cached: int, num_out: int) -> None:
        label = self._labels.of(adapter)
        self._prompt_tokens.labels(label).inc(num_prompt)
        self._cached_tokens.labels(label).inc(num_cached)
        self._output_tokens.labels(label).inc(num_out)

    def observe_gaps(self, adapter: str, gaps: Gaps) -> None:
        self._gaps.add(self._labels.of(adapter), gaps)

    def observe_queue(self, adapter: str, queue_s: float) -> None:
        self._queue.labels(self._labels.of(adapter)).observe(queue_s)

    def observe_choice(self, adapter: str, ttft_s: float, e2e_s: float, num_tokens: int) -> None:
        """Record one answer as the ingress sees it: from arrival to handing it out."""
        label = self._labels.of(adapter)
        self._ttft.labels(label).observe(ttft_s)
        self._e2e.labels(label).observe(e2e_s)
        if num_tokens > 1:
            self._tpot.labels(label).observe((e2e_s - ttft_s) / (num_tokens - 1))

    def render(self, stats: Mapping[str, EngineStats]) -> bytes:
        self._engines.stats = dict(stats)
        return generate_latest(self.registry)
