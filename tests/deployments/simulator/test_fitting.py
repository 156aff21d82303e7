"""Fitting a profile: what steps were made of is found again, also among disturbed ones."""

from random import Random

import numpy as np
import pytest

from deployments.simulator.disturbance import Disturbance, Disturbed
from deployments.simulator.fitting import fit_reads, fit_steps, nonnegative
from deployments.simulator.profile import Profile, StepTimes, StepWork
from engine.scheduler.step_time import StepShape, num_pairs

TRUE = StepTimes(
    logit_row=4e-5,
    position_read=3e-8,
    pair=2e-8,
    adapter_row=3e-5,
    adapter_row_byte=1e-12,
    distinct_adapter=1e-4,
    distinct_byte=5e-11,
    tokens=((1, 2e-3), (2, 4e-3), (16, 5e-3), (64, 9e-3), (128, 2e-2)),
)


def works(count: int) -> list[StepWork]:
    rng, made = Random(2), list[StepWork]()
    for _ in range(count):
        decodes, chunk = rng.randint(0, 40), rng.choice([0, 0, rng.randint(1, 88)])
        if not decodes + chunk:
            continue
        positions = sum(rng.randint(1, 900) for _ in range(decodes))
        pairs = num_pairs(rng.randint(0, 500), chunk) if chunk > 1 else 0
        shape = StepShape(decodes + chunk, decodes + rng.randint(0, 1), positions, pairs)
        rows, size = rng.randint(0, decodes), rng.choice([10**6, 8 * 10**6])
        distinct = min(rows, rng.randint(1, 8))
        made.append(StepWork(shape, rows, rows * size, distinct, distinct * size))
    return made


def test_the_fit_predicts_steps_that_it_has_not_seen() -> None:
    rng, true = Random(3), Profile(TRUE)
    disturbed = [(w, true.step_s(w) * (3.0 if rng.random() < 0.05 else 1.0)) for w in works(1500)]
    noisy = [(w, s * rng.uniform(0.95, 1.05)) for w, s in disturbed]
    fitted = fit_steps(noisy)
    assert fitted.median_error < 0.04 and abs(fitted.bias) < 0.01
    assert fitted.times.disturbed.share == pytest.approx(0.05, abs=0.02)
    mean_s = np.mean([true.step_s(w) for w, _ in noisy])
    assert np.mean(fitted.times.disturbed.seconds) == pytest.approx(2 * mean_s, rel=0.2)
    found, others = Profile(fitted.times), works(1700)[1500:]
    errors = sorted(abs(found.step_s(w) / true.step_s(w) - 1) for w in others)
    assert errors[len(errors) // 2] < 0.03 and errors[-len(errors) // 20] < 0.12


def test_least_squares_stay_above_zero_and_are_the_least() -> None:
    rng = np.random.default_rng(0)
    features, wanted = rng.random((40, 6)), np.array([1.0, 0, 2, 0, 0.5, 0])
    found = nonnegative(features, features @ wanted)
    assert found == pytest.approx(wanted, abs=1e-9)
    targets = rng.normal(size=40)
    found = nonnegative(features, targets)
    slope = features.T @ (features @ found - targets)
    assert (found >= 0).all() and (slope >= -1e-9).all()
    assert found @ slope == pytest.approx(0, abs=1e-9), "the conditions of Karush, Kuhn and Tucker"


def test_reads_have_a_part_that_grows_with_the_bytes() -> None:
    reads = [(n, 0.003 + n * 2e-9) for n in (10**6, 10**6, 10**7, 4 * 10**7)]
    assert fit_reads(reads) == pytest.approx((0.003, 2e-9))


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="3 steps were measured"):
        fit_steps([(StepWork(StepShape(1, 1, 1)), 0.1)] * 3)


def test_as_many_steps_are_disturbed_as_the_profile_says_and_each_replica_has_its_own() -> None:
    disturbed = Disturbed(0.1, (1e-3, 3e-3))
    one, other = Disturbance(disturbed, "one"), Disturbance(disturbed, "other")
    delays = [one.of_step(number) for number in range(4093 * 4)]
    assert np.mean(np.array(delays) > 0) == pytest.approx(0.1, abs=0.01)
    assert np.mean(delays) == pytest.approx(0.1 * 2e-3, rel=0.1)
    assert set(delays) == {0.0, *disturbed.seconds}
    assert delays != [other.of_step(number) for number in range(4093 * 4)]
    assert Disturbance(Disturbed(), "one").is_none and not Disturbance(Disturbed(), "one").of_step(
        3
    )


def test_delays_without_seconds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"where share is 0\.5"):
        Disturbed(0.5)
