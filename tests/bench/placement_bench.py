"""How many cold loads each router makes, beside what is possible.

    python -m tests.bench.placement_bench --seconds 500

The fleet of configs/simulate-routing.yaml in virtual time: 8 replicas with room for 32 adapters on
the device and as many in host memory, 1,000 adapters by Zipf's law. The first half is not counted.
What is possible is found without a simulation of steps: every adapter's popularity is known, its
copies lie where they are for ever, others pass through; a request goes to the least busy replica
that has its adapter and is below the bound, else it is a cold load at the least busy one. Some
numbers of copies are tried, and the best within the load is the answer.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec

from deployments.simulator.config import read_simulation, with_router
from deployments.simulator.routers import ROUTERS
from deployments.simulator.simulate import simulate
from tests.bench.environment import append_row, header

FILE = Path(__file__).parents[2] / "configs" / "simulate-routing.yaml"
REPLICAS, ADAPTERS, RATE, SERVICE_S, LOAD_S = 8, 1000, 60.0, 1.0, 0.15
COPIES = [(many, count, some) for many in (0, 1, 2) for count in (0, 8, 16, 32) for some in (2, 3)]


class Possible(NamedTuple):
    loads_per_request: float
    max_over_mean: float


def popularities() -> list[float]:
    weights = [1 / (rank + 1) for rank in range(ADAPTERS)]
    return [weight / sum(weights) for weight in weights]


def place(copies: Sequence[int], room: int) -> list[list[int]]:
    """Return the replicas of each adapter, so that they get as much to do: popular ones first."""
    loads, left = [0.0] * REPLICAS, [room] * REPLICAS
    where: list[list[int]] = []
    for share, count in zip(popularities(), copies, strict=False):
        free = sorted((k for k in range(REPLICAS) if left[k]), key=loads.__getitem__)[:count]
        for k in free:
            loads[k] += share / count
            left[k] -= 1
        where.append(free)
    return where + [[]] * (ADAPTERS - len(where))


def requests(seconds: float, rng: Random) -> Iterator[tuple[float, int, float]]:
    """Yield (time, adapter, seconds that it takes)."""
    bounds, time_s = list(accumulate(popularities())), 0.0
    while (time_s := time_s + rng.expovariate(RATE)) < seconds:
        (adapter,) = rng.choices(range(ADAPTERS), cum_weights=bounds)
        yield time_s, adapter, SERVICE_S * rng.lognormvariate(-0.18, 0.6)


def serve(where: Sequence[Sequence[int]], seconds: float, epsilon: float) -> Possible:
    loads, ends = [0] * REPLICAS, list[tuple[float, int]]()
    num_cold, count, uneven = 0, 0, list[float]()
    for time_s, adapter, takes_s in requests(seconds, Random(1)):
        while ends and ends[0][0] <= time_s:
            loads[heappop(ends)[1]] -= 1
        total = sum(loads)
        uneven.append(max(loads) * REPLICAS / max(total, 1))
        limit = max(math.floor((1 + epsilon) * (total + 1) / REPLICAS), 4)
        having = [k for k in where[adapter] if loads[k] < limit]
        chosen = min(having or range(REPLICAS), key=loads.__getitem__)
        num_cold, count = num_cold + (not having), count + 1
        loads[chosen] += 1
        heappush(ends, (time_s + takes_s + LOAD_S * (not having), chosen))
    return Possible(num_cold / count, sum(uneven) / len(uneven))


def best(room: int, most_uneven: float, seconds: float) -> Possible:
    """Return the fewest cold loads at a load that is this uneven at most."""
    found: list[Possible] = []
    for many, count, some in COPIES:
        copies = [REPLICAS] * many + [some] * count
        copies += [1] * max(REPLICAS * room - sum(copies), 0)
        where = place(copies, room)
        found += [serve(where, seconds, epsilon) for epsilon in (0.25, 0.35, 0.5)]
    return min(each for each in found if each.max_over_mean <= most_uneven)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cold loads by router, and what is possible.")
    parser.add_argument("--routers", nargs="+", default=ROUTERS, choices=ROUTERS)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    file = read_simulation(FILE)
    times = {"duration_s": options.seconds, "warm_up_s": options.seconds / 2}
    simulation = msgspec.structs.replace(file, **times)
    conditions = f"{header(0)} | placement | {options.seconds:.0f} s, the second half"
    for router in options.routers:
        found = simulate(with_router(simulation, router))
        row = (
            f"{router} | {found.loads_per_request:.3f} cold loads by request, "
            f"{found.remote_loads} from the store, {found.disk_loads} from disk | "
            f"busiest / mean {found.max_over_mean_load:.3f} | "
            f"TTFT p50 {found.ttft_p50_s:.3f} s, p99 {found.ttft_p99_s:.3f} s"
        )
        append_row(options.rows, f"{conditions} | {row}")
    for room in (32, 64):
        loads, uneven = best(room, 1.25, options.seconds)
        row = f"possible with room for {room} | {loads:.3f} | busiest / mean {uneven:.3f}"
        append_row(options.rows, f"{conditions} | {row}")


if __name__ == "__main__":
    main()
