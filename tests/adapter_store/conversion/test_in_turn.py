"""Work in threads gives its results in order, and stops where something fails."""

import threading
import time

import pytest

from adapter_store.conversion.in_turn import in_turn


def test_results_come_in_order_and_few_are_begun_before_they_are_taken() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    found = in_turn(work, range(12), 3)
    assert next(found) == 0 and max(begun) <= 3
    assert [0, *found] == [item * item for item in range(12)]


def test_what_fails_is_raised_in_its_turn_and_ends_the_work() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return 6 // (item - 3)

    found = in_turn(work, range(100), 2)
    assert [next(found) for _ in range(3)] == [-2, -3, -6]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert max(begun) <= 6
