"""Clock: virtual time, and what happens when."""

from collections.abc import Callable
from heapq import heappop, heappush


class Clock:
    """Runs events in the order of their times; those of one time in the order they were set."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._num_set = 0

    def at(self, time_s: float, event: Callable[[], object]) -> None:
        assert time_s >= self.now_s, f"{time_s} s is before now, {self.now_s} s"
        self._num_set += 1
        heappush(self._events, (time_s, self._num_set, event))

    def after(self, delay_s: float, event: Callable[[], object]) -> None:
        self.at(self.now_s + delay_s, event)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Run events until none is left or `is_over`, which is asked after each."""
        while self._events and not is_over():
            self.now_s, _, event = heappop(self._events)
            event()
