"""What a tuned policy saves beside Ray Serve's, tuned by the same search and by default.

    python -m tests.bench.tuning_bench day --trials 40

Three workloads in virtual time: `day`, whose rate swings; `bursts`, whose gaps have ten times the
variance of Poisson's; `crowd`, a day in which half of the requests are for one adapter for a while.
Replicas have eight seats and take 20 s to start. GPU-hours are means over held-out seeds, the part
of requests that kept the objective is that of the worst one; the machine's speed has no effect.
"""

import argparse
from pathlib import Path
from typing import Any

from deployments.simulator.config import Simulation, as_simulation
from deployments.simulator.pool import Pool
from deployments.simulator.space import RAY, REEF
from deployments.simulator.tuning import Outcome, Search, search
from deployments.strict_yaml import read_yaml
from tests.bench.environment import append_row, header

FILE = Path(__file__).parents[2] / "configs" / "simulate-tuning.yaml"
DAY_S = 600
WORKLOADS: dict[str, dict[str, Any]] = {
    "day": {},
    "bursts": {"arrivals": {"rate": 4.0, "burstiness": 10.0, "day_s": DAY_S, "swing": 0.5}},
    "crowd": {
        "arrivals": {"rate": 4.0, "day_s": DAY_S, "swing": 0.7},
        "popularity": {"adapters": 100, "flash_at_s": 200, "flash_s": 120, "drift_s": 60},
    },
}


def make_simulation(workload: str, attained: float) -> Simulation:
    document = read_yaml(FILE)
    document["workload"] |= WORKLOADS[workload]
    document["objective"]["attained"] = attained
    return as_simulation(document, workload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--attained", type=float, default=0.95)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    for workload in options.workloads:
        simulation = make_simulation(workload, options.attained)
        with Pool(options.processes) as pool:
            ours, rays = [
                search(
                    simulation,
                    space,
                    trials=options.trials,
                    seeds=range(options.seeds),
                    pool=pool,
                )
                for space in (REEF, RAY)
            ]
        append_row(options.rows, as_row(workload, ours, rays, options))


def as_row(workload: str, ours: Search, rays: Search, options: argparse.Namespace) -> str:
    best = ours.held_out.gpu_hours
    beside = [
        f"{name} {_shown(outcome)}, {1 - best / outcome.gpu_hours:+.1%} saved"
        for name, outcome in (
            ("our defaults", ours.defaults),
            ("Ray's tuned", rays.held_out),
            ("Ray's defaults", rays.defaults),
        )
    ]
    conditions = (
        f"{options.trials} trials, {options.seeds} seeds, as many held out, "
        f"objective for {options.attained:.0%}"
    )
    found = (
        f"ours {dict(ours.space.block(ours.winner))}, Ray's {dict(rays.space.block(rays.winner))}"
    )
    parts = [header(0), "tuning", workload, conditions, f"tuned {_shown(ours.held_out)}", *beside]
    return " | ".join([*parts, found])


def _shown(outcome: Outcome) -> str:
    return f"{outcome.gpu_hours:.3f} GPU-hours at {outcome.attained:.2%}"


if __name__ == "__main__":
    main()
