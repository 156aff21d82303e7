"""Measures the cost of a routing decision: `policy.routing.rank` over replicas with figures.

    python -m tests.bench.routing_bench --rows rows.txt

CPU microseconds per decision, with an adapter that one replica in four has on its device, for
1, 2, 8 and 32 replicas; median over rounds. Ray's own part of a call is excluded.
"""

import argparse
import statistics
import time
from pathlib import Path

from deployments.policy.routing import (
    OptimisticView,
    ReplicaFigures,
    RoutedRequest,
    RoutingCosts,
    rank,
)
from tests.bench.environment import append_row, header

REPLICAS = (1, 2, 8, 32)
DECISIONS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a routing decision.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    for count in REPLICAS:
        median = statistics.median(us_per_decision(count) for _ in range(options.rounds))
        conditions = f"{header(0)} | routing | {DECISIONS} decisions, {options.rounds} rounds"
        append_row(options.rows, f"{conditions} | {count} replicas | {median:.1f} us/decision")


def us_per_decision(count: int) -> float:
    view, ids = (
        OptimisticView(ReplicaFigures(max_num_seqs=64)),
        [f"replica-{i}" for i in range(count)],
    )
    for i, replica_id in enumerate(ids):
        adapters = frozenset({"warm"}) if i % 4 == 0 else frozenset()
        view.report(replica_id, ReplicaFigures(max_num_seqs=64, device_adapters=adapters))
    requests = [RoutedRequest(f"r{n}", 128, "warm" if n % 2 else "") for n in range(DECISIONS)]
    start = time.process_time()
    for request in requests:
        view.sent(rank(ids, request, view, RoutingCosts())[0], request)
    return (time.process_time() - start) / DECISIONS * 1e6


if __name__ == "__main__":
    main()
