"""Scaler: the number of replicas over time, by the real policy and Ray Serve's delays around it."""

import math
from collections.abc import Sequence

import msgspec

from deployments.policy.autoscaling import ReplicaLoad, ScalingTargets, wanted_replicas
from deployments.simulator.checked import Count, Positive, Seconds, Share
from deployments.simulator.ray_policy import RayPolicy, RayScaler

PERIOD_S = 0.5  # Serve asks its policy this often


class Scaling(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The bounds and the policy; with equal bounds the number stays."""

    min: Count = 1
    max: Count = 1
    queued_tokens: Positive = 4096.0
    kv_used: Share = 0.8
    num_requests: Positive = 32.0
    down_margin: Share = 0.7
    upscale_delay_s: Seconds = 2.0
    downscale_delay_s: Seconds = 60.0
    ray: RayPolicy | None = None  # Ray Serve's own policy, in place of ours

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, above max, which is {self.max}")

    @property
    def targets(self) -> ScalingTargets:
        return ScalingTargets(self.queued_tokens, self.kv_used, self.num_requests, self.down_margin)


class Scaler:
    """Decides as Serve does: a wish must last for its delay before it is carried out."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling
        self._up_since_s = self._down_since_s = math.inf

    def decide(self, loads: Sequence[ReplicaLoad], target: int, num_held: int, now_s: float) -> int:
        """Return the number of replicas to have from now on."""
        scaling = self._scaling
        wanted = wanted_replicas(loads, target, num_held, scaling.targets)
        wanted = min(max(wanted, scaling.min), scaling.max)
        self._up_since_s = min(self._up_since_s, now_s) if wanted > target else math.inf
        self._down_since_s = min(self._down_since_s, now_s) if wanted < target else math.inf
        if now_s - self._up_since_s >= scaling.upscale_delay_s and wanted > target:
            self._up_since_s = math.inf
            return wanted
        if now_s - self._down_since_s >= scaling.downscale_delay_s and wanted < target:
            self._down_since_s = math.inf
            return wanted
        return target


def make_scaler(scaling: Scaling) -> Scaler | RayScaler:
    if scaling.ray is None:
        return Scaler(scaling)
    return RayScaler(scaling.ray, scaling.min, scaling.max)
