"""Floors: what a request takes that nothing delays, whatever the router and the policy do.

An objective that so many requests miss for this reason alone is refused, since a search would look
for what is not there.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import TYPE_CHECKING

from deployments.simulator.profile import Profile, StepWork
from deployments.simulator.workload import Lengths, Popularity
from engine.scheduler.step_time import StepShape, num_pairs

if TYPE_CHECKING:
    from deployments.simulator.config import FleetSection, Simulation

LUCK = 3.0  # standard deviations by which fewer adapters than expected may be asked for


def below_floor(simulation: "Simulation") -> str:
    """Why no policy keeps the objective, with the numbers; empty if one may."""
    reasons = (_ttft(simulation), _tpot(simulation), _first_of_adapters(simulation))
    return next(filter(None, reasons), "")


def _ttft(simulation: "Simulation") -> str:
    workload, objective = simulation.workload, simulation.objective
    tokens = 1 if workload.trace else _longest(workload.prompt, objective.attained)
    floor_s = prefill_s(simulation.profile, tokens, simulation.fleet.size.max_num_batched_tokens)
    if objective.ttft_s >= floor_s:
        return ""
    return (
        f"objective.ttft_s is {objective.ttft_s:g} s, below what the first token takes by the "
        f"profile on a replica that does nothing else: {floor_s:.4g} s with a prompt of {tokens} "
        f"tokens, as long as those are of which objective.attained is {objective.attained:g}"
    )


def _tpot(simulation: "Simulation") -> str:
    objective = simulation.objective
    floor_s = simulation.profile.step_s(StepWork(StepShape(1, 1, 1)))
    if objective.tpot_s >= floor_s:
        return ""
    return (
        f"objective.tpot_s is {objective.tpot_s:g} s, below what a step takes by the profile in "
        f"which one request decodes: {floor_s:.4g} s"
    )


def _first_of_adapters(simulation: "Simulation") -> str:
    """Compare with requests that are the first ones of their adapters, which must be fetched."""
    workload, objective = simulation.workload, simulation.objective
    cold_s = cold_load_s(simulation.profile, simulation.fleet)
    cold_s += prefill_s(simulation.profile, 1, 1)
    rate, until_s = workload.arrivals.rate, simulation.duration_s
    since_s = min(simulation.warm_up_s, until_s)
    allowed = (1 - objective.attained) * rate * (until_s - since_s)
    if workload.trace or objective.ttft_s >= cold_s:
        return ""
    expected = first_requests(workload.popularity, rate * since_s, rate * until_s)
    if expected - LUCK * math.sqrt(expected) <= allowed:
        return ""
    return (
        f"objective.ttft_s is {objective.ttft_s:g} s, below what an adapter's first request takes "
        f"by the profile, {cold_s:.4g} s with its way from the store; about {expected:.0f} "
        f"requests are the first of their adapter, and objective.attained={objective.attained:g} "
        f"leaves {allowed:.0f}; allow more of them, a longer time, or a longer warm_up_s"
    )


def prefill_s(profile: Profile, num_tokens: int, max_num_batched_tokens: int) -> float:
    """Return the seconds of the steps that compute a prompt, and nothing else."""
    total_s, start = 0.0, 0
    while start < num_tokens:
        count = min(num_tokens - start, max_num_batched_tokens)
        is_last = start + count == num_tokens
        shape = StepShape(count, int(is_last), 0, num_pairs(start, count))
        total_s += profile.step_s(StepWork(shape, new_requests=int(start == 0)))
        start += count
    return total_s


def cold_load_s(profile: Profile, fleet: "FleetSection") -> float:
    """Return the seconds of the smallest adapter's way from the store into host memory."""
    nbytes = fleet.least_adapter_bytes
    return profile.fetch_s(nbytes) + profile.decode_s(nbytes)


def first_requests(popularity: Popularity, num_before: float, num_until: float) -> float:
    """Return how many requests are expected to be the first of their adapter, of those after
    `num_before` and up to `num_until`, that come independently of each other."""
    return sum(
        math.exp(-share * num_before) - math.exp(-share * num_until)
        for share in _shares(popularity)
    )


def _shares(popularity: Popularity) -> Iterator[float]:
    """Yield each adapter's share of all requests."""
    exponent = popularity.exponent if popularity.kind == "zipf" else 0.0
    weights = [(rank + 1) ** -exponent for rank in range(popularity.adapters)]
    total = sum(weights) / (1 - popularity.base_share) if popularity.base_share < 1 else math.inf
    return (weight / total for weight in weights)


def _longest(lengths: Lengths, part: float) -> int:
    """Return the length that so large a part of the lengths does not exceed."""
    if part >= 1:
        return lengths.most
    longest = lengths.median * math.exp(lengths.sigma * _normal_quantile(part))
    return min(max(round(longest), 1), lengths.most)


def _normal_quantile(part: float) -> float:
    return NormalDist().inv_cdf(part) if part > 0 else -math.inf
