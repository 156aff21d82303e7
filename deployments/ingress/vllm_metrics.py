"""VllmSeries: the figures of `metrics` under vLLM's names, for dashboards and for gateways.

Gateways that choose between model servers read the queue, the KV cache and the adapters in use from
these series. Unlike vLLM's, one ingress' figures are those of all replicas behind a model.
"""

import time
from collections import Counter as Tally
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from deployments.ingress.adapter_series import SECONDS, TOKEN_SECONDS, AdapterSeries, Family
from deployments.ingress.engine_metrics import LinkFigures
from engine.messages import EngineStats

MODEL = "model_name"
_MANY_MODELS = 1000

PROMPT_TOKENS = "vllm:prompt_tokens"
OUTPUT_TOKENS = "vllm:generation_tokens"
TTFT = "vllm:time_to_first_token_seconds"
GAPS = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
TPOT = "vllm:request_time_per_output_token_seconds"
E2E = "vllm:e2e_request_latency_seconds"
QUEUE = "vllm:request_queue_time_seconds"
FAMILIES = (
    Family(PROMPT_TOKENS, "Prompt tokens.", label=MODEL),
    Family(OUTPUT_TOKENS, "Billed tokens.", label=MODEL),
    Family(TTFT, "Arrival to first token.", SECONDS, MODEL),
    Family(GAPS[0], "Gap between tokens.", TOKEN_SECONDS, MODEL),
    Family(GAPS[1], "Gap between tokens, by its older name.", TOKEN_SECONDS, MODEL),
    Family(TPOT, "(E2E - TTFT) / (tokens - 1).", TOKEN_SECONDS, MODEL),
    Family(E2E, "Arrival to last token.", SECONDS, MODEL),
    Family(QUEUE, "Arrival to first scheduled.", SECONDS, MODEL),
)
GAUGES = {
    "vllm:num_requests_running": ("num_running", "Requests in the engine's batch."),
    "vllm:num_requests_waiting": ("num_waiting", "Requests in the engine's queue."),
}
COUNTERS = {
    "vllm:num_preemptions": ("total_preemptions", "Times that a request was computed again."),
    "vllm:prefix_cache_queries": ("total_prompt_tokens", "Prompt tokens looked up in the cache."),
    "vllm:prefix_cache_hits": ("total_cached_tokens", "Prompt tokens found in the cache."),
    "vllm:spec_decode_num_drafts": ("total_drafts", "Runs of drafted tokens."),
    "vllm:spec_decode_num_draft_tokens": ("total_drafted_tokens", "Drafted tokens."),
    "vllm:spec_decode_num_accepted_tokens": ("total_accepted_tokens", "Drafted tokens accepted."),
}
KV_USED = {
    "vllm:kv_cache_usage_perc": "Part of the KV blocks that requests hold, of 1.",
    "vllm:gpu_cache_usage_perc": "The same, by its older name.",
}


class LiveAdapters:
    """The adapters of requests that wait for their first token, and of those that have it."""

    def __init__(self) -> None:
        self.waiting: Tally[str] = Tally()
        self.running: Tally[str] = Tally()

    def names(self, tally: Tally[str], most: int) -> str:
        return ",".join(islice(tally, most))


class LiveRequest:
    """One request of an ingress, from its arrival to its end."""

    def __init__(self, adapters: LiveAdapters, name: str | None) -> None:
        self._name = name
        self._adapters = adapters
        self._tally = adapters.waiting
        self._add(1)

    def begin(self) -> None:
        """Note its first token."""
        if self._tally is self._adapters.waiting:
            self._add(-1)
            self._tally = self._adapters.running
            self._add(1)

    def end(self) -> None:
        self._add(-1)

    def _add(self, number: int) -> None:
        if self._name is None:
            return
        self._tally[self._name] += number
        if self._tally[self._name] == 0:
            del self._tally[self._name]


class VllmSeries:
    """`model_name` is a base's id. At most `most` adapters have a name in each series."""

    def __init__(
        self, most: int, base_ids: Iterable[str] = (), clock: Callable[[], float] = time.time
    ) -> None:
        self._series = AdapterSeries(FAMILIES, _MANY_MODELS, base_ids)
        self._most = most
        self._live: dict[str, LiveAdapters] = {}
        self._registry = CollectorRegistry()
        self._ends = Counter(
            "vllm:request_success",
            "Answers that have ended, by why.",
            (MODEL, "finished_reason"),
            registry=self._registry,
        )
        self._engines = _Engines(self._live, most, clock)
        self._registry.register(self._engines)

    def arrive(self, model: str, name: str | None, digest: str | None) -> LiveRequest:
        """Count a request until its end, by the adapter's name as the client gave it, if any."""
        if name is not None and digest is not None:
            self._engines.remember(digest, name)
        return LiveRequest(self._live.setdefault(model, LiveAdapters()), name)

    def observe_queue(self, model: str, queue_s: float) -> None:
        self._series.observe(QUEUE, model, queue_s)

    def observe_choice(
        self, model: str, ttft_s: float, e2e_s: float, num_tokens: int, reason: str
    ) -> None:
        self._series.observe(TTFT, model, ttft_s)
        self._series.observe(E2E, model, e2e_s)
        if num_tokens > 1:
            self._series.observe(TPOT, model, (e2e_s - ttft_s) / (num_tokens - 1))
        # Calls of tools are this API's word for an end that the model chose.
        self._ends.labels(model, "length" if reason == "length" else "stop").inc()

    def count_aborted(self, model: str, number: int) -> None:
        """Count answers that have not come to their end."""
        if number:
            self._ends.labels(model, "abort").inc(number)

    def observe_gaps(self, model: str, counts: Sequence[int], sum_s: float) -> None:
        for name in GAPS:
            self._series.add(name, model, counts, sum_s)

    def count_tokens(self, model: str, num_prompt: int, num_output: int) -> None:
        self._series.count(PROMPT_TOKENS, model, num_prompt)
        self._series.count(OUTPUT_TOKENS, model, num_output)

    def parts(
        self, stats: Mapping[str, EngineStats], links: Mapping[str, LinkFigures]
    ) -> Iterator[str]:
        """Write the series, in pieces that are short to make."""
        self._engines.stats, self._engines.links = stats, links
        yield generate_latest(self._registry).decode()
        yield from self._series.parts()


class _Engines(Collector):
    """What the engines report, and the adapters of this ingress' requests."""

    def __init__(
        self, live: Mapping[str, LiveAdapters], most: int, clock: Callable[[], float]
    ) -> None:
        self.stats: Mapping[str, EngineStats] = {}
        self.links: Mapping[str, LinkFigures] = {}
        self._live = live
        self._most = most
        self._clock = clock
        self._names: OrderedDict[str, str] = OrderedDict()  # by digest, as last asked for

    def remember(self, digest: str, name: str) -> None:
        self._names[digest] = name
        self._names.move_to_end(digest)
        while len(self._names) > self._most:
            self._names.popitem(last=False)

    def collect(self) -> Iterable[Metric]:
        for name, (field, text) in GAUGES.items():
            yield _gauge(name, text, {m: getattr(s, field) for m, s in self.stats.items()})
        used = {m: s.num_blocks_used / max(1, s.num_blocks_total) for m, s in self.stats.items()}
        for name, text in KV_USED.items():
            yield _gauge(name, text, used)
        for name, (field, text) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=[MODEL])
            for model, stats in self.stats.items():
                counter.add_metric([model], getattr(stats, field))
            yield counter
        yield from (self._cache_config(), self._requests(), self._loaded(), self._num_loaded())

    def _cache_config(self) -> Metric:
        labels = [MODEL, "block_size", "num_gpu_blocks"]
        gauge = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=labels)
        for model, link in self.links.items():
            if link.block_size:
                num_blocks = self.stats[model].num_blocks_total if model in self.stats else 0
                gauge.add_metric([model, str(link.block_size), str(num_blocks)], 1)
        return gauge

    def _requests(self) -> Metric:
        """Name adapters in labels, as vLLM does; the value is the time."""
        labels = [MODEL, "max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        text = "Adapters of requests that run, and of those that wait for their first token."
        gauge = GaugeMetricFamily("vllm:lora_requests_info", text, labels=labels)
        none = LiveAdapters()
        for model, link in self.links.items():
            live = self._live.get(model, none)
            running = live.names(live.running, self._most)
            waiting = live.names(live.waiting, self._most)
            gauge.add_metric([model, str(link.max_adapters), running, waiting], self._clock())
        return gauge

    def _loaded(self) -> Metric:
        """Name adapters in device memory as they were last asked for, else by their digest."""
        labels = [MODEL, "adapter_name", "level"]
        text = "Adapters in device memory."
        gauge = GaugeMetricFamily("vllm:lora_adapter_loaded", text, labels=labels)
        for model, stats in self.stats.items():
            shown = dict.fromkeys(self._names.get(d, d) for d in stats.resident_adapters)
            for name in islice(shown, self._most):
                gauge.add_metric([model, name, "gpu"], 1)
        return gauge

    def _num_loaded(self) -> Metric:
        numbers = {model: len(stats.resident_adapters) for model, stats in self.stats.items()}
        return _gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters in device memory.", numbers)


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=[MODEL])
    for model, value in values.items():
        gauge.add_metric([model], value)
    return gauge
