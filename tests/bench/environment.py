"""What a row of numbers was measured on, and who else was busy meanwhile.

A row is one line. Without its header a number is not a number.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def header(seed: int) -> str:
    """Commit (+: with changes), processor, cores, threads, torch, day and seed."""
    return (
        f"{_commit()} | {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        f" | torch {torch.__version__.partition('+')[0]} | {time.strftime('%Y-%m-%d')}"
        f" | seed {seed}"
    )


def append_row(path: Path | None, row: str) -> None:
    """Print it, and keep it where the caller wants."""
    assert "\n" not in row
    print(row, flush=True)
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(row + "\n")


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
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
    """From its making to `read`: what the machine used, less what the processes named did."""

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
    """CPU seconds of a process and its threads; 0 if it is gone."""
    with suppress(OSError):
        # pid (name) state ppid ... utime stime ...; the name may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return 0.0


def _machine_cpu_s() -> float:
    """All cores: user, nice, system, irq, softirq and stolen time."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = fields
    return (user + nice + system + irq + softirq) / TICKS_PER_S


# ==== many measurements ====


def median_and_range(values: list[float], digits: int = 1) -> str:
    """`middle (low-high)`: one disturbed round must not be the result."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
