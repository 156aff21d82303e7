"""Describes what a row of numbers was measured on, and the other load on the machine.

A row is one line. Numbers are meaningless without their header.
"""

import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

ROOT = Path(__file__).parents[2]
T = TypeVar("T")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def header(seed: int, commits: str | None = None) -> str:
    """Return commit (+: with changes), processor, cores, threads, torch, day and seed."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return (
        f"{commits or commit()} | {_processor()}, {cores} cores, {threads} threads"
        f" | torch {torch.__version__.partition('+')[0]} | {time.strftime('%Y-%m-%d')}"
        f" | seed {seed}"
    )


def append_row(path: Path | None, row: str) -> None:
    """Print the row, and append it to the file if one is given."""
    assert "\n" not in row
    print(row, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(row + "\n")


def commit(checkout: Path = ROOT) -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


# ==== CPU time ====


@dataclass(frozen=True, slots=True)
class Noise:
    """CPU seconds per second that processes other than ours used during some work."""

    others: float

    def __str__(self) -> str:
        return f"others {self.others:.2f} cores"


class NoiseMeter:
    """Measures CPU time from construction to `read`, without that of the given processes."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._start_s = time.monotonic()
        self._machine_s, self._ours_s = _machine_cpu_s(), self._ours()

    def read(self) -> Noise:
        wall_s = time.monotonic() - self._start_s
        machine_s = _machine_cpu_s() - self._machine_s
        return Noise(max(machine_s - (self._ours() - self._ours_s), 0.0) / wall_s)

    def _ours(self) -> float:
        return sum(cpu_s(pid) for pid in self._pids)


def cpu_s(pid: int) -> float:
    """Return CPU seconds of a process and its threads; 0 if it has ended."""
    with suppress(OSError):
        # pid (name) state ppid ... utime stime ...; the name may contain anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return 0.0


def _machine_cpu_s() -> float:
    """Return CPU seconds of all cores: user, nice, system, irq and softirq time."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = fields
    return (user + nice + system + irq + softirq) / TICKS_PER_S


# ==== many measurements ====


def in_turns(number: int, a: Callable[[], T], b: Callable[[], T]) -> tuple[T, T]:
    """Call both, each first in every other round: A B B A."""
    if number % 2:
        of_b = b()
        return a(), of_b
    return a(), b()


def comparison(pairs: Sequence[tuple[float, float]], digits: int) -> str:
    """Format `A median, B median, B/A median (low-high), 95 % low-high`.

    The ratios are taken per pair. The last two enclose their median with a certainty of 95 %.
    """
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [of_b / of_a if of_a else float("nan") for of_a, of_b in pairs]
    low, high = interval_of_median(ratios)
    ratio = f"{median_and_range(ratios, 3)}, 95 % {low:.3f}-{high:.3f}"
    return f"A {a:.{digits}f}, B {b:.{digits}f}, B/A {ratio}"


def interval_of_median(values: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """Bound the true median with a certainty of 95 %, by the percentile bootstrap."""
    rng = random.Random(0)
    medians = sorted(
        statistics.median(rng.choices(values, k=len(values))) for _ in range(resamples)
    )
    return medians[resamples * 25 // 1000], medians[-1 - resamples * 25 // 1000]


def median_and_range(values: list[float], digits: int = 1) -> str:
    """Format `median (low-high)`: one disturbed round must not determine the result."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
