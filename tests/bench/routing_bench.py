"""Measures the cost of a routing decision: `policy.routing.Router` over replicas with figures.

    python -m tests.bench.routing_bench --rows rows.txt

CPU microseconds per decision, requests of the base and of `--adapters` adapters by Zipf's law, each
of which is at one replica; for 1, 2, 8, 32 and 64 replicas; median over rounds. Ray's own part of a
call is excluded.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from deployments.policy.rendezvous import Rendezvous
from deployments.policy.replica_view import ReplicaFigures
from deployments.policy.routing import RoutedRequest, Router, RoutingCosts
from tests.bench.environment import append_row, header

REPLICAS = (1, 2, 8, 32, 64)
DECISIONS = 20_000
NUM_ON_DEVICE = 32
REPORT_EVERY = 500  # decisions; each replica reports at once


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a routing decision.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    for count in REPLICAS:
        times = [us_per_decision(count, options.adapters) for _ in range(options.rounds)]
        conditions = f"{header(0)} | routing | {DECISIONS} decisions, {options.rounds} rounds"
        row = f"{count} replicas, {options.adapters} adapters"
        median = statistics.median(times)
        append_row(options.rows, f"{conditions} | {row} | {median:.1f} us/decision")


def us_per_decision(count: int, num_adapters: int) -> float:
    router, rng = Router(RoutingCosts(), ReplicaFigures(max_num_seqs=64)), Random(0)
    ids = [f"replica-{i}" for i in range(count)]
    digests = [f"{n:012x}" for n in range(num_adapters)]
    reports = dict(zip(ids, make_reports(ids, digests, rng), strict=True))
    requests = [
        RoutedRequest(f"r{n}", 128, digests[int(num_adapters ** rng.random()) - 1] if n % 2 else "")
        for n in range(DECISIONS)
    ]
    for replica_id, report in reports.items():
        router.report(replica_id, report)
    for digest in digests:
        router.replica_set(digest)  # remembered, as in a router that has run for a while
    start = time.process_time()
    for n, request in enumerate(requests):
        if n % REPORT_EVERY == 0:
            for replica_id, report in reports.items():
                router.report(replica_id, replace(report, num_received=n))
        router.sent(router.choose(ids, request), request, n * 1e-3)
    return (time.process_time() - start) / DECISIONS * 1e6


def make_reports(ids: list[str], digests: list[str], rng: Random) -> list[ReplicaFigures]:
    """Each adapter is where its requests go; the most wanted ones are on the device."""
    rendezvous = Rendezvous([(replica_id, 1.0) for replica_id in ids])
    homes: dict[str, list[str]] = {replica_id: [] for replica_id in ids}
    for digest in digests:
        homes[rendezvous.order(digest)[0]].append(digest)
    return [
        ReplicaFigures(
            num_requests=rng.randrange(16, 24),
            max_num_seqs=64,
            queued_tokens=100 * rng.randrange(10),
            device_adapters=frozenset(adapters[:NUM_ON_DEVICE]),
            disk_adapters=frozenset(adapters),
        )
        for adapters in homes.values()
    ]


if __name__ == "__main__":
    main()
