"""Metrics: the figures of one ingress replica, in Prometheus' text format.

Those of the engines come from their latest reports. Observing a token takes no lock: each stream
counts its own gaps and hands them over at its end.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest

from deployments.ingress.adapter_series import (
    OTHER,
    SECONDS,
    TOKEN_SECONDS,
    AdapterSeries,
    Family,
)
from deployments.ingress.engine_metrics import EngineCollector, LinkFigures
from deployments.ingress.usage_metrics import UsageCollector
from deployments.ingress.vllm_metrics import VllmSeries
from deployments.usage.writer import UsageCounts
from engine.messages import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SLICE_S = 0.002  # how long a scrape keeps the event loop at a time

QUEUE = "reef_request_queue_seconds"
TTFT = "reef_time_to_first_token_seconds"
GAPS = "reef_inter_token_latency_seconds"
TPOT = "reef_time_per_output_token_seconds"
E2E = "reef_request_seconds"
PROMPT_TOKENS = "reef_prompt_tokens"
CACHED_TOKENS = "reef_cached_prompt_tokens"
OUTPUT_TOKENS = "reef_generation_tokens"
FEEDBACK = "reef_feedback"
GOOD_FEEDBACK = "reef_good_feedback"
FAMILIES = (
    Family(QUEUE, "Arrival to first scheduled.", SECONDS),
    Family(TTFT, "Arrival to first token.", SECONDS),
    Family(GAPS, "Gap between tokens.", TOKEN_SECONDS),
    Family(TPOT, "(E2E - TTFT) / (tokens - 1).", TOKEN_SECONDS),
    Family(E2E, "Arrival to last token.", SECONDS),
    Family(PROMPT_TOKENS, "Prompt tokens."),
    Family(CACHED_TOKENS, "Prompt tokens found in the KV cache."),
    Family(OUTPUT_TOKENS, "Billed tokens."),
    Family(FEEDBACK, "Answers that were given a score."),
    Family(GOOD_FEEDBACK, "Sum of their scores, each at least 0."),
)


class Gaps:
    """Inter-token latencies of one stream, already in buckets."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(TOKEN_SECONDS) + 1)
        self.sum_s = 0.0

    def observe(self, gap_s: float) -> None:
        self.counts[bisect_left(TOKEN_SECONDS, gap_s)] += 1
        self.sum_s += gap_s


class Metrics:
    """`adapter` labels are `tenant/name@version`, or the id of a base model.

    Of `max_adapter_series` adapters the series have labels of their own, all others share one. As
    many tenants have labels of their own among the refusals. `vllm` has the same under vLLM's
    names, and by base model; `shows_vllm` says whether a scrape has them.
    """

    def __init__(
        self, max_adapter_series: int, base_ids: Iterable[str] = (), shows_vllm: bool = True
    ) -> None:
        base_ids = list(base_ids)
        self.vllm = VllmSeries(max_adapter_series, base_ids)
        self._shows_vllm = shows_vllm
        self._adapters = AdapterSeries(FAMILIES, max_adapter_series, base_ids)
        self._max_tenants = max_adapter_series
        self._tenants: set[str] = set()
        self._engines = EngineCollector()
        self._registry = CollectorRegistry()
        self._registry.register(self._engines)
        self._requests = self._count("reef_requests", "Answers.", "route", "status")
        self._refused = self._count(
            "reef_refused_requests", "Requests beyond a tenant's limits.", "tenant", "limit"
        )

    def _count(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def show_usage(self, counts: Callable[[], UsageCounts]) -> None:
        """Show how the records of usage fare, too."""
        self._registry.register(UsageCollector(counts))

    def count_answer(self, route: str, status: int | str) -> None:
        self._requests.labels(route, str(status)).inc()

    def count_refusal(self, tenant: str, limit: str) -> None:
        if tenant not in self._tenants and len(self._tenants) >= self._max_tenants:
            tenant = OTHER
        else:
            self._tenants.add(tenant)
        self._refused.labels(tenant, limit).inc()

    def count_tokens(self, adapter: str, num_prompt: int, num_cached: int, num_out: int) -> None:
        self._adapters.count(PROMPT_TOKENS, adapter, num_prompt)
        self._adapters.count(CACHED_TOKENS, adapter, num_cached)
        self._adapters.count(OUTPUT_TOKENS, adapter, num_out)

    def count_feedback(self, adapter: str, quality: float) -> None:
        """Count a score, from 0 (bad) to 1 (good)."""
        self._adapters.count(FEEDBACK, adapter, 1)
        self._adapters.count(GOOD_FEEDBACK, adapter, quality)

    def observe_gaps(self, adapter: str, gaps: Gaps) -> None:
        self._adapters.add(GAPS, adapter, gaps.counts, gaps.sum_s)

    def observe_queue(self, adapter: str, queue_s: float) -> None:
        self._adapters.observe(QUEUE, adapter, queue_s)

    def observe_choice(self, adapter: str, ttft_s: float, e2e_s: float, num_tokens: int) -> None:
        """Record one answer as the ingress sees it: from arrival to handing it out."""
        self._adapters.observe(TTFT, adapter, ttft_s)
        self._adapters.observe(E2E, adapter, e2e_s)
        if num_tokens > 1:
            self._adapters.observe(TPOT, adapter, (e2e_s - ttft_s) / (num_tokens - 1))

    async def render(
        self, stats: Mapping[str, EngineStats], links: Mapping[str, LinkFigures] | None = None
    ) -> bytes:
        """Write everything. Other tasks run in between, however many adapters there are."""
        self._engines.stats, self._engines.links = dict(stats), dict(links or {})
        parts = [generate_latest(self._registry)]
        texts: list[str] = []
        began_s = time.perf_counter()
        for text in self._parts():
            texts.append(text)
            if time.perf_counter() - began_s > SLICE_S:
                parts.append("".join(texts).encode())
                texts.clear()
                await asyncio.sleep(0)
                began_s = time.perf_counter()
        return b"".join([*parts, "".join(texts).encode()])

    def _parts(self) -> Iterator[str]:
        yield from self._adapters.parts()
        if self._shows_vllm:
            yield from self.vllm.parts(self._engines.stats, self._engines.links)
