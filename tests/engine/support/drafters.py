"""Drafters for tests: one that knows the answers, but for some errors."""

from collections.abc import Callable, Sequence

from engine.scheduler.request import Request
from engine.scheduler.speculation import Draft, Drafter, Speculation
from engine.scheduler.step_time import StepTime


class Seer:
    """Drafts the tokens that are expected, each `period`-th one wrong."""

    step_s = 0.0

    def __init__(self, expected: Callable[[Request], Sequence[int]], period: int = 5) -> None:
        self._expected = expected
        self._period = period
        self._num_tokens = 0

    def draft(self, wishes: Sequence[tuple[Request, int]]) -> list[Draft]:
        return [Draft(self._draft(request, most), 3) for request, most in wishes]

    def _draft(self, request: Request, most: int) -> list[int]:
        start = len(request.output_token_ids)
        draft = list(self._expected(request)[start : start + most])
        for i in range(len(draft)):
            self._num_tokens += 1
            if self._num_tokens % self._period == 0:
                draft[i] = (draft[i] + 1) % 50
        return draft


class FixedCost(Speculation):
    """Takes a row's cost, as a part of a step's, for known; 0 takes every draft."""

    cost = 0.0

    def row_cost(self, requests: Sequence[Request], times: StepTime) -> float:
        return self.cost


def eager(drafter: Drafter, max_draft_tokens: int = 5, max_model_len: int = 10**6) -> Speculation:
    """Return speculation that takes every draft, whatever its chance."""
    return FixedCost(drafter, max_draft_tokens, max_model_len)
