"""The test of a canary: its evidence against brute force, and how often it is wrong or late."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.policy.canary import (
    METRICS,
    Answered,
    Judgement,
    Rules,
    Tally,
    evidence,
    judge,
)

RULES = Rules(
    max_regression=0.05, max_length_change=0.15, alpha=0.05, min_requests=50, max_requests=5000
)
GOOD = {"failed": 0.01, "cut": 0.05, "late": 0.05}


def log_ws(n: int, total: float, means: Sequence[float]) -> list[float]:
    """The definition, with the integral over all coins taken numerically."""
    steps = 2_000
    # x = sin(t)^2 makes the density of Beta(1/2, 1/2) flat.
    coins = [math.sin(math.pi / 2 * (k + 0.5) / steps) ** 2 for k in range(steps)]
    logs = [total * math.log(x) + (n - total) * math.log(1 - x) for x in coins]
    top = max(logs)
    mixture = top + math.log(sum(math.exp(each - top) for each in logs) / steps)
    return [mixture - total * math.log(m) - (n - total) * math.log(1 - m) for m in means]


@pytest.mark.parametrize(
    ("stable", "candidate"), [((40, 3.0), (12, 6.5)), ((9, 9.0), (5, 0.0)), ((30, 2.0), (30, 2.5))]
)
def test_the_evidence_is_the_least_product_over_all_means_that_fit(
    stable: tuple[int, float], candidate: tuple[int, float]
) -> None:
    margin, grid = 0.05, [(k + 0.5) / 100 for k in range(100)]
    pairs = [
        (a, b, log_a + log_b)
        for a, log_a in zip(grid, log_ws(*stable, grid), strict=True)
        for b, log_b in zip(grid, log_ws(*candidate, grid), strict=True)
    ]
    worse, no_worse = evidence(stable, candidate, margin)
    assert worse == pytest.approx(min(log for a, b, log in pairs if b <= a + margin), abs=0.2)
    assert no_worse == pytest.approx(min(log for a, b, log in pairs if b >= a + margin), abs=0.2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(METRICS), st.floats(0, 1)), max_size=60))
def test_counts_of_several_processes_add_up_to_the_same_judgement(
    seen: list[tuple[bool, str, float]],
) -> None:
    parts = [(Tally(), Tally()) for _ in range(3)]
    whole = Tally(), Tally()
    for number, (which, metric, badness) in enumerate(seen):
        for pair in (whole, parts[number % 3]):
            pair[which].see(metric, badness)
    total = Tally(), Tally()
    for pair in parts:
        for mine, other in zip(total, pair, strict=True):
            mine.merge(Tally.from_data(other.to_data()))
    one, other = judge(*whole, RULES), judge(*total, RULES)
    assert one.outcome == other.outcome
    for metric in METRICS:
        assert one.worse[metric] == pytest.approx(other.worse[metric], abs=1e-6)


def answered(draw: random.Random, rates: dict[str, float], mean_tokens: float) -> Answered:
    if draw.random() < rates["failed"]:
        return Answered(failed=True)
    return Answered(
        ttft_s=3.0 if draw.random() < rates["late"] else 0.2,
        num_tokens=round(draw.expovariate(1 / mean_tokens)) + 1,
        cut=float(draw.random() < rates["cut"]),
    )


def run(
    seed: int,
    rules: Rules,
    candidate: dict[str, float],
    share: float = 0.2,
    mean_tokens: float = 100,
    every: int = 1,
) -> tuple[Judgement, int]:
    """Play a canary; return what it came to and after how many requests of the candidate."""
    draw, number = random.Random(seed), 0
    tallies = Tally(), Tally()
    while True:
        which = draw.random() < share
        rates, tokens = (candidate, mean_tokens) if which else (GOOD, 100.0)
        tallies[which].add(answered(draw, rates, tokens), 2.0)
        number += 1
        if number % every:
            continue
        judgement = judge(*tallies, rules)
        if judgement.outcome != "go on":
            return judgement, tallies[1].num_requests


@pytest.mark.parametrize(
    ("planted", "mean_tokens", "metric", "most"),
    [
        ({"failed": 0.3}, 100, "failed", 120),
        ({"cut": 0.4}, 100, "cut", 120),
        ({"late": 0.4}, 100, "late", 120),
        ({}, 800, "longer", 250),
        ({}, 5, "shorter", 250),
    ],
    ids=["failed", "cut", "late", "longer", "shorter"],
)
def test_a_planted_regression_is_rolled_back_soon(
    planted: dict[str, float], mean_tokens: float, metric: str, most: int
) -> None:
    for seed in range(3):
        judgement, number = run(seed, RULES, GOOD | planted, mean_tokens=mean_tokens, every=5)
        assert judgement.outcome == "roll back" and judgement.why.startswith(metric)
        assert number <= most


def test_one_that_is_no_worse_is_promoted() -> None:
    for seed in range(2):
        judgement, number = run(seed, RULES, GOOD, every=50)
        assert judgement.outcome == "promote" and number <= 1500
        assert judgement.why == "no regression in failed, cut, late, longer, shorter"


def test_what_stays_undecided_is_held() -> None:
    at_the_margin = GOOD | {"cut": GOOD["cut"] + RULES.max_regression}
    rules = replace(RULES, max_requests=200)
    outcomes = [run(seed, rules, at_the_margin, every=20)[0].outcome for seed in range(3)]
    assert outcomes == ["hold"] * 3


def test_nothing_is_promoted_before_both_were_seen_often_enough() -> None:
    tallies = Tally(), Tally()
    for _ in range(5000):
        tallies[0].add(Answered(), 2.0)
    for _ in range(49):
        tallies[1].add(Answered(), 2.0)
    rules = replace(RULES, max_regression=0.5, max_length_change=0.5)
    assert judge(*tallies, rules).outcome == "go on"
    tallies[1].add(Answered(), 2.0)
    assert judge(*tallies, rules).outcome == "promote"


def wrong_conclusions(num_runs: int, num_requests: int, every: int) -> tuple[float, float]:
    """Return how often a candidate exactly at the margin of all rates is rolled back, promoted."""
    margin = 0.05
    rules = replace(RULES, max_regression=margin, alpha=0.1, max_requests=num_requests)
    worst = {name: rate + margin for name, rate in GOOD.items()}
    outcomes = [run(seed, rules, worst, 0.5, every=every)[0].outcome for seed in range(num_runs)]
    return outcomes.count("roll back") / num_runs, outcomes.count("promote") / num_runs


def test_false_alarms_stay_below_alpha() -> None:
    rolled_back, promoted = wrong_conclusions(num_runs=40, num_requests=100, every=10)
    assert rolled_back <= 0.1 and promoted <= 0.1


@pytest.mark.slow
def test_false_alarms_stay_below_alpha_with_a_look_at_each_request() -> None:
    rolled_back, promoted = wrong_conclusions(num_runs=200, num_requests=500, every=1)
    assert rolled_back <= 0.1 and promoted <= 0.1
