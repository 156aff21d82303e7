"""Replicas wanted: by what arrives, waits and is held; up fast, down slow, never out of bounds."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.policy.autoscaling import (
    RANGES,
    Autoscaler,
    Bounds,
    ImpossiblePolicy,
    ReplicaLoad,
    ScalingPolicy,
)
from deployments.policy.capacity import Capacity, Objective
from deployments.policy.load_meter import LoadMeter

# 1000 prompt tokens/s; with 10 rows a step takes 0.1 s, so 100 output tokens/s
CAPACITY = Capacity(max_num_seqs=10, tokens_per_s=1000, step_s=0.05, row_s=0.005)
POLICY = ScalingPolicy(busy=0.5, down_delay_s=30, up_delay_s=2, lookahead_s=0, zero_delay_s=60)
MOST = 50


def load(**figures: float) -> ReplicaLoad:
    return ReplicaLoad(**{"num_requests": 1.0, **figures}, capacity=CAPACITY)


def decide_for(
    seconds: float, loads: list[ReplicaLoad], target: int, scaler: Autoscaler, start_s: float = 0.0
) -> int:
    """Ask twice a second, and carry out what it says."""
    for n in range(int(2 * seconds)):
        target = scaler.decide(loads, target, 0, start_s + n / 2).replicas
    return target


def scaler(least: int = 1, **changes: Any) -> Autoscaler:
    return Autoscaler(Bounds(least, MOST), replace(POLICY, **changes), Objective(2.0, 1.0))


@pytest.mark.parametrize(
    ("figures", "reason", "need"),
    [
        ({"prompt_tokens_per_s": 900}, "work", 1.8),
        ({"output_tokens_per_s": 90}, "work", 1.8),
        ({"prompt_tokens_per_s": 500, "output_tokens_per_s": 50}, "work", 2.0),
        ({"queued_tokens": 25_000}, "work", 2.5),
        ({"num_requests": 12}, "requests", 2.4),
        ({"kv_used": 1.0}, "kv", 1.25),
        ({"adapters_used": 1.8}, "adapters", 2.0),
        ({"wait_s": 2.5, "kv_used": 0.8}, "wait", 2.0),
    ],
    ids=["prompts", "answers", "both", "queue", "requests", "kv", "adapters", "late"],
)
def test_each_figure_asks_for_as_many_replicas_as_it_takes(
    figures: dict[str, float], reason: str, need: float
) -> None:
    decision = scaler().decide([load(**figures)], 1, 0, 0.0)
    assert decision.reason == reason and decision.need == pytest.approx(need)
    assert decision.replicas == math.ceil(need)


def test_fewer_seats_keep_a_shorter_time_per_token() -> None:
    assert CAPACITY.seats(1.0) == 10 and CAPACITY.seats(0.075) == pytest.approx(5)
    assert CAPACITY.seats(0.01) == 1, "one request can always run"
    assert CAPACITY.output_tokens_per_s(0.075) == pytest.approx(5 / 0.075)
    assert Capacity(8).work(1e9, 1e9, 1.0) == 0, "what was not measured limits nothing"


def test_late_first_tokens_ask_for_one_more_and_not_for_ever() -> None:
    late = [load(wait_s=9.0, num_requests=0.1)] * 4
    assert scaler().decide(late, 4, 0, 0.0).need < 4, "capacity calls for far fewer: not its fault"
    busy = [load(wait_s=9.0, kv_used=0.7)] * 4
    assert scaler().decide(busy, 4, 0, 0.0).need == 5
    assert scaler().decide(busy, 5, 0, 0.0).need < 5, "one is on its way"


def test_more_are_wanted_at_once_and_fewer_after_a_while() -> None:
    it, calm, busy = scaler(), [load()], [load(num_requests=20)]
    assert decide_for(5, calm, 1, it) == 1
    assert decide_for(1.5, busy, 1, it, 5) == 1, "it must stand for two seconds"
    assert decide_for(1.5, busy, 1, it, 6.5) == 4
    assert decide_for(29, calm, 4, it, 8) == 4
    assert decide_for(3, calm, 4, it, 37) == 1


def test_around_a_threshold_the_number_does_not_swing() -> None:
    it, targets, target = scaler(), set[int](), 2
    for n in range(400):
        each = load(num_requests=5.2 if n // 80 % 2 else 4.8)
        target = it.decide([each, each], target, 0, n / 2).replicas
        targets.add(target)
    assert targets == {2, 3} and target == 3, "once up, it stays there"


def test_a_rise_is_followed_ahead_of_its_average() -> None:
    """A replica's worth more every 50 s; one takes 40 s to start."""
    behind, ahead = scaler(lookahead_s=0, smoothing_s=10), scaler(lookahead_s=40, smoothing_s=10)
    for n in range(200):
        arriving = [load(prompt_tokens_per_s=1000 * n / 100)]
        low, high = (it.decide(arriving, 1, 0, n / 2).need for it in (behind, ahead))
    now = 2.0 / POLICY.busy
    assert low < now and high == pytest.approx(now + 40 / 50 / POLICY.busy, rel=0.05)


def test_to_zero_after_a_while_without_requests_and_back_for_held_ones() -> None:
    it = scaler(least=0)
    idle = [load(num_requests=0)]
    assert decide_for(10, [load()], 1, it) == 1
    assert decide_for(55, idle, 1, it, 10) == 1
    assert decide_for(10, idle, 1, it, 65) == 0
    assert it.decide([], 0, 0, 80.0).replicas == 0
    assert it.decide([], 0, 25, 80.5).replicas == 0, "not at once"
    assert it.decide([], 0, 25, 83.0).replicas == 5, "25 requests by 10 seats, half of them used"
    assert decide_for(500, idle, 3, scaler(least=2)) == 2, "the bound is kept"


def test_a_replica_that_comes_back_from_zero_is_not_sent_home_before_its_first_request() -> None:
    """Serve starts it without asking the policy; its first report may be older than the request."""
    it, idle = scaler(least=0, zero_delay_s=10.0), [load(num_requests=0)]
    assert decide_for(20, idle, 1, it) == 0
    assert it.decide([], 1, 0, 100.0).replicas == 1, "it starts"
    assert it.decide(idle, 1, 0, 101.0).replicas == 1
    assert decide_for(9, idle, 1, it, 101) == 1
    assert decide_for(5, idle, 1, it, 110) == 0


def test_nothing_is_decided_without_reports() -> None:
    """A controller that was started again knows of replicas before it hears from them."""
    it = scaler()
    assert [it.decide([], 7, 0, n).replicas for n in range(100)] == [7] * 100
    assert it.decide([load()], 7, 0, 100).replicas == 7, "it has only just begun"


figures = st.builds(
    load,
    queued_tokens=st.floats(0, 1e6),
    kv_used=st.floats(0, 1),
    num_requests=st.integers(0, 100),
    adapters_used=st.floats(0, 3),
    prompt_tokens_per_s=st.floats(0, 1e4),
    output_tokens_per_s=st.floats(0, 1e3),
    wait_s=st.floats(0, 10),
)
reports = st.lists(st.lists(figures, max_size=4), min_size=1, max_size=40)


@settings(max_examples=40)
@given(reports, st.integers(0, 5), st.integers(0, 60))
def test_the_bounds_hold_and_resident_adapters_keep_their_room(
    history: list[list[ReplicaLoad]], least: int, held: int
) -> None:
    it, target = scaler(least), max(least, 1)
    for n, loads in enumerate(history):
        decision = it.decide(loads, target, held, n * 5.0)
        assert max(least, 0) <= decision.replicas <= MOST
        if decision.replicas < target and loads:
            adapters = sum(load.adapters_used for load in loads) / POLICY.adapters_used
            assert decision.replicas >= min(math.ceil(adapters), MOST)
        target = decision.replicas


@settings(max_examples=40)
@given(reports, st.floats(1, 10))
def test_more_work_never_asks_for_fewer(history: list[list[ReplicaLoad]], times: float) -> None:
    few, many = scaler(), scaler()
    for n, loads in enumerate(history):
        more = [
            replace(
                each,
                queued_tokens=each.queued_tokens * times,
                prompt_tokens_per_s=each.prompt_tokens_per_s * times,
                num_requests=each.num_requests * times,
                wait_s=0.0,
            )
            for each in loads
        ]
        less = [replace(each, wait_s=0.0) for each in loads]
        assert few.decide(less, 5, 0, n).replicas <= many.decide(more, 5, 0, n).replicas


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Bounds(4, 3), "min=4 must be from 0 to max=3"),
        (lambda: Bounds(0, 0), "max=0 must be at least 1"),
        (lambda: ScalingPolicy(busy=1.5), "busy is 1.5, not from 0.2 to 1"),
        (lambda: ScalingPolicy(drain_s=0), "drain_s is 0, not from 0.5 to 300"),
    ],
    ids=["order", "none", "busy", "drain"],
)
def test_an_impossible_policy_is_refused_with_its_numbers(make: Any, told: str) -> None:
    with pytest.raises(ImpossiblePolicy, match=told):
        make()


def test_every_parameter_has_a_range_that_holds_its_default() -> None:
    assert list(RANGES) == list(ScalingPolicy.__dataclass_fields__)
    for name, known in RANGES.items():
        assert known.least <= getattr(ScalingPolicy(), name) <= known.most
        assert not known.is_log or known.least > 0


def test_a_meter_tells_what_came_since_it_was_read() -> None:
    meter = LoadMeter()
    meter.received(100, 2)
    assert meter.read(10.0).prompt_tokens_per_s == 0, "since when is not known"
    for length in (20, 20, 20):
        meter.answered(length)
    meter.received(300, 2)
    meter.waited(1.0)
    meter.waited(2.0)
    read = meter.read(12.0)
    assert (read.prompt_tokens_per_s, read.output_tokens_per_s, read.wait_s) == (150, 20, 1.5)
    assert meter.read(13.0).prompt_tokens_per_s == 0


def test_what_came_before_does_not_keep_a_replica_that_nobody_asks() -> None:
    """The averages forget slower than `zero_delay_s`."""
    policy = ScalingPolicy(smoothing_s=300.0, lookahead_s=0.0, zero_delay_s=2.0, up_delay_s=0.0)
    autoscaler = Autoscaler(Bounds(0, 3), policy)
    able = Capacity(8.0, 100.0, 0.01, 0.001)
    busy = ReplicaLoad(num_requests=1.0, prompt_tokens_per_s=1e9, capacity=able)
    idle = ReplicaLoad(capacity=able)
    assert autoscaler.decide([busy], 1, 0.0, 0.0).replicas == 3
    assert autoscaler.decide([idle], 1, 0.0, 1.0).replicas == 3
    assert autoscaler.decide([idle], 1, 0.0, 2.0).replicas == 0
