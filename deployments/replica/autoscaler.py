"""LoadPolicy: Ray's autoscaling policy on top of `policy.autoscaling`.

Ray pickles this module by value and calls it in its controller. Its factors and delays are set so
that they do nothing; its bounds are the policy's own. What is left of Ray: it goes to zero from one
replica only, and from zero to one on its own where a call waits for a replica. Ray's count of
requests is of no use, because an ingress has one stream to each replica however many requests there
are: all figures are reported by the replicas.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from ray.serve.config import AutoscalingContext

from deployments.policy.autoscaling import Autoscaler, Bounds, ReplicaLoad, ScalingPolicy
from deployments.policy.capacity import Capacity, Objective

logger = logging.getLogger(__name__)

FIGURES = tuple(f.name for f in fields(ReplicaLoad) if f.name != "capacity")
OBJECTIVE_FIGURES = tuple(f.name for f in fields(Objective))
SETTING = "setting_"
CAPACITY_FIGURES = tuple(f.name for f in fields(Capacity))


def to_stats(load: ReplicaLoad) -> dict[str, float]:
    """Write a replica's autoscaling stats."""
    figures = asdict(load)
    capacity = figures.pop("capacity")
    return {name: float(figure) for name, figure in (figures | capacity).items()}


def to_settings(objective: Objective, policy: ScalingPolicy) -> dict[str, float]:
    """Write what the policy is to go by from now on, as figures that a replica reports.

    Ray hands a policy nothing but such figures without starting all replicas anew.
    """
    given = asdict(objective) | asdict(policy)
    return {SETTING + name: float(value) for name, value in given.items()}


class LoadPolicy:
    """`objective` and `policy` are the fields of Objective and ScalingPolicy."""

    def __init__(
        self,
        objective: dict[str, float] | None = None,
        policy: dict[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        wanted = Objective(**objective or {})
        self._objective, self._has_warned = wanted, False
        rules = ScalingPolicy(**policy or {})
        self._settings: dict[str, float] = {**asdict(wanted), **asdict(rules)}
        self._autoscaler = Autoscaler(Bounds(), rules, wanted)

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas. Ray passes the bounds, which a deploy may change."""
        most = max(ctx.capacity_adjusted_max_replicas, 1)
        self._autoscaler.bounds = Bounds(min(ctx.capacity_adjusted_min_replicas, most), most)
        loads, target = _loads(ctx), ctx.target_num_replicas
        self._follow(ctx)
        self._check(loads)
        return self._autoscaler.decide(loads, target, 0.0, self._clock()).replicas, {}

    def _follow(self, ctx: AutoscalingContext) -> None:
        """Go by what the newest replica reports that it was told, or by its own settings.

        For a second after a change Ray hands over means of before and after, which are in range.
        """
        metrics: dict[str, dict[Any, float]] = ctx.aggregated_metrics or {}
        reported = metrics.get(CAPACITY_FIGURES[0], {})
        latest = next((r for r in reversed(ctx.running_replicas) if r in reported), None)
        if latest is None:
            return
        settings = {
            name: metrics.get(SETTING + name, {}).get(latest, default)
            for name, default in self._settings.items()
        }
        objective = Objective(**{name: settings.pop(name) for name in OBJECTIVE_FIGURES})
        self._objective = objective
        self._autoscaler.follow(ScalingPolicy(**settings), objective)

    def _check(self, loads: list[ReplicaLoad]) -> None:
        """Say once if no number of replicas keeps the objective: it takes a step to get a token."""
        least_s = min([load.capacity.least_tpot_s for load in loads], default=0.0)
        for name, wanted_s in asdict(self._objective).items():
            if wanted_s < least_s and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "autoscaling.%s is %g, but a step takes %.3g s for a request alone on a "
                    "replica: no number of replicas keeps the objective",
                    name,
                    wanted_s,
                    least_s,
                )


def _loads(ctx: AutoscalingContext) -> list[ReplicaLoad]:
    """Read the reports; a replica that has not reported yet is left out."""
    metrics = ctx.aggregated_metrics or {}
    reported = metrics.get(CAPACITY_FIGURES[0], {})
    return [
        ReplicaLoad(
            **{name: metrics.get(name, {}).get(replica, 0.0) for name in FIGURES},
            capacity=Capacity(
                **{name: metrics.get(name, {}).get(replica, 0.0) for name in CAPACITY_FIGURES}
            ),
        )
        for replica in ctx.running_replicas
        if replica in reported
    ]
