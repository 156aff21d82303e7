"""LoadPolicy: Ray's autoscaling policy on top of `policy.autoscaling`.

Ray pickles this module by value and calls it in its controller, and applies bounds and delays to
what it returns. Ray's own count of requests is of no use here, because an ingress has one stream to
each replica however many requests there are: all figures are reported by the replicas.
"""

from typing import Any

from ray.serve.config import AutoscalingContext

from deployments.policy.autoscaling import ReplicaLoad, ScalingTargets, wanted_replicas


def to_stats(load: ReplicaLoad) -> dict[str, float]:
    """Write a replica's autoscaling stats."""
    return {
        "queued_tokens": float(load.queued_tokens),
        "kv_used": float(load.kv_used),
        "num_requests": float(load.num_requests),
    }


class LoadPolicy:
    def __init__(self, **targets: float) -> None:
        self._targets = ScalingTargets(**targets)

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        metrics = ctx.aggregated_metrics or {}

        def figure(name: str, replica: Any) -> float:
            return metrics.get(name, {}).get(replica, 0.0)  # a new one has not reported yet

        loads = [
            ReplicaLoad(
                figure("queued_tokens", replica),
                figure("kv_used", replica),
                figure("num_requests", replica),
            )
            for replica in ctx.running_replicas
        ]
        return wanted_replicas(loads, ctx.target_num_replicas, 0.0, self._targets), {}
