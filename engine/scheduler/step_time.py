"""StepTime: predicts how long a step takes, and learns it from the steps that were measured.

    seconds = pace * (fixed + a * tokens + b * logit rows + c * positions read + d * pairs)

The pace follows a machine that others slow down. No coefficient is below 0. They minimize the
squares of relative errors, in which older steps count less and less. Steps with and without prompts
are remembered apart, so that a long time of decoding does not wear away what is known about
prompts. A function of its inputs: no clock.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

from engine.scheduler.batch import ScheduledBatch

KEPT = 0.98  # weight of a step after the next one of its kind: about the last 50 count
SURPRISE = 2.0  # a step counts as at most this many times as long as predicted, and as short
LEAST_RATIO = 1 / SURPRISE
FOLLOWED = 0.05  # part of a step's surprise that is the whole machine's, not a coefficient's
NUM_EARLY, THINNED = 64, 4  # later, one in 4 steps that only decode is enough
QUICK_S, QUICK_THINNED = 2e-3, 8  # and one in 8 that are so quick that learning would show in them
PRIOR_WEIGHT = 0.01  # of a measured step
_ANY_NUMBER, _INFINITE = 2**31 - 1, 1e9


class StepShape(NamedTuple):
    """What a step has to compute, as far as its time depends on it."""

    tokens: int = 0
    logit_rows: int = 0
    positions_read: int = 0  # of the KV cache, by rows that decode
    pairs: int = 0  # of a prompt's tokens and the positions that they attend to


class StepCoefficients(NamedTuple):
    """Seconds. These guesses are right in their proportions; the first step gives the scale."""

    fixed: float = 5e-3
    token: float = 5e-4
    logit_row: float = 1e-4
    position_read: float = 1e-7
    pair: float = 1e-7


def num_pairs(start: int, count: int) -> int:
    """Sum over `count` tokens from position `start` of the positions that each attends to."""
    return count * start + count * (count + 1) // 2


def shape_of(batch: ScheduledBatch) -> StepShape:
    tokens = logit_rows = positions_read = pairs = 0
    for request in batch.requests:
        count = len(request.token_ids)
        tokens += count
        logit_rows += request.samples + request.num_drafts + len(request.prompt_targets or ())
        if count == 1 + request.num_drafts:
            positions_read += request.start + count
        else:
            pairs += num_pairs(request.start, count)
    return StepShape(tokens, logit_rows, positions_read, pairs)


class StepTime:
    """A linear model of a step's seconds, learned online."""

    def __init__(self) -> None:
        self._values = list(StepCoefficients())
        self._num_steps = 0
        self._num_quick = 0
        self._pace = 1.0  # the machine's seconds for a second of the coefficients
        self._memories: tuple[_Memory, _Memory] | None = None  # without and with prompts

    @property
    def coefficients(self) -> StepCoefficients:
        return StepCoefficients(*(self._pace * value for value in self._values))

    @property
    def is_known(self) -> bool:
        """Whether any step has been measured."""
        return self._memories is not None

    def predict(self, shape: StepShape) -> float:
        """Return the seconds of a step of this shape."""
        return self._pace * self._values[0] + self.seconds_added(shape)

    def seconds_added(self, shape: StepShape) -> float:
        """Return by how much this makes a step longer."""
        _, a, b, c, d = self._values
        tokens, logit_rows, positions_read, pairs = shape
        return self._pace * (a * tokens + b * logit_rows + c * positions_read + d * pairs)

    def needs(self, seconds: float) -> bool:
        """Whether to observe a step that took `seconds`; asked once for each step."""
        if seconds <= 0:
            return False
        if seconds >= QUICK_S or self._num_steps < NUM_EARLY:
            return True
        self._num_quick += 1
        return self._num_quick % QUICK_THINNED == 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn from a step of this shape that took `seconds` > 0."""
        if self._memories is None:
            self._pace = seconds / self.predict(shape)
            self._memories = (_Memory(self._values), _Memory(self._values))
        fixed, a, b, c, d = self._values
        tokens, logit_rows, positions_read, pairs = shape
        added = self._pace * (a * tokens + b * logit_rows + c * positions_read + d * pairs)
        expected = self._pace * fixed + added  # `predict`, without two calls in every step
        if expected < seconds / _INFINITE:
            expected = seconds / _INFINITE
        ratio = seconds / expected
        if ratio > SURPRISE:
            ratio = SURPRISE
        elif ratio < LEAST_RATIO:
            ratio = LEAST_RATIO
        pace = self._pace = self._pace * ratio**FOLLOWED
        self._num_steps += 1
        if not pairs and self._num_steps > NUM_EARLY and self._num_steps % THINNED:
            return
        row = (
            pace / expected,
            tokens * pace / expected,
            logit_rows * pace / expected,
            positions_read * pace / expected,
            pairs * pace / expected,
        )
        self._memories[pairs > 0].add(row, ratio ** (1 - FOLLOWED))
        self._sweep(*self._memories)

    def observe_decodes(self, first: StepShape, steps_s: Sequence[float]) -> None:
        """Learn from steps in a row that decode the same rows, where that is needed; the first one
        has this shape."""
        tokens, logit_rows, positions_read, pairs = first
        for seconds in steps_s:
            if self.needs(seconds):
                self.observe(StepShape(tokens, logit_rows, positions_read, pairs), seconds)
            positions_read += tokens

    def piece_within(self, seconds: float, start: int) -> int:
        """Return how many tokens of a prompt, from position `start`, take at most `seconds`."""
        if seconds <= 0:
            return 0
        token, pair = self._pace * self._values[1], self._pace * self._values[4]
        linear = token + pair * (start + 0.5)  # pair / 2 * n^2 + linear * n = seconds
        slope = linear + sqrt(linear * linear + 2 * pair * seconds)  # right if pair = 0, too
        return int(min(2 * seconds / slope, _ANY_NUMBER)) if slope else _ANY_NUMBER

    def _sweep(self, first: "_Memory", second: "_Memory") -> None:
        """Minimize by one coefficient after the other, from where the last step ended."""
        values = self._values
        for j, (row, other) in enumerate(zip(first.squares, second.squares, strict=True)):
            curvature = row[j] + other[j]
            if curvature > 0:  # else it was not seen for so long that its memory has faded to 0
                gap = first.sums[j] + second.sums[j] - (_dot(values, row) + _dot(values, other))
                values[j] = max(0.0, values[j] + gap / curvature)


class _Memory:
    """Normal equations of one kind of step, which fade.

    Their rows are what a step has of each coefficient, and its seconds, over those expected.
    """

    def __init__(self, prior: list[float]) -> None:
        self.sums = [PRIOR_WEIGHT / value for value in prior]
        self.squares = [[0.0] * len(prior) for _ in prior]
        for i, value in enumerate(prior):
            self.squares[i][i] = PRIOR_WEIGHT / value**2

    def add(self, row: Sequence[float], target: float) -> None:
        self.sums = _faded(self.sums, target, row)
        self.squares = [
            _faded(squares, x, row) for squares, x in zip(self.squares, row, strict=True)
        ]


# Written out, since every step waits for them: a fifth of what loops take.


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    a0, a1, a2, a3, a4 = a
    b0, b1, b2, b3, b4 = b
    return a0 * b0 + a1 * b1 + a2 * b2 + a3 * b3 + a4 * b4


def _faded(sums: Sequence[float], times: float, row: Sequence[float]) -> list[float]:
    s0, s1, s2, s3, s4 = sums
    x0, x1, x2, x3, x4 = row
    return [
        KEPT * s0 + times * x0,
        KEPT * s1 + times * x1,
        KEPT * s2 + times * x2,
        KEPT * s3 + times * x3,
        KEPT * s4 + times * x4,
    ]
