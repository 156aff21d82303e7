"""Runs several simulations at once, in processes."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from types import TracebackType
from typing import TypeVar

from deployments.simulator.config import Simulation
from deployments.simulator.simulate import Result, Summary, run, simulate

T = TypeVar("T")
Job = tuple[Simulation, int]  # and its seed
Watch = Callable[[int], object]


def _nobody(count: int) -> None:
    pass


class Pool:
    """Runs simulations in `num_processes` processes; with one, in this process."""

    def __init__(self, num_processes: int | None = None) -> None:
        count = num_processes or len(os.sched_getaffinity(0))
        spawning = get_context("spawn")
        self._executor = ProcessPoolExecutor(count, spawning) if count > 1 else None
        self.num_processes = count

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job], watch: Watch = _nobody) -> list[Summary]:
        """Run each simulation with its seed; `watch` is called with 1 once one is done."""
        return self._map(simulate, jobs, watch)

    def results(self, jobs: Sequence[Job], watch: Watch = _nobody) -> list[Result]:
        """Do the same, and return also what the figures are made of."""
        return self._map(run, jobs, watch)

    def _map(
        self, function: Callable[[Simulation, int], T], jobs: Sequence[Job], watch: Watch
    ) -> list[T]:
        if self._executor is None:
            return list(_watched((function(*job) for job in jobs), watch))
        futures = [self._executor.submit(function, *job) for job in jobs]
        for _ in _watched(as_completed(futures), watch):
            pass
        return [future.result() for future in futures]


def _watched(items: Iterable[T], watch: Watch) -> Iterable[T]:
    for item in items:
        watch(1)
        yield item
