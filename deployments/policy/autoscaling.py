"""Computes the number of replicas that the load needs, from figures that replicas report.

Three signals: queued tokens (work not started), KV use (work in progress, which cannot be moved)
and the number of requests. Scaling down needs all to be low, with a margin, so that the number
does not oscillate around a threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScalingTargets:
    """Target load of one replica."""

    queued_tokens: float = 4096.0
    kv_used: float = 0.8  # 0 to 1
    num_requests: float = 32.0
    down_margin: float = 0.7  # scale down only if fewer replicas would be at most this full


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    queued_tokens: float = 0.0
    kv_used: float = 0.0
    num_requests: float = 0.0


def wanted_replicas(
    loads: Sequence[ReplicaLoad], current: int, waiting_requests: float, targets: ScalingTargets
) -> int:
    """Replicas needed for each to carry at most its target; 0 if there is no work."""
    needs = (
        sum(load.queued_tokens for load in loads) / targets.queued_tokens,
        sum(load.kv_used for load in loads) / targets.kv_used,
        (sum(load.num_requests for load in loads) + waiting_requests) / targets.num_requests,
    )
    need = max(needs)
    if need <= 0:
        return 0
    wanted = math.ceil(need)
    if wanted >= current:
        return wanted
    return min(current, math.ceil(need / targets.down_margin))
