"""Simulates a tenant that floods an engine beside one that sends less than its share.

    python -m tests.bench.fairness_bench --rows rows.txt

In virtual time, with the engine's own scheduler and the simulator's default costs of steps. The
guest sends 0.3 of what the engines can serve, the flood ten times its own half. Three runs of the
same requests: the guest alone, both as tenants, and both as one tenant, first come first served.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from deployments.policy.shared_service import OthersService, OwnService, ServiceReport
from deployments.simulator.clock import Clock
from deployments.simulator.profile import Profile
from deployments.simulator.prompts import make_prompt
from deployments.simulator.records import Stretch
from deployments.simulator.replica import ReplicaSize, SimulatedReplica
from deployments.simulator.workload import Lengths, draw_length
from engine.scheduler.classes import Flow, PriorityClass
from engine.scheduler.fairness import bound, credit_of
from engine.scheduler.request import CacheScope, Request, SamplingParams
from engine.scheduler.scheduler import Progress, Scheduler
from tests.bench.environment import append_row, header

GUEST, FLOOD = "guest", "flood"
GUEST_SHARE, FLOOD_SHARE = 0.3, 5.0  # of the requests that the engine can serve
SIZE = ReplicaSize(max_num_seqs=64)
RENEW_S = 2.0  # of a lease, which brings what one engine gave, and takes it to another
WARM_S = 10.0  # both begin at once, with nothing saved up: what comes first is not counted


class Traffic(NamedTuple):
    """How long everybody's requests are, and how many engines get them in turn."""

    prompt: Lengths
    output: Lengths
    engines: int = 1


TRAFFICS = {
    "chats": Traffic(Lengths(), Lengths(median=100.0, most=512)),
    "long answers": Traffic(Lengths(median=100.0), Lengths(median=600.0, most=1500)),
}


class Listener:
    """Notes when the guest's first tokens come, and counts everybody's tokens."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ttfts: list[float] = []
        self.num_tokens = self.num_ended = 0
        self.widest_gap = 0.0

    def on_progress(self, progress: list[Progress]) -> None:
        for each in progress:
            request = each.request
            self.num_tokens += len(each.token_ids)
            is_first = len(request.output_token_ids) == len(each.token_ids)
            is_guest = request.request_id.startswith(GUEST)
            if is_first and is_guest and request.arrival_s >= WARM_S:
                self.ttfts.append(self.clock.now_s - request.arrival_s)

    def on_run(self, requests: Sequence[Request], stretch: Stretch) -> None:
        self.num_tokens += len(requests) * stretch.num_steps

    def on_end(self, request: Request) -> None:
        self.num_ended += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="What a flood does to another tenant.")
    parser.add_argument("--seconds", type=float, default=300.0, help="of virtual time")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--engines", type=int, default=1, help="that get requests in turn")
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    parser.add_argument("--traffic", choices=TRAFFICS, action="append", help="all by default")
    options = parser.parse_args()
    for name in options.traffic or TRAFFICS:
        traffic = TRAFFICS[name]
        told = compare(traffic._replace(engines=options.engines), options.seconds, options.seeds)
        conditions = f"{header(0)} | fairness | {options.seconds:g} s, {options.seeds} seeds"
        conditions += f", {options.engines} engines"
        append_row(options.rows, f"{conditions} | {name} | {told}")


def compare(traffic: Traffic, seconds: float, num_seeds: int) -> str:
    ratios: dict[str, list[float]] = {"fair": [], "first come": [], "tokens": []}
    gaps = list[float]()
    seats = SIZE.max_num_seqs
    most = bound(traffic.prompt.most, seats * traffic.output.most, credit_of(seats))
    for seed in range(num_seeds):
        rate = capacity(traffic, seed, seconds)
        guest = arrivals(GUEST, GUEST_SHARE * rate, seed, seconds)
        flood = arrivals(FLOOD, FLOOD_SHARE * rate, seed, seconds)
        alone = run(traffic, guest, seconds)
        fair = run(traffic, [*guest, *flood], seconds)
        one = run(traffic, [*guest, *flood], seconds, is_one_tenant=True)
        ratios["fair"].append(p99(fair) / p99(alone))
        ratios["first come"].append(p99(one) / p99(alone))
        ratios["tokens"].append(fair.num_tokens / one.num_tokens)
        gaps.append(fair.widest_gap)
        if fair.widest_gap > most:
            sys.exit(f"two that waited were {fair.widest_gap:.0f} apart, beyond {most:.0f}")
    told = f"guest's p99 TTFT beside a flood {spread(ratios['fair'])} x alone, first come first "
    told = f"{told}served {spread(ratios['first come'])} x; tokens/s {spread(ratios['tokens'])} x; "
    told += f"while both waited, at most {max(gaps):.0f} of {most:.0f} apart"
    return told


def p99(listener: Listener) -> float:
    return statistics.quantiles(listener.ttfts, n=100)[98]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def capacity(traffic: Traffic, seed: int, seconds: float) -> float:
    """Return the requests per second that engines serve which never have none waiting."""
    enough = arrivals(FLOOD, 200.0 * traffic.engines, seed, seconds)
    return run(traffic, enough, seconds).num_ended / seconds


def arrivals(name: str, rate: float, seed: int, seconds: float) -> list[tuple[float, str]]:
    return list(_drawn(name, rate, Random(f"{seed}/{name}"), seconds))


def _drawn(name: str, rate: float, rng: Random, seconds: float) -> Iterator[tuple[float, str]]:
    time_s, number = rng.expovariate(rate), 0
    while time_s < seconds:
        yield time_s, f"{name}-{number}"
        number += 1
        time_s += rng.expovariate(rate)


def run(
    traffic: Traffic,
    arriving: list[tuple[float, str]],
    seconds: float,
    *,
    is_one_tenant: bool = False,
) -> Listener:
    clock = Clock()
    listener = Listener(clock)
    replicas = [
        SimulatedReplica(f"replica-{i}", SIZE, Profile(), clock, listener)
        for i in range(traffic.engines)
    ]
    for number, (time_s, name) in enumerate(sorted(arriving)):
        tenant = "all" if is_one_tenant else name.partition("-")[0]
        request = make_request(traffic, number, time_s, name, tenant)
        replica = replicas[number % len(replicas)]
        clock.at(time_s, partial(replica.submit, request, 0))

    if len(replicas) > 1:
        Telling(clock, replicas).tell()

    def is_over() -> bool:
        gaps = [gap(replica.scheduler) for replica in replicas]
        listener.widest_gap = max(listener.widest_gap, *gaps)
        return clock.now_s >= seconds

    clock.run(is_over)
    return listener


class Telling:
    """Has engines tell each other what they gave, as often and as late as through an ingress."""

    def __init__(self, clock: Clock, replicas: Sequence[SimulatedReplica]) -> None:
        self._clock = clock
        self._nodes = [(r, OwnService(r.replica_id), OthersService()) for r in replicas]

    def tell(self) -> None:
        for replica, own, _ in self._nodes:
            scheduler = replica.scheduler
            scheduler.service.settle(scheduler.running)
            news = scheduler.service.take_news().items()
            own.add((flow.tenant, flow.priority_class, tokens) for flow, tokens in news)
            if (report := own.take_report()) is not None:
                self._clock.after(RENEW_S, partial(self._hear, report))
        self._clock.after(RENEW_S, self.tell)

    def _hear(self, report: ServiceReport) -> None:
        for replica, _, others in self._nodes:
            if replica.replica_id == report.replica_id:
                continue
            scheduler, news = replica.scheduler, others.take([report], self._clock.now_s)
            flows = [(Flow(tenant, PriorityClass(rank)), n) for tenant, rank, n in news]
            scheduler.service.settle(scheduler.running)
            scheduler.service.count_elsewhere(flows, scheduler.waiting.flows)


def gap(scheduler: Scheduler) -> float:
    """Return how far the counters of guest and flood are apart while both wait; else 0."""
    service, flows = scheduler.service, {Flow(GUEST), Flow(FLOOD)}
    if not flows <= scheduler.waiting.flows:
        return 0.0
    service.settle(scheduler.running)
    return abs(service[Flow(GUEST)] - service[Flow(FLOOD)])


def make_request(traffic: Traffic, number: int, time_s: float, name: str, tenant: str) -> Request:
    rng = Random(name)
    sampling = SamplingParams(max_tokens=draw_length(traffic.output, rng), ignore_eos=True)
    prompt = make_prompt(number, draw_length(traffic.prompt, rng))
    return Request(name, prompt, sampling, time_s, CacheScope(tenant))


if __name__ == "__main__":
    main()
