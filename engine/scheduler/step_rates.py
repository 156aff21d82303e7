"""StepRates: what an engine can do in a second, of the times that its steps have taken."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.scheduler.request import Request
from engine.scheduler.step_time import StepShape, StepTime, num_pairs


class StepRates(NamedTuple):
    """All 0 until a step has been measured."""

    tokens_per_s: float = 0.0  # of prompts, in steps that are full of them
    step_s: float = 0.0  # of a step, before its first row
    row_s: float = 0.0  # by which each row that gets a token makes it longer


def step_rates(times: StepTime, max_tokens: int, running: Sequence[Request]) -> StepRates:
    """Return the rates for steps of at most `max_tokens`, and rows that have as much context as the
    running ones."""
    if not times.is_known:
        return StepRates()
    positions = sum([r.num_computed_tokens for r in running]) // max(len(running), 1)
    full_s = times.predict(StepShape(tokens=max_tokens, pairs=num_pairs(0, max_tokens)))
    row_s = times.seconds_added(StepShape(1, 1, positions))
    return StepRates(max_tokens / full_s if full_s > 0 else 0.0, times.coefficients.fixed, row_s)
