"""How long a request would wait, and who may not."""

import pytest

from deployments.policy.backlog import Backlog, Overload, QueueLimits, overload, wait_s
from deployments.policy.capacity import Capacity

# 10 rows take 0.1 s: 100 tokens/s for all of them together
CAPACITY = Capacity(max_num_seqs=10, tokens_per_s=1000, step_s=0.05, row_s=0.005)


def backlog(num_open: int = 0, num_running: int = 0, queued: int = 0, kv: float = 0.0) -> Backlog:
    return Backlog(num_open, num_running, queued, kv, mean_answer=50.0)


@pytest.mark.parametrize(
    ("waiting", "seconds"),
    [
        (backlog(), 0.0),
        (backlog(9, 9, queued=500), 0.5),
        (backlog(10, 10), 0.5),  # one of ten answers of 50 tokens must end
        (backlog(29, 10, queued=1000), 1.0 + 20 * 0.5),
        (backlog(9, 2, kv=0.5), 6 * 50 * 0.07 / 4),  # the cache has room for four
    ],
    ids=["idle", "prompts", "a seat", "both", "cache"],
)
def test_one_waits_for_prompts_and_for_answers_to_end(waiting: Backlog, seconds: float) -> None:
    assert wait_s(CAPACITY, waiting) == pytest.approx(seconds)


def test_what_is_not_measured_makes_nobody_wait() -> None:
    assert wait_s(Capacity(10), backlog(50, 10, 10_000)) == 0.0
    limits = QueueLimits(60, max_wait_s=0.1)
    assert overload(Capacity(10), backlog(50, 10, 10_000), limits, 1) is None


def test_beyond_the_limit_one_is_told_when_as_many_will_have_ended() -> None:
    limits = QueueLimits(20)
    assert limits.surely_allow(19, 1) and not limits.surely_allow(19, 2)
    assert overload(CAPACITY, backlog(19, 10), limits, 1) is None
    found = overload(CAPACITY, backlog(20, 10), limits, 8)
    assert found == Overload(
        "20 answers are running or queued; 8 more would be above the limit of 20.", 4
    )
    assert overload(Capacity(10), backlog(20), limits, 1).retry_after_s == 1  # type: ignore[union-attr]


def test_a_wait_that_is_too_long_is_told_with_its_numbers() -> None:
    limits = QueueLimits(1000, max_wait_s=2.0)
    assert overload(CAPACITY, backlog(10, 10, 1500), limits, 1) is None
    found = overload(CAPACITY, backlog(19, 10, 1500), limits, 1)
    assert found == Overload(
        "An answer would begin in about 6.5 s, and at most 2 s are allowed.", 5
    )
    assert not limits.surely_allow(0, 1)
