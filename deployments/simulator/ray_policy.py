"""RayScaler: what Ray Serve's own policy decides, to compare with.

It keeps requests per replica at a target: requests, averaged over a time, by `target`, moved by a
factor, within the bounds, once the wish has lasted for its delay. The defaults are Ray's.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import msgspec

from deployments.simulator.checked import Positive, Seconds

EPSILON_S = 1e-6


class RayPolicy(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Ray Serve's keys of `autoscaling_config`, with its defaults."""

    target_ongoing_requests: Positive = 2.0
    upscaling_factor: Positive = 1.0
    downscaling_factor: Positive = 1.0
    upscale_delay_s: Seconds = 30.0
    downscale_delay_s: Seconds = 600.0
    look_back_period_s: Positive = 30.0


class HasRequests(Protocol):
    @property
    def num_requests(self) -> float: ...


class RayScaler:
    """Decides on the number of replicas as Ray Serve does. It never goes below one."""

    def __init__(self, policy: RayPolicy, least: int, most: int) -> None:
        self._policy, self._least, self._most = policy, max(least, 1), most
        self._seen: deque[tuple[float, float]] = deque()  # (time, requests)
        self._direction = 0
        self._since_s = 0.0

    def decide(self, loads: Sequence[HasRequests], target: int, num_held: int, now_s: float) -> int:
        """Return the number of replicas to have from now on, which is `target` now."""
        requests = self._averaged(sum(load.num_requests for load in loads) + num_held, now_s)
        running = len(loads)
        if not running:
            return max(target, self._least)
        wanted = self._wanted(requests, running)
        return self._delayed(min(max(wanted, self._least), self._most), target, now_s)

    def _averaged(self, requests: float, now_s: float) -> float:
        self._seen.append((now_s, requests))
        while self._seen[0][0] < now_s - self._policy.look_back_period_s:
            self._seen.popleft()
        return sum(count for _, count in self._seen) / len(self._seen)

    def _wanted(self, requests: float, running: int) -> int:
        policy = self._policy
        needed = requests / policy.target_ongoing_requests
        factor = policy.upscaling_factor if needed > running else policy.downscaling_factor
        wanted = math.ceil(running + factor * (needed - running))
        return wanted - (math.ceil(needed) < running and wanted == running)

    def _delayed(self, wanted: int, target: int, now_s: float) -> int:
        direction = (wanted > target) - (wanted < target)
        if direction != self._direction or not direction:
            self._direction, self._since_s = direction, now_s
        policy = self._policy
        delay_s = policy.upscale_delay_s if direction > 0 else policy.downscale_delay_s
        if not direction or now_s - self._since_s + EPSILON_S < delay_s:
            return target
        self._direction = 0
        return wanted
