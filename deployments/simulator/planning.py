"""Finds the fewest replicas that hold a workload at its objective."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest

import msgspec

from deployments.simulator.config import Simulation
from deployments.simulator.pool import Pool
from deployments.simulator.scaling import Scaling
from deployments.simulator.simulate import Summary
from deployments.simulator.workload import make_arrivals

SHARES = (0.5, 0.9, 0.99)


class NotEnough(ValueError):
    """Even the most replicas miss the objective; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """`tried` are the numbers of replicas and the worst summary of each, in order."""

    replicas: int
    tried: dict[int, Summary]


def with_replicas(simulation: Simulation, count: int) -> Simulation:
    """Return the same with a fixed number of replicas."""
    fleet = msgspec.structs.replace(simulation.fleet, scaling=Scaling(min=count, max=count))
    return msgspec.structs.replace(simulation, fleet=fleet)


def plan_fleet(
    simulation: Simulation,
    seeds: Sequence[int],
    most: int,
    pool: Pool,
    watch: Callable[[int], object] = lambda _: None,
) -> FleetPlan:
    """Search by doubling, then by halving the gap. Raises NotEnough.

    With more replicas no request is served worse but by chance; each number is judged by the
    seed that it serves worst.
    """
    tried: dict[int, Summary] = {}
    wanted = simulation.objective.attained

    def holds(count: int) -> bool:
        runs = pool.run([(with_replicas(simulation, count), seed) for seed in seeds], watch)
        tried[count] = min(runs, key=lambda summary: summary.attained)
        return tried[count].attained >= wanted

    low, high = 0, 1
    while not holds(high):
        if high == most:
            raise NotEnough(_shortage(tried[most], most, wanted))
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return FleetPlan(high, dict(sorted(tried.items())))


def _shortage(summary: Summary, most: int, wanted: float) -> str:
    return (
        f"{most} replicas keep the objective for {summary.attained:.2%} of the requests, and "
        f"{wanted:.2%} are wanted: TTFT p99 {summary.ttft_p99_s:.3g} s, TPOT p99 "
        f"{summary.tpot_p99_s:.3g} s; allow more replicas, or a larger objective"
    )


def report(simulation: Simulation, planned: FleetPlan) -> Iterator[str]:
    """Write what was tried, what it costs, and what the memory has to hold."""
    fleet, wanted = simulation.fleet, simulation.objective.attained
    yield f"{planned.replicas} replicas keep the objective for {wanted:.2%} of the requests"
    gpus, price = planned.replicas * fleet.gpus, planned.replicas * fleet.price_per_hour
    yield f"{gpus:g} GPUs, {price:g} an hour"
    yield ""
    yield "replicas  kept  TTFT p99 (s)  TPOT p99 (s)  cold loads by request"
    for count, s in planned.tried.items():
        yield (
            f"{count:8}  {s.attained:6.2%}  {s.ttft_p99_s:10.3f}  {s.tpot_p99_s:12.4f}  "
            f"{s.loads_per_request:12.3f}"
        )
    yield ""
    yield from _memory(simulation, planned)


def _memory(simulation: Simulation, planned: FleetPlan) -> Iterator[str]:
    fleet, size = simulation.fleet, simulation.fleet.size
    room = min(size.memory_bytes // fleet.most_adapter_bytes, size.max_adapters)
    yield (
        f"memory of a replica: {size.memory_bytes / 2**30:.2f} GiB for KV and adapters: "
        f"{size.memory_bytes // size.block_bytes * size.block_size} tokens, or {room} adapters of "
        f"{fleet.most_adapter_bytes / 2**20:.1f} MiB"
    )
    for share, count in adapters_for(simulation, SHARES).items():
        yield (
            f"{count} adapters get {share:.0%} of the requests that name one: "
            f"{count * fleet.most_adapter_bytes / 2**30:.2f} GiB, "
            f"{count / (room * planned.replicas):.0%} of the room of all replicas"
        )


def adapters_for(simulation: Simulation, shares: Sequence[float]) -> dict[float, int]:
    """Return how many adapters, the most wanted first, get these shares of the requests."""
    counts: dict[int, int] = {}
    duration_s, most = simulation.duration_s, simulation.fleet.size.max_model_len
    for arrival in make_arrivals(simulation.workload, 0, duration_s, most):
        if arrival.adapter >= 0:
            counts[arrival.adapter] = counts.get(arrival.adapter, 0) + 1
    total, found, summed = sum(counts.values()), dict[float, int](), 0
    left = sorted(shares)
    for number, count in enumerate(nlargest(len(counts), counts.values()), 1):
        summed += count
        while left and summed >= left[0] * total:
            found[left.pop(0)] = number
    return found
