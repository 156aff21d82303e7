"""Ray's autoscaling policy, without a cluster: how many replicas are wanted."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.policy.autoscaling import ReplicaLoad, ScalingPolicy
from deployments.policy.capacity import Capacity, Objective
from deployments.replica.autoscaler import LoadPolicy, to_settings, to_stats


def context(loads: dict[str, ReplicaLoad], target: int = 1, most: int = 9) -> Any:
    metrics: dict[str, dict[str, float]] = {"somebody_elses": {"a": 1.0}}
    for replica, load in loads.items():
        for name, figure in to_stats(load).items():
            metrics.setdefault(name, {})[replica] = figure
    return SimpleNamespace(
        aggregated_metrics=metrics,
        running_replicas=["a", "b"],
        target_num_replicas=target,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=most,
    )


def load(num_requests: float) -> ReplicaLoad:
    return ReplicaLoad(num_requests=num_requests, capacity=Capacity(4.0))


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [({}, 2), ({"a": load(4)}, 2), ({"a": load(3), "b": load(9)}, 4), ({"a": load(99)}, 9)],
    ids=["none", "one", "both", "bound"],
)
def test_the_policy_asks_for_what_the_reports_add_up_to(
    loads: dict[str, ReplicaLoad], wanted: int
) -> None:
    policy = LoadPolicy(policy={"busy": 0.75}, clock=lambda: 0.0)
    assert policy(context(loads, target=2)) == (wanted, {})


def test_the_bounds_are_those_that_ray_has_now() -> None:
    policy = LoadPolicy(clock=lambda: 0.0)
    assert policy(context({"a": load(99)}, most=3))[0] == 3
    assert policy(context({"a": load(99)}, most=5))[0] == 5


def test_a_load_is_reported_as_plain_numbers() -> None:
    stats = to_stats(ReplicaLoad(10, 0.5, 3, capacity=Capacity(8, 100.0)))
    assert all(type(figure) is float for figure in stats.values())
    assert (stats["queued_tokens"], stats["max_num_seqs"], stats["tokens_per_s"]) == (10, 8, 100)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"ttft_s": 1.0, "tpot_s": 0.01}, "tpot_s is 0.01"),
        ({"ttft_s": 0.02, "tpot_s": 0.1}, "ttft_s is 0.02"),
    ],
    ids=["each token", "first token"],
)
def test_an_objective_that_no_number_of_replicas_keeps_is_told_once(
    objective: dict[str, float], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = LoadPolicy(objective, clock=lambda: 0.0)
    slow = ReplicaLoad(num_requests=1, capacity=Capacity(4, 100.0, 0.02, 0.005))
    for _ in range(3):
        policy(context({"a": slow}))
    assert caplog.text.count(f"autoscaling.{told}, but a step takes 0.025 s") == 1


def test_the_policy_goes_by_what_replicas_were_told_and_back() -> None:
    policy = LoadPolicy({"tpot_s": 1.0}, {"up_delay_s": 0.0}, clock=count(0.0, 10.0).__next__)
    loads = {"a": load(num_requests=3)}
    assert policy(context(loads))[0] == 1
    told = context(loads)
    settings = to_settings(Objective(2.0, 1.0), ScalingPolicy(busy=0.25, up_delay_s=0.0))
    told.aggregated_metrics.update({name: {"a": value} for name, value in settings.items()})
    assert policy(told)[0] == 3
    assert policy(context({}, target=3))[0] == 3, "no report: nothing is concluded"
    assert policy(context(loads, target=1))[0] == 1
