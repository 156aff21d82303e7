"""Ray's autoscaling policy, without a cluster: how many replicas are wanted."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.policy.autoscaling import ReplicaLoad
from deployments.replica import autoscaler
from deployments.replica.autoscaler import LoadPolicy


def context(num_requests: dict[str, float], target: int = 1) -> Any:
    return SimpleNamespace(
        aggregated_metrics={"num_requests": num_requests, "somebody_elses": {"a": 1.0}},
        running_replicas=["a", "b"],
        target_num_replicas=target,
    )


@pytest.mark.parametrize(("requests", "wanted"), [({}, 0), ({"a": 4.0}, 1), ({"a": 9.0}, 3)])
def test_the_policy_asks_for_what_the_reports_add_up_to(
    requests: dict[str, float], wanted: int
) -> None:
    policy = LoadPolicy(queued_tokens=100.0, kv_used=0.5, num_requests=4.0)
    assert policy(context(requests)) == (wanted, {})


def test_a_load_is_reported_as_plain_numbers() -> None:
    stats = autoscaler.to_stats(ReplicaLoad(10, 0.5, 3))
    assert stats == {"queued_tokens": 10.0, "kv_used": 0.5, "num_requests": 3.0}
