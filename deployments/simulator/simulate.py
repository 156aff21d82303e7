"""Runs a simulation, and sums it up."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import NamedTuple

import msgspec

from deployments.simulator.clock import Clock
from deployments.simulator.config import Simulation
from deployments.simulator.fleet import Fleet
from deployments.simulator.records import Outcomes, Record, Timeline
from deployments.simulator.replica import SimulatedReplica
from deployments.simulator.scaling import PERIOD_S
from deployments.simulator.workload import Arrival, make_arrivals

DRAIN_S = 3600.0  # after the last arrival; what is open then counts as lost


class Summary(msgspec.Struct, frozen=True):
    """Figures of all requests after the warm-up. Times in seconds."""

    requests: int
    finished: int
    attained: float  # the share of requests that kept the objective
    goodput_per_s: float  # such requests by second
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    longest_gap_p99_s: float
    cached_prompt_share: float  # of prompts' tokens, found in the prefix cache
    remote_loads: int
    disk_loads: int
    device_loads: int
    loads_per_request: float  # from the store or from disk, of requests with an adapter
    max_over_mean_load: float  # mean over time of the busiest replica's requests over all's mean
    # Weighted tokens over the tenant's weight, the most that lay between two which waited at one
    # replica (engine/scheduler/fairness.py)
    service_gap: float
    replica_hours: float
    gpu_hours: float
    cost: float
    preemptions: int
    steps: int


class Result(NamedTuple):
    """A simulation's figures, and what they are made of."""

    summary: Summary
    outcomes: Outcomes
    timeline: Timeline


def simulate(simulation: Simulation, seed: int = 0) -> Summary:
    """Run the simulation; return its figures."""
    return run(simulation, seed).summary


def run(
    simulation: Simulation,
    seed: int = 0,
    arrivals: Iterator[Arrival] | None = None,
    watch: Callable[[int], object] = lambda _: None,
    on_record: Callable[[Record], object] = lambda _: None,
    runs_together: bool = True,
) -> Result:
    """Run the simulation. `arrivals` replace those of its workload; `watch` is called with 1 for
    each of its seconds, `on_record` with each request once it has ended, or at the end.

    Without `runs_together` every step is an event of its own: slower, with the same result.
    """
    clock = Clock()
    outcomes = Outcomes(simulation.warm_up_s, partial(_is_good, simulation))

    def take(record: Record) -> None:
        outcomes.add(record)
        on_record(record)

    fleet = Fleet(simulation, clock, seed, take, runs_together=runs_together)
    if arrivals is None:
        arrivals = make_arrivals(
            simulation.workload,
            seed,
            simulation.duration_s,
            simulation.fleet.size.max_model_len,
        )
    _Feeder(clock, fleet, arrivals).feed()
    clock.at(0.0, fleet.report)
    clock.at(simulation.warm_up_s, fleet.begin_to_count)
    clock.at(simulation.duration_s, fleet.timeline.end_counting)
    scaling = simulation.fleet.scaling
    if scaling.min != scaling.max:
        clock.at(PERIOD_S, fleet.scale)
    for second in range(1, int(simulation.duration_s) + 1):
        clock.at(float(second), partial(watch, 1))
    _plan_faults(simulation, clock, fleet, Random(f"{seed}/faults"))
    end_s = simulation.duration_s
    clock.run(
        lambda: clock.now_s > end_s and (not fleet.open_records or clock.now_s > end_s + DRAIN_S)
    )
    for record in fleet.open_records:
        take(record)
    summary = summarize(simulation, outcomes, list(fleet.close()), fleet)
    return Result(summary, outcomes, fleet.timeline)


class _Feeder:
    """Sets the next arrival once the last one has come: a million are never in memory at once."""

    def __init__(self, clock: Clock, fleet: Fleet, arrivals: Iterator[Arrival]) -> None:
        self._clock, self._fleet, self._arrivals = clock, fleet, arrivals

    def feed(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self._clock.at(arrival.time_s, lambda: self._arrive(arrival))

    def _arrive(self, arrival: Arrival) -> None:
        self._fleet.arrive(arrival)
        self.feed()


def _plan_faults(simulation: Simulation, clock: Clock, fleet: Fleet, rng: Random) -> None:
    faults = simulation.faults
    for every_s, happens in (
        (faults.kill_every_s, fleet.kill_one),
        (faults.reclaim_every_s, fleet.reclaim_one),
    ):
        for i in range(1, int(simulation.duration_s / every_s) + 1 if every_s else 0):
            clock.at(i * every_s, partial(happens, rng))


def summarize(
    simulation: Simulation, outcomes: Outcomes, replicas: Sequence[SimulatedReplica], fleet: Fleet
) -> Summary:
    span_s = max(simulation.duration_s - simulation.warm_up_s, 1e-9)
    ttft, tpot, gaps = sorted(outcomes.ttft_s), sorted(outcomes.tpot_s), sorted(outcomes.gap_s)
    loads, hours = fleet.loads, fleet.replica_s / 3600
    return Summary(
        requests=outcomes.num_requests,
        finished=outcomes.num_finished,
        attained=outcomes.num_good / max(outcomes.num_requests, 1),
        goodput_per_s=outcomes.num_good / span_s,
        tokens_per_s=outcomes.num_tokens / span_s,
        ttft_p50_s=percentile(ttft, 0.5),
        ttft_p90_s=percentile(ttft, 0.9),
        ttft_p99_s=percentile(ttft, 0.99),
        tpot_p50_s=percentile(tpot, 0.5),
        tpot_p99_s=percentile(tpot, 0.99),
        longest_gap_p99_s=percentile(gaps, 0.99),
        cached_prompt_share=outcomes.num_cached_tokens / max(outcomes.num_prompt_tokens, 1),
        remote_loads=loads.remote,
        disk_loads=loads.disk,
        device_loads=loads.host,
        loads_per_request=(loads.remote + loads.disk) / max(fleet.num_with_adapter, 1),
        max_over_mean_load=_mean(fleet.timeline.max_over_mean, 1.0),
        service_gap=fleet.service_gap,
        replica_hours=hours,
        gpu_hours=hours * simulation.fleet.gpus,
        cost=hours * simulation.fleet.price_per_hour,
        preemptions=sum(replica.scheduler.num_preemptions for replica in replicas),
        steps=sum(replica.num_steps for replica in replicas),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which that share of them lies; 0 of none."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _is_good(simulation: Simulation, record: Record) -> bool:
    objective = simulation.objective
    ttft_s, tpot_s = record.ttft_s, record.tpot_s
    return (ttft_s is not None and ttft_s <= objective.ttft_s) and (
        tpot_s is None or tpot_s <= objective.tpot_s
    )
