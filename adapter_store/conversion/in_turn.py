"""Do work in threads, and take its results in the order of what was asked."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_turn(work: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    """Yield the result of each item; at most one more than `num_threads` wait to be taken.

    What fails is raised in its turn, and nothing that comes after it is begun.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads) as threads:
        try:
            for item in items:
                waiting.append(threads.submit(work, item))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
