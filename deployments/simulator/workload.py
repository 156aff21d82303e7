"""Makes requests: when they come, for which adapter, how long they are. The same for one seed."""

import math
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Literal

import msgspec

from deployments.simulator.checked import Count, PerSecond, Positive, Seconds, Share, Sigma


class Arrival(msgspec.Struct, frozen=True):
    """One request. `adapter` is -1 for the base model."""

    number: int
    time_s: float
    adapter: int
    num_prompt_tokens: int
    num_output_tokens: int
    tenant: int = 0


class Process(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """When requests come. `burstiness` is the squared coefficient of variation of the gaps between
    them: 1 for Poisson. With `day_s` the rate swings once in that time by `swing` of its mean."""

    rate: PerSecond = 10.0
    burstiness: Positive = 1.0
    day_s: Seconds = 0.0
    swing: Share = 0.8


class Popularity(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which adapter a request is for.

    zipf: that of popularity rank r in proportion to 1 / r ** exponent. Every `drift_s` seconds one
    adapter in ten changes its rank. In [flash_at_s, flash_at_s + flash_s) half of the requests are
    for one adapter that was seldom used before.
    """

    kind: Literal["zipf", "uniform"] = "zipf"
    adapters: Count = 100
    exponent: Positive = 1.0
    base_share: Share = 0.0
    drift_s: Seconds = 0.0
    flash_at_s: Seconds = 0.0
    flash_s: Seconds = 0.0
    tenants: Count = 1  # adapters belong to them in turn


class Lengths(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Numbers of tokens: lognormal, with this median and this sigma of the logarithm."""

    median: Positive = 200.0
    sigma: Sigma = 0.6
    most: Count = 1024


class Workload(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    arrivals: Process = Process()
    popularity: Popularity = Popularity()
    prompt: Lengths = Lengths()
    output: Lengths = Lengths(median=100.0, most=512)


def make_arrivals(workload: Workload, seed: int, duration_s: float) -> Iterator[Arrival]:
    """Yield the requests of `duration_s` seconds in the order of their times."""
    times = _times(workload.arrivals, Random(f"{seed}/times"), duration_s)
    choose = AdapterChooser(workload.popularity, Random(f"{seed}/adapters"))
    rng = Random(f"{seed}/lengths")
    for number, time_s in enumerate(times):
        adapter = choose(time_s)
        yield Arrival(
            number,
            time_s,
            adapter,
            draw_length(workload.prompt, rng),
            draw_length(workload.output, rng),
            max(adapter, 0) % workload.popularity.tenants,
        )


def draw_length(lengths: Lengths, rng: Random) -> int:
    drawn = lengths.median * math.exp(rng.gauss(0.0, lengths.sigma))
    return min(max(round(drawn), 1), lengths.most)


def _times(process: Process, rng: Random, duration_s: float) -> Iterator[float]:
    """Gaps of a gamma distribution, stretched where the rate is low."""
    shape = 1 / process.burstiness
    time_s = 0.0
    while True:
        factor = 1.0
        if process.day_s:
            factor += process.swing * math.sin(2 * math.pi * time_s / process.day_s)
        time_s += rng.gammavariate(shape, 1 / shape) / (process.rate * max(factor, 0.02))
        if time_s >= duration_s:
            return
        yield time_s


class AdapterChooser:
    """Draws the adapter of a request at a time; times must not decrease."""

    def __init__(self, popularity: Popularity, rng: Random) -> None:
        self._popularity, self._rng = popularity, rng
        count = popularity.adapters
        exponent = popularity.exponent if popularity.kind == "zipf" else 0.0
        self._bounds = list(accumulate((rank + 1) ** -exponent for rank in range(count)))
        self._by_rank = list(range(count))
        rng.shuffle(self._by_rank)
        self._next_drift_s = popularity.drift_s or math.inf

    def __call__(self, time_s: float) -> int:
        popularity, rng = self._popularity, self._rng
        while time_s >= self._next_drift_s:
            self._drift()
        if rng.random() < popularity.base_share:
            return -1
        since_s = time_s - popularity.flash_at_s
        if 0 <= since_s < popularity.flash_s and rng.random() < 0.5:
            return self._by_rank[-1]
        return self._by_rank[bisect(self._bounds, rng.random() * self._bounds[-1])]

    def _drift(self) -> None:
        self._next_drift_s += self._popularity.drift_s
        count = len(self._by_rank)
        for _ in range(max(count // 20, 1)):
            a, b = self._rng.randrange(count), self._rng.randrange(count)
            self._by_rank[a], self._by_rank[b] = self._by_rank[b], self._by_rank[a]
