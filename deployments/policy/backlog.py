"""Backlog: what waits at one replica, and how long one more request would wait behind it.

By the capacity (`capacity.py`) that the autoscaler goes by, too: prompts are computed at the
replica's own rate, and where all seats are taken, an answer must end first. There are as many seats
as the batch has rows, or as the KV cache has room for, to judge by what those that run take of it.
"""

import math
from dataclasses import dataclass

from deployments.policy.capacity import Capacity

LATER_S = 1  # to retry, where nothing has been measured
MOST_S = 600  # to retry: by then the figures are others


@dataclass(frozen=True, slots=True)
class Backlog:
    """Answers that are open, of which some run, and what they still need."""

    num_open: int
    num_running: int
    queued_tokens: int  # of prompts, not computed
    kv_used: float  # 0 to 1
    mean_answer: float  # tokens


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """`max_open` answers run or wait at a replica; None: they may wait as long as it takes."""

    max_open: int
    max_wait_s: float | None = None

    def surely_allow(self, num_open: int, num_more: int) -> bool:
        """Tell whether so many more may wait, however long it takes."""
        return self.max_wait_s is None and num_open + num_more <= self.max_open


@dataclass(frozen=True, slots=True)
class Overload:
    """Why a request may not join the queue, and after how many whole seconds to retry."""

    message: str
    retry_after_s: int


def wait_s(capacity: Capacity, backlog: Backlog) -> float:
    """Predict the seconds until one more answer begins; 0 if nothing was measured."""
    seats = _seats(capacity, backlog)
    return capacity.prompt_s(backlog.queued_tokens) + _ending_s(
        capacity, backlog, backlog.num_open + 1 - seats
    )


def overload(
    capacity: Capacity,
    backlog: Backlog,
    limits: QueueLimits,
    num_more: int,
    expected_s: float | None = None,
) -> Overload | None:
    """Say why so many more answers may not wait here; None if they may.

    `expected_s`: until they begin, if that is known better than by all that waits.
    """
    excess = backlog.num_open + num_more - limits.max_open
    if excess > 0:
        message = (
            f"{backlog.num_open} answers are running or queued; {num_more} more would be above the "
            f"limit of {limits.max_open}."
        )
        return Overload(message, whole_seconds(_ending_s(capacity, backlog, excess)))
    if limits.max_wait_s is None:
        return None
    expected_s = wait_s(capacity, backlog) if expected_s is None else expected_s
    if expected_s <= limits.max_wait_s:
        return None
    message = (
        f"An answer would begin in about {expected_s:.3g} s, and at most {limits.max_wait_s:g} s "
        "are allowed."
    )
    return Overload(message, whole_seconds(expected_s - limits.max_wait_s))


def _seats(capacity: Capacity, backlog: Backlog) -> float:
    if backlog.kv_used <= 0 or not backlog.num_running:
        return capacity.max_num_seqs
    return min(capacity.max_num_seqs, max(backlog.num_running / backlog.kv_used, 1.0))


def _ending_s(capacity: Capacity, backlog: Backlog, num_answers: float) -> float:
    """Return the seconds in which so many answers end, while as many as may be are running."""
    rows = _seats(capacity, backlog)
    step_s = capacity.step_s + rows * capacity.row_s
    return max(num_answers, 0.0) * backlog.mean_answer * step_s / rows


def whole_seconds(seconds: float) -> int:
    """Return after how many whole seconds to retry."""
    return min(max(math.ceil(seconds), LATER_S), MOST_S)
