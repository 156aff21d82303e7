"""UsageMeter: read what a process does with its time, from outside, even while it is stopped.

A process that is silent may compute, wait for its turn on a loaded machine, or do neither; only the
last is a sign of a hang. Reads Linux's /proc; elsewhere nothing is known.
"""

from dataclasses import dataclass
from pathlib import Path

_NS = 1e-9


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """Seconds of some period. `computing_s` is of all threads together.

    `waiting_s` is of the thread that waited longest for a processor, or of the main thread if that
    waits for a disk.
    """

    computing_s: float
    waiting_s: float


@dataclass(frozen=True, slots=True)
class _ThreadTimes:
    computing_s: float
    waiting_s: float


class UsageMeter:
    def __init__(self, pid: int, proc: Path = Path("/proc")) -> None:
        self._pid = pid
        self._folder = proc / str(pid) / "task"
        self._threads: dict[int, _ThreadTimes] = {}

    def read(self, elapsed_s: float) -> ProcessUsage | None:
        """Measure the time since the last call, `elapsed_s`. None: unknown, as at the first one."""
        before, after = self._threads, self._read_threads()
        self._threads = after
        common = before.keys() & after.keys()
        if self._pid not in common:
            return None
        spent = {tid: _difference(before[tid], after[tid]) for tid in common}
        waiting_s = max(thread.waiting_s for thread in spent.values())
        if self._wants_processor_or_disk():  # a wait that has not ended is not counted yet
            waiting_s = max(waiting_s, elapsed_s - spent[self._pid].computing_s)
        computing_s = sum(thread.computing_s for thread in spent.values())
        return ProcessUsage(computing_s, min(waiting_s, elapsed_s))

    def forget(self) -> None:
        """Begin anew: the next `read` is the first one."""
        self._threads = {}

    def _read_threads(self) -> dict[int, _ThreadTimes]:
        threads: dict[int, _ThreadTimes] = {}
        try:
            for folder in self._folder.iterdir():
                computing, waiting, _ = (folder / "schedstat").read_text().split()
                threads[int(folder.name)] = _ThreadTimes(int(computing) * _NS, int(waiting) * _NS)
        except (OSError, ValueError):  # it has ended, or the kernel does not tell
            return {}
        return threads

    def _wants_processor_or_disk(self) -> bool:
        """Tell whether the main thread could go on but for other work of the machine."""
        try:
            stat = (self._folder / str(self._pid) / "stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("R", "D")


def _difference(before: _ThreadTimes, after: _ThreadTimes) -> _ThreadTimes:
    return _ThreadTimes(after.computing_s - before.computing_s, after.waiting_s - before.waiting_s)
