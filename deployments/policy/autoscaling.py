"""Autoscaler: how many replicas the load needs, from figures that replicas report.

    work       what arrives, as parts of a replica (`capacity.py`), looking as far ahead as a
               replica takes to start; and what is queued, to be done in `drain_s`
    requests   by the seats that keep the objective's time per token
    kv         of the cache in use, which cannot be moved
    adapters   that running and waiting requests need, by the room for them
    wait       for the first step, if it alone is above the objective: one replica more

The largest one counts. More replicas are wanted once that has held for `up_delay_s`, fewer once
none of the last `down_delay_s` needed as many, with `down_margin` to spare; so the number does not
swing around a threshold. A function of its inputs: no clock.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from deployments.policy.capacity import Capacity, Objective

MOST_BY_WAIT = 2.0  # times what the capacity calls for; more replicas do not mend a slow store
SLOW = 3.0  # the slow average's time is this many times the fast one's; the two show the trend


class ImpossiblePolicy(ValueError):
    """The policy contradicts itself; the message has the numbers."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a parameter may be, both ends too. A search steps through it evenly, or through its
    logarithm."""

    least: float
    most: float
    is_log: bool = False


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """The parameters, each within its entry of RANGES. The config's keys have the same names."""

    busy: float = 0.75  # of a replica's tokens/s and seats, the part to be used
    kv_used: float = 0.8  # of its KV cache
    adapters_used: float = 0.9  # of its room for adapters
    drain_s: float = 10.0  # in which what is queued should be done
    smoothing_s: float = 10.0  # over which arrivals are averaged
    lookahead_s: float = 20.0  # how far ahead arrivals are estimated by their trend
    up_delay_s: float = 2.0
    down_delay_s: float = 60.0
    zero_delay_s: float = 300.0  # without any request, until the last replica goes
    down_margin: float = 0.85  # fewer replicas only if they would be at most this full

    def __post_init__(self) -> None:
        for each in fields(self):
            value, known = getattr(self, each.name), RANGES[each.name]
            if not known.least <= value <= known.most:
                raise ImpossiblePolicy(
                    f"{each.name} is {value:g}, not from {known.least:g} to {known.most:g}"
                )


# All that `reef tune` may search. The objective and the bounds are the user's.
RANGES: dict[str, Range] = {
    "busy": Range(0.2, 1.0),
    "kv_used": Range(0.2, 1.0),
    "adapters_used": Range(0.2, 1.0),
    "drain_s": Range(0.5, 300.0, is_log=True),
    "smoothing_s": Range(0.5, 300.0, is_log=True),
    "lookahead_s": Range(0.0, 600.0),
    "up_delay_s": Range(0.0, 600.0),
    "down_delay_s": Range(1.0, 7200.0, is_log=True),
    "zero_delay_s": Range(1.0, 86400.0, is_log=True),
    "down_margin": Range(0.3, 1.0),
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Replicas at least and at most."""

    min: int = 1
    max: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise ImpossiblePolicy(f"min={self.min} must be from 0 to max={self.max}")
        if self.max < 1:
            raise ImpossiblePolicy(f"max={self.max} must be at least 1")


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What one replica reports. Rates are of what has arrived, done or not."""

    queued_tokens: float = 0.0  # of prompts, not computed
    kv_used: float = 0.0  # 0 to 1
    num_requests: float = 0.0  # running and waiting
    adapters_used: float = 0.0  # of its room, by those that requests need; above 1 if some wait
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    wait_s: float = 0.0  # lately, from a request's arrival in the engine to its first step
    capacity: Capacity = field(default_factory=Capacity)


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas to have from now on, and the figure that calls for the most."""

    replicas: int
    reason: str
    need: float  # replicas, before margins, delays and bounds


class Autoscaler:
    """Decides again and again; times must not decrease. Not thread-safe."""

    def __init__(
        self,
        bounds: Bounds,
        policy: ScalingPolicy | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.bounds = bounds
        self._policy = policy or ScalingPolicy()
        self._objective = objective or Objective()
        self._work = _Trend(self._policy.smoothing_s)
        self._ups, self._downs = _Window(), _Window()
        self._began_s: float | None = None
        self._worked_s = 0.0  # when there was a request last
        self._seats = 1.0

    def follow(self, policy: ScalingPolicy, objective: Objective) -> None:
        """Go by other parameters from now on; what was seen so far is kept."""
        if policy.smoothing_s != self._policy.smoothing_s:
            self._work.time_s = policy.smoothing_s
        self._policy, self._objective = policy, objective

    def decide(
        self, loads: Sequence[ReplicaLoad], target: int, num_held: float, now_s: float
    ) -> Decision:
        """Return the number of replicas to have, which is `target` now.

        `loads` are the reports of those that run, `num_held` the requests that no replica has.
        """
        if not loads and not num_held and target:
            self._worked_s = now_s  # what starts has been asked for
            return Decision(self._within(target), "no report", 0.0)
        if self._began_s is None:
            self._began_s = self._worked_s = now_s
        needs = self._needs(loads, target, num_held, now_s)
        if not loads and not num_held:
            needs = {"idle": 0.0}  # it ended long ago
        reason = max(needs, key=needs.__getitem__)
        return Decision(self._settled(needs[reason], target, now_s), reason, needs[reason])

    # ==== what is needed ====

    def _needs(
        self, loads: Sequence[ReplicaLoad], target: int, num_held: float, now_s: float
    ) -> dict[str, float]:
        policy, tpot_s = self._policy, self._objective.tpot_s
        if loads:
            self._seats = sum([load.capacity.seats(tpot_s) for load in loads]) / len(loads)
        if num_held or any(load.num_requests for load in loads):
            self._worked_s = now_s
        held = num_held / self._seats
        seated = sum([load.num_requests / load.capacity.seats(tpot_s) for load in loads])
        needs = {
            "work": self._work_needed(loads, now_s),
            "requests": (seated + held) / policy.busy,
            "kv": sum([load.kv_used for load in loads]) / policy.kv_used,
            "adapters": sum([load.adapters_used for load in loads]) / policy.adapters_used,
        }
        needs["wait"] = self._needed_by_wait(loads, target, max(needs.values()))
        return needs

    def _work_needed(self, loads: Sequence[ReplicaLoad], now_s: float) -> float:
        policy, tpot_s = self._policy, self._objective.tpot_s
        arriving = sum(
            [
                load.capacity.work(load.prompt_tokens_per_s, load.output_tokens_per_s, tpot_s)
                for load in loads
            ]
        )
        queued_s = sum([load.capacity.prompt_s(load.queued_tokens) for load in loads])
        self._work.add(arriving, now_s)
        return self._work.ahead(policy.lookahead_s) / policy.busy + queued_s / policy.drain_s

    def _needed_by_wait(self, loads: Sequence[ReplicaLoad], target: int, others: float) -> float:
        """Return one more than there are, if first tokens are late and nothing is on its way."""
        late = [load for load in loads if load.wait_s > self._objective.ttft_s]
        if 2 * len(late) <= len(loads) or target > len(loads):
            return 0.0
        return min(len(loads) + 1.0, MOST_BY_WAIT * others + 1.0)

    # ==== what is done about it ====

    def _settled(self, need: float, target: int, now_s: float) -> int:
        policy = self._policy
        up = self._ups.least(math.ceil(need), now_s, policy.up_delay_s)
        down = self._downs.most(math.ceil(need / policy.down_margin), now_s, policy.down_delay_s)
        up, down = self._within(up), self._within(down)
        assert self._began_s is not None
        if now_s - self._worked_s >= policy.zero_delay_s:
            return self.bounds.min  # whatever the averages still hold of what came before
        if up > target:
            return up
        if down >= target or now_s - self._began_s < policy.down_delay_s:
            return self._within(target)
        return max(down, min(target, 1))

    def _within(self, number: int) -> int:
        return min(max(number, self.bounds.min), self.bounds.max)


class _Trend:
    """A number's average over `time_s`, and where it goes.

    Of two averages that follow a steady rise, the slower one is behind by the rise in the time that
    its delay is longer.
    """

    def __init__(self, time_s: float) -> None:
        self.time_s = time_s
        self._fast = self._slow = 0.0
        self._at_s: float | None = None

    def add(self, value: float, now_s: float) -> None:
        if self._at_s is None:
            self._fast = self._slow = value
        else:
            span_s = now_s - self._at_s
            self._fast += (value - self._fast) * -math.expm1(-span_s / self.time_s)
            self._slow += (value - self._slow) * -math.expm1(-span_s / (SLOW * self.time_s))
        self._at_s = now_s

    def ahead(self, seconds: float) -> float:
        """Return the value expected then; one that falls is expected to stay."""
        rise_per_s = max(self._fast - self._slow, 0.0) / ((SLOW - 1) * self.time_s)
        return self._fast + rise_per_s * (self.time_s + seconds) * (seconds > 0)


class _Window:
    """The least or the largest of the latest numbers, each of which is added once."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, int]] = deque()

    def least(self, number: int, now_s: float, span_s: float) -> int:
        return -self.most(-number, now_s, span_s)

    def most(self, number: int, now_s: float, span_s: float) -> int:
        """Add a number; return the largest of those from `span_s` before on."""
        kept = self._kept
        while kept and kept[-1][1] <= number:
            kept.pop()
        kept.append((now_s, number))
        while kept[0][0] < now_s - span_s:
            kept.popleft()
        return kept[0][1]
