"""Scaling: the bounds and the policy of a simulated fleet, with the keys that a config has."""

from collections.abc import Sequence

import msgspec

from deployments.policy.autoscaling import Autoscaler, Bounds, ReplicaLoad, ScalingPolicy
from deployments.policy.capacity import Objective
from deployments.simulator.ray_policy import RayPolicy, RayScaler

PERIOD_S = 0.5  # Serve asks its policy this often
_DEFAULT = ScalingPolicy()


class Autoscaling(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`replicas.autoscaling` of a config but for the objective; ScalingPolicy has the ranges."""

    busy: float = _DEFAULT.busy
    kv_used: float = _DEFAULT.kv_used
    adapters_used: float = _DEFAULT.adapters_used
    drain_s: float = _DEFAULT.drain_s
    smoothing_s: float = _DEFAULT.smoothing_s
    lookahead_s: float = _DEFAULT.lookahead_s
    up_delay_s: float = _DEFAULT.up_delay_s
    down_delay_s: float = _DEFAULT.down_delay_s
    zero_delay_s: float = _DEFAULT.zero_delay_s
    down_margin: float = _DEFAULT.down_margin

    def __post_init__(self) -> None:
        _ = self.policy  # raises what is out of its range

    @property
    def policy(self) -> ScalingPolicy:
        return ScalingPolicy(**msgspec.structs.asdict(self))


class Scaling(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """With equal bounds the number of replicas stays."""

    min: int = 1
    max: int = 1
    autoscaling: Autoscaling = Autoscaling()
    ray: RayPolicy | None = None  # Ray Serve's own policy, in place of ours

    def __post_init__(self) -> None:
        _ = self.bounds

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.min, self.max)


class Scaler:
    """Our policy, of which only the number is asked for."""

    def __init__(self, scaling: Scaling, objective: Objective) -> None:
        self._autoscaler = Autoscaler(scaling.bounds, scaling.autoscaling.policy, objective)

    def decide(self, loads: Sequence[ReplicaLoad], target: int, num_held: int, now_s: float) -> int:
        """Return the number of replicas to have from now on."""
        return self._autoscaler.decide(loads, target, num_held, now_s).replicas


def make_scaler(scaling: Scaling, objective: Objective) -> Scaler | RayScaler:
    if scaling.ray is None:
        return Scaler(scaling, objective)
    return RayScaler(scaling.ray, scaling.min, scaling.max)
