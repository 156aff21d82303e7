"""What the tests ask of other processes: their command line, and to be gone."""

import time
from pathlib import Path

import psutil


def descendants(root: int) -> list[int]:
    """Process ids below `root`, parents first; none if it is gone."""
    try:
        return [child.pid for child in psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def command(pid: int) -> str:
    """Empty for one that is gone, also for a zombie that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def assert_gone(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while left := [command(pid) for pid in pids if command(pid)]:
        assert time.monotonic() < deadline, f"processes were left behind: {left}"
        time.sleep(0.05)
