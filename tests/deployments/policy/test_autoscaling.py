"""Replicas wanted, as arithmetic: up with either signal, down only with room to spare."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.policy.autoscaling import ReplicaLoad, ScalingTargets, wanted_replicas

TARGETS = ScalingTargets(queued_tokens=1000, kv_used=0.8, num_requests=10, down_margin=0.7)


def wanted(*loads: ReplicaLoad, current: int | None = None, waiting: float = 0) -> int:
    return wanted_replicas(loads, len(loads) if current is None else current, waiting, TARGETS)


@pytest.mark.parametrize(
    "load",
    [ReplicaLoad(queued_tokens=1500), ReplicaLoad(kv_used=0.9), ReplicaLoad(num_requests=11)],
    ids=["tokens", "kv", "requests"],
)
def test_any_signal_above_its_target_asks_for_another(load: ReplicaLoad) -> None:
    assert wanted(load) == 2


def test_requests_that_no_replica_has_seen_count_too() -> None:
    assert wanted(current=0, waiting=25) == 3


def test_without_work_no_replica_is_wanted() -> None:
    assert wanted(ReplicaLoad(), ReplicaLoad()) == 0


def test_around_a_threshold_the_number_does_not_swing() -> None:
    above = [ReplicaLoad(num_requests=5.1)] * 2
    below = [ReplicaLoad(num_requests=4.9)] * 2
    assert wanted(*above) == 2 and wanted(*below) == 2
    assert wanted(*[ReplicaLoad(num_requests=3.4)] * 2) == 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5), st.integers(0, 10))
def test_more_work_never_asks_for_fewer(tokens: list[float], current: int) -> None:
    loads = [ReplicaLoad(queued_tokens=t) for t in tokens]
    more = [ReplicaLoad(queued_tokens=t * 2) for t in tokens]
    few = wanted_replicas(loads, current, 0, TARGETS)
    assert few <= wanted_replicas(more, current, 0, TARGETS)
