"""EngineCollector: what the engines report, as Prometheus' gauges and counters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.messages import EngineStats

# name: field of EngineStats, help
GAUGES = {
    "reef_requests_running": ("num_running", "Requests in the engine's batch."),
    "reef_requests_waiting": ("num_waiting", "Requests in the engine's queue."),
    "reef_queued_tokens": ("queued_tokens", "Prompt tokens not yet computed."),
    "reef_kv_blocks_used": ("num_blocks_used", "KV blocks that requests hold."),
    "reef_kv_blocks_cached": (
        "num_blocks_cached",
        "KV blocks that no request holds, kept for prompts that begin alike.",
    ),
    "reef_kv_blocks_total": ("num_blocks_total", "KV blocks that adapters in use leave."),
}
COUNTERS = {
    "reef_engine_steps": ("total_steps", "Steps."),
    "reef_engine_step_seconds": (
        "total_step_s",
        "Seconds spent in steps; time in which two overlap counts once.",
    ),
    "reef_engine_preemptions": (
        "total_preemptions",
        "Times that a request lost its KV blocks and had to be computed again.",
    ),
    "reef_engine_prompt_tokens": (
        "total_prompt_tokens",
        "Prompt tokens of choices that have finished.",
    ),
    "reef_engine_cached_prompt_tokens": (
        "total_cached_tokens",
        "Tokens of these prompts that were found in the KV cache.",
    ),
    "reef_engine_output_tokens": ("total_output_tokens", "Tokens that were generated."),
    "reef_engine_drafted_tokens": (
        "total_drafted_tokens",
        "Guesses of next tokens that speculation had verified.",
    ),
    "reef_engine_accepted_tokens": (
        "total_accepted_tokens",
        "Of these, those that were right and became output.",
    ),
}
SCOPE = (
    " Summed over the model's replicas, those that are gone included, as far as this ingress has"
    " heard from them; other ingresses report the same engines."
)

REQUESTS = {
    "reef_requests_open": ("num_open", "Requests of this ingress that have not ended."),
    "reef_requests_held": (
        "num_held",
        "Requests of this ingress that the replicas knew in their last reports.",
    ),
    "reef_requests_waking": (
        "num_waking",
        "Requests of this ingress that wait for a first replica to start.",
    ),
}
STARTS = {
    "reef_cold_starts": (
        "num_starts",
        "Starts of a first replica that requests of this ingress have waited for.",
    ),
    "reef_cold_start_seconds": ("start_s", "Seconds from the first such request to the replica."),
}


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """Figures of one ingress' requests at the replicas of one model, and facts about these.

    The first two are equal but for what is on its way; where they stay apart, one side has lost
    some.
    """

    num_open: int
    num_held: int
    block_size: int = 0  # 0 before the first start
    max_adapters: int = 0  # in one batch of each replica together
    num_waking: int = 0  # that wait for a first replica to start
    num_starts: int = 0  # of a first replica, as requests here have seen
    start_s: float = 0.0  # all these starts together


class EngineCollector(Collector):
    """Shows the latest statistics, by model id."""

    def __init__(self) -> None:
        self.stats: Mapping[str, EngineStats] = {}
        self.links: Mapping[str, LinkFigures] = {}

    def collect(self) -> Iterable[Metric]:
        for name, (field, text) in GAUGES.items():
            yield _gauge(name, text, {m: getattr(s, field) for m, s in self.stats.items()})
        for name, (field, text) in REQUESTS.items():
            yield _gauge(name, text, {m: getattr(k, field) for m, k in self.links.items()})
        yield self._resident_adapters()
        for name, (field, text) in COUNTERS.items():
            values = {m: getattr(s, field) for m, s in self.stats.items()}
            yield _counter(name, text + SCOPE, values)
        for name, (field, text) in STARTS.items():
            yield _counter(name, text, {m: getattr(k, field) for m, k in self.links.items()})

    def _resident_adapters(self) -> Metric:
        numbers = {model: len(stats.resident_adapters) for model, stats in self.stats.items()}
        return _gauge("reef_resident_adapters", "Adapters in device memory.", numbers)


def _counter(name: str, text: str, values: Mapping[str, float]) -> Metric:
    counter = CounterMetricFamily(name, text, labels=["model"])
    for model, value in values.items():
        counter.add_metric([model], value)
    return counter


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=["model"])
    for model, value in values.items():
        gauge.add_metric([model], value)
    return gauge
