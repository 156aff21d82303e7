"""The figures by adapter: as Prometheus reads them, bounded, and quick to write."""

import asyncio
import time

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deployments.ingress.adapter_series import IDLE_S, OTHER, AdapterSeries, Family
from deployments.ingress.metrics import Gaps, Metrics

TOKENS, SECONDS = Family("tokens", "Tokens."), Family("seconds", "Seconds.", (0.5, 1.0))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def samples(series: AdapterSeries) -> dict[tuple[str, ...], float]:
    """By name and label values."""
    families = text_string_to_metric_families("".join(series.parts()))
    found = [sample for family in families for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}


def tokens(series: AdapterSeries) -> dict[str, float]:
    return {key[1]: value for key, value in samples(series).items() if key[0] == "tokens_total"}


def test_a_histogram_is_written_as_prometheus_client_writes_it() -> None:
    series = AdapterSeries([SECONDS], 3)
    registry = CollectorRegistry()
    theirs = Histogram("seconds", "Seconds.", ["adapter"], buckets=(0.5, 1.0), registry=registry)
    for value in (0.2, 0.5, 0.7, 3.0, 0.1):
        series.observe("seconds", 'a"b\\', value)
        theirs.labels('a"b\\').observe(value)
    wanted = [x for x in generate_latest(registry).decode().splitlines() if "_created" not in x]
    assert "".join(series.parts()).splitlines() == wanted


def test_a_scrape_shows_what_came_after_the_one_before() -> None:
    series = AdapterSeries([TOKENS, SECONDS], 3)
    series.count("tokens", "a", 2)
    assert tokens(series) == {"a": 2}
    series.count("tokens", "a", 3)
    series.add("seconds", "a", [1, 0, 2], 7.5)
    assert tokens(series) == {"a": 5}
    found = samples(series)
    assert found["seconds_count", "a"] == 3 and found["seconds_sum", "a"] == 7.5
    assert found["seconds_bucket", "a", "1.0"] == 1 and found["seconds_bucket", "a", "+Inf"] == 3


def test_later_adapters_share_a_label_and_base_models_have_their_own() -> None:
    series = AdapterSeries([TOKENS], 1, ["base"])
    for adapter in ("a", "b", "c", "base", "a"):
        series.count("tokens", adapter, 1)
    assert tokens(series) == {"a": 2, OTHER: 2, "base": 1}


def test_an_idle_adapter_makes_room_and_no_sum_falls() -> None:
    clock = Clock()
    series = AdapterSeries([TOKENS, SECONDS], 2, clock=clock)
    series.count("tokens", "old", 5)
    series.observe("seconds", "old", 0.7)
    clock.now_s = IDLE_S - 1
    series.count("tokens", "busy", 1)
    series.count("tokens", "early", 1)
    assert tokens(series) == {"old": 5, "busy": 1, OTHER: 1}
    clock.now_s = IDLE_S
    series.count("tokens", "new", 3)
    assert tokens(series) == {"busy": 1, "new": 3, OTHER: 6}
    assert samples(series)["seconds_bucket", OTHER, "1.0"] == 1


def test_without_room_for_anybody_all_share_one_label() -> None:
    series = AdapterSeries([TOKENS], 0)
    series.count("tokens", "a", 1)
    assert tokens(series) == {OTHER: 1}


def test_tenants_have_a_bound_too() -> None:
    metrics = Metrics(1)
    for tenant in ("a", "b", "c", "a"):
        metrics.count_refusal(tenant, "requests_per_minute")
    text = asyncio.run(metrics.render({})).decode()
    lines = [line for line in text.splitlines() if line.startswith("reef_refused_requests_total{")]
    assert [line.split()[-1] for line in lines] == ["2.0", "2.0"]


def test_a_scrape_of_5000_adapters_lets_the_event_loop_turn() -> None:
    metrics = Metrics(5000)
    for number in range(5000):
        adapter = f"tenant/adapter-{number}@1"
        metrics.observe_queue(adapter, 0.1)
        metrics.observe_choice(adapter, 0.1, 1.0, 10)
        metrics.count_tokens(adapter, 10, 0, 10)
        metrics.observe_gaps(adapter, Gaps())

    async def scrape() -> list[float]:
        """CPU seconds between two turns of the loop while a scrape is written."""
        gaps, began_s = list[float](), time.process_time()
        writing = asyncio.create_task(metrics.render({}))
        while not writing.done():
            await asyncio.sleep(0)
            gaps.append(time.process_time() - began_s)
            began_s = time.process_time()
        assert len(await writing) > 5000 * 80
        return gaps

    # A busy machine, or a garbage collection, may prolong a turn, but hardly one of each scrape.
    assert any(max(asyncio.run(scrape())) < 0.05 for _ in range(5))
