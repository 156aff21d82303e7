"""Fits a profile's coefficients to measured steps: relative squares, no coefficient below 0.

The time by tokens is a line through points at powers of two and between, so that where kernels
change, it may have a bend, or fall; a small penalty on bends decides where nothing was measured.
Steps that take twice what the first fit predicts, or half, which others on the machine have
disturbed, are left out of the second; how many took longer, and how much, is told apart. The second
fit weighs steps by the times that the first predicts: by those measured, slow ones would count less
than quick ones, and all would seem quicker than they are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from deployments.simulator.disturbance import Disturbed
from deployments.simulator.profile import LoadTimes, StepTimes, StepWork

Matrix = NDArray[np.float64]

BENDS = 0.02  # weight of a bend between points, by the root of the number of steps
DISTURBED = 2.0  # times what is predicted, or one in so many
NUM_DELAYS = 16  # that stand for those of all disturbed steps
NAMES = (
    "logit_row",
    "position_read",
    "pair",
    "adapter_row",
    "adapter_row_byte",
    "distinct_adapter",
    "distinct_byte",
    "new_request",
    "after_idle",
)


class StepFit(NamedTuple):
    """Coefficients, and how far they miss the steps that nothing disturbed: parts of their time."""

    times: StepTimes
    median_error: float
    p90_error: float
    bias: float  # of all of them together: predicted time over measured time, minus 1


def fit_steps(steps: Sequence[tuple[StepWork, float]]) -> StepFit:
    """Fit at least 50 steps of a few sizes. Raises ValueError for fewer."""
    if len(steps) < 50:
        raise ValueError(f"{len(steps)} steps were measured, and 50 are needed: measure for longer")
    knots = _knots(max(work.shape.tokens for work, _ in steps))
    features = np.array([_features(work, knots) for work, _ in steps])
    seconds = np.array([took for _, took in steps])
    predicted = features @ _fit(features, seconds, seconds, knots)
    kept = (predicted < DISTURBED * seconds) & (seconds < DISTURBED * predicted)
    scale = np.maximum(predicted[kept], seconds[kept] / 2)
    values = _fit(features[kept], seconds[kept], scale, knots)
    disturbed = _disturbed(seconds - features @ values, seconds >= DISTURBED * predicted)
    features, seconds = features[kept], seconds[kept]
    predicted = features @ values
    errors = np.abs(predicted / seconds - 1)
    return StepFit(
        msgspec.structs.replace(_as_times(values, knots), disturbed=disturbed),
        float(np.median(errors)),
        float(np.quantile(errors, 0.9)),
        float(predicted.sum() / seconds.sum() - 1),
    )


def _disturbed(extra_s: Matrix, is_disturbed: NDArray[np.bool_]) -> Disturbed:
    """Let a few delays stand for those of disturbed steps, in order; their mean is the same."""
    delays = np.sort(np.maximum(extra_s[is_disturbed], 0.0))
    if not len(delays):
        return Disturbed()
    parts = np.array_split(delays, min(NUM_DELAYS, len(delays)))
    return Disturbed(float(is_disturbed.mean()), tuple(float(part.mean()) for part in parts))


def fit_reads(reads: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return seconds, and seconds per byte, of reads of some sizes."""
    features = np.array([[1.0, float(nbytes)] for nbytes, _ in reads])
    seconds = np.array([took for _, took in reads])
    fixed, by_byte = nonnegative(features / seconds[:, None], np.ones(len(reads)))
    return float(fixed), float(by_byte)


def nonnegative(features: Matrix, targets: Matrix) -> Matrix:
    """Minimize |features @ x - targets| over x >= 0 (Lawson and Hanson 1974)."""
    scale = np.sqrt((features**2).sum(axis=0))
    scale[scale == 0] = 1.0
    features = features / scale
    x = np.zeros(features.shape[1])
    is_free = np.zeros(len(x), dtype=bool)
    for _ in range(10 * len(x)):
        slope = features.T @ (targets - features @ x)
        slope[is_free] = 0.0
        if slope.max() <= 1e-9:
            break
        is_free[slope.argmax()] = True
        x = _inner(features, targets, x, is_free)
    return x / scale


def _inner(features: Matrix, targets: Matrix, x: Matrix, is_free: NDArray[np.bool_]) -> Matrix:
    """Solve for the free ones; fix those that would fall below 0 at 0, one step after the other."""
    while True:
        wanted = np.zeros(len(x))
        wanted[is_free] = np.linalg.lstsq(features[:, is_free], targets, rcond=None)[0]
        below = is_free & (wanted <= 0)
        if not below.any():
            return wanted
        step = (x[below] / (x[below] - wanted[below])).min()
        x = x + step * (wanted - x)
        is_free &= x > 1e-12


def _knots(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 and so on, up to the first that is not below `most`."""
    knots = [1, 2]
    while knots[-1] < most:
        knots.append(knots[-1] * 3 // 2 if knots[-1] & (knots[-1] - 1) == 0 else knots[-2] * 2)
    return knots


def _features(work: StepWork, knots: Sequence[int]) -> list[float]:
    shape = work.shape
    hats = np.zeros(len(knots))
    at = min(max(int(np.searchsorted(knots, shape.tokens)), 1), len(knots) - 1)
    part = (shape.tokens - knots[at - 1]) / (knots[at] - knots[at - 1])
    hats[at - 1], hats[at] = 1 - part, part
    return [
        *hats,
        shape.logit_rows,
        shape.positions_read,
        shape.pairs,
        work.adapter_rows,
        work.adapter_row_bytes,
        work.distinct_adapters,
        work.distinct_bytes,
        work.new_requests,
        work.after_idle,
    ]


def _fit(features: Matrix, seconds: Matrix, scale: Matrix, knots: Sequence[int]) -> Matrix:
    """Minimize the squares of what is missed, in parts of `scale`."""
    bends = np.zeros((len(knots) - 2, features.shape[1]))
    weight = BENDS * len(seconds) ** 0.5 / np.median(seconds)
    for i, (a, b, c) in enumerate(zip(knots, knots[1:], knots[2:], strict=False)):
        further = (b - a) / (c - b)  # the slope from b on less the one before, by b - a
        bends[i, i : i + 3] = np.array([1, -1 - further, further]) * 2 * weight
    targets = np.concatenate([seconds / scale, np.zeros(len(bends))])
    return nonnegative(np.concatenate([features / scale[:, None], bends]), targets)


def _as_times(values: Matrix, knots: Sequence[int]) -> StepTimes:
    points = tuple((knot, float(s)) for knot, s in zip(knots, values[: len(knots)], strict=True))
    rest = dict(zip(NAMES, map(float, values[len(knots) :]), strict=True))
    return StepTimes(fixed=0.0, token=0.0, tokens=points, **rest)


def load_times(
    fetches: Sequence[tuple[int, float]], reads: Sequence[tuple[int, float]]
) -> LoadTimes:
    """Return the times of loads; without fetches, those of the defaults."""
    decode, decode_byte = fit_reads(reads)
    if not fetches:
        return LoadTimes(decode=decode, decode_byte=decode_byte)
    fetch, fetch_byte = fit_reads(fetches)
    return LoadTimes(fetch, fetch_byte, decode, decode_byte)
