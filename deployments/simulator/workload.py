"""Makes requests: when they come, for which adapter, how long they are. The same for one seed."""

import math
from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate, takewhile
from random import Random
from typing import Annotated, Literal

import msgspec

from deployments.simulator.checked import Count, PerSecond, Positive, Seconds, Share, Sigma
from deployments.simulator.prompts import shared_range
from deployments.simulator.traces import Row, Trace, read_trace
from engine.scheduler.fairness import MAX_WEIGHT, MIN_WEIGHT

MOST_PREFIX = 2**14  # tokens
MOST_TOKENS = 2**31

Weight = Annotated[float, msgspec.Meta(ge=MIN_WEIGHT, le=MAX_WEIGHT)]


class Arrival(msgspec.Struct, frozen=True):
    """One request. `adapter` is -1 for the base model."""

    number: int
    time_s: float
    adapter: int
    num_prompt_tokens: int
    num_output_tokens: int
    tenant: str = ""
    shared: tuple[range, ...] = ()  # tokens with which its prompt begins, and others' too
    weight: float = 1.0  # its tenant's


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
    tenants: Count = 1  # tenant-0, tenant-1, ...; adapters belong to them in turn
    # Parts of all requests, by tenant; each is for one of its own adapters. Without: as many as
    # their adapters get
    tenant_shares: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        shares = self.tenant_shares
        if not shares:
            return
        if len(shares) != self.tenants or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"tenant_shares must be one for each of the {self.tenants} tenants, together 1, "
                f"not {len(shares)} that are {sum(shares):g}"
            )
        if self.adapters < self.tenants:
            raise ValueError(f"{self.tenants} tenants need as many adapters, not {self.adapters}")


class Lengths(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Numbers of tokens: lognormal, with this median and this sigma of the logarithm."""

    median: Positive = 200.0
    sigma: Sigma = 0.6
    most: Count = 1024


class Prefix(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What comes before the drawn prompt in a share of the requests: the same tokens in all of an
    adapter, like a system prompt."""

    tokens: Annotated[int, msgspec.Meta(ge=0, le=MOST_PREFIX)] = 0
    share: Share = 1.0


class Workload(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    arrivals: Process = Process()
    popularity: Popularity = Popularity()
    prompt: Lengths = Lengths()
    output: Lengths = Lengths(median=100.0, most=512)
    prefix: Prefix = Prefix()
    weights: dict[str, Weight] = {}  # of tenants beside others that wait; 1 where none is given
    trace: Trace | None = (
        None  # in place of arrivals, lengths and prefix; and of adapters, if given
    )

    def __post_init__(self) -> None:
        known = [tenant_name(number) for number in range(self.popularity.tenants)]
        unknown = [] if self.trace else sorted(set(self.weights).difference(known))
        if unknown:
            raise ValueError(
                f"weights are of {', '.join(map(repr, unknown))}; the tenants are "
                f"{known[0]} to {known[-1]}"
            )

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest request; of a trace its rows are checked one by one."""
        most = self.prefix.tokens + self.prompt.most + self.output.most
        return most if self.trace is None else 0


def make_arrivals(
    workload: Workload, seed: int, duration_s: float, most_tokens: int = MOST_TOKENS
) -> Iterator[Arrival]:
    """Yield the requests of `duration_s` seconds in the order of their times. Raises
    InvalidSimulation where a trace's row is wrong, or longer than `most_tokens`."""
    choose = AdapterChooser(workload.popularity, Random(f"{seed}/adapters"))
    if workload.trace is None:
        return _drawn(workload, choose, seed, duration_s)
    rows = takewhile(lambda row: row.time_s < duration_s, read_trace(workload.trace, most_tokens))
    return _recorded(workload, rows, choose, Random(f"{seed}/tenants"))


def _drawn(
    workload: Workload, choose: "AdapterChooser", seed: int, duration_s: float
) -> Iterator[Arrival]:
    times = _times(workload.arrivals, Random(f"{seed}/times"), duration_s)
    rng, prefix, weights = Random(f"{seed}/lengths"), workload.prefix, workload.weights
    of_tenants = TenantChooser(workload.popularity, Random(f"{seed}/tenants"))
    for number, time_s in enumerate(times):
        adapter, tenant = of_tenants(choose(time_s))
        num_prompt = draw_length(workload.prompt, rng)
        num_output = draw_length(workload.output, rng)
        shared: tuple[range, ...] = ()
        if prefix.tokens and rng.random() < prefix.share:
            shared = (shared_range(adapter + 1, prefix.tokens, MOST_PREFIX),)
            num_prompt += prefix.tokens
        weight = weights.get(tenant, 1.0)
        yield Arrival(number, time_s, adapter, num_prompt, num_output, tenant, shared, weight)


def _recorded(
    workload: Workload, rows: Iterator[Row], choose: "AdapterChooser", rng: Random
) -> Iterator[Arrival]:
    """Number adapters by name, in the order in which they come."""
    numbers: dict[str, int] = {"": -1}
    of_tenants = TenantChooser(workload.popularity, rng)
    for number, row in enumerate(rows):
        if row.adapter is None:
            adapter, tenant = of_tenants(choose(row.time_s))
        else:
            adapter = numbers.setdefault(row.adapter, len(numbers) - 1)
            tenant = row.tenant
        yield Arrival(
            number,
            row.time_s,
            adapter,
            row.num_prompt_tokens,
            row.num_output_tokens,
            tenant,
            row.shared,
            workload.weights.get(tenant, 1.0),
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


class TenantChooser:
    """Says whose request it is: of the adapter's owner, or by the tenants' shares of one that owns
    the adapter beside it."""

    def __init__(self, popularity: Popularity, rng: Random) -> None:
        self._adapters, self._rng = popularity.adapters, rng
        self._names = [tenant_name(number) for number in range(popularity.tenants)]
        self._bounds = list(accumulate(popularity.tenant_shares))

    def __call__(self, adapter: int) -> tuple[int, str]:
        """Return the adapter, or the one instead of it, and the tenant."""
        count = len(self._names)
        if not self._bounds:
            return adapter, self._names[max(adapter, 0) % count]
        number = min(bisect(self._bounds, self._rng.random() * self._bounds[-1]), count - 1)
        if adapter < 0:
            return adapter, self._names[number]
        own = adapter - adapter % count + number
        return own if own < self._adapters else own - count, self._names[number]


def tenant_name(number: int) -> str:
    return f"tenant-{number}"
