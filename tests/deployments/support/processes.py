"""What the tests ask of other processes: command lines, open ports, and to be gone."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

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


def stop(process: "subprocess.Popen[Any]", family: list[int]) -> int:
    """Interrupt a server, and wait for it as `end` does."""
    process.send_signal(signal.SIGINT)
    return end(process, family)


def end(process: "subprocess.Popen[Any]", family: list[int], seconds: float = 30.0) -> int:
    """Wait for a process; kill it with its `family` if it does not end. Its exit status."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        for pid in (process.pid, *family):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return process.wait(10)


def listening(pids: list[int]) -> list[tuple[str, int]]:
    """The addresses and ports at which they take connections or, unconnected, datagrams."""
    found: set[tuple[str, int]] = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(pid).net_connections("inet"):
                is_open = each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
                if is_open and each.laddr and not each.raddr:
                    found.add((each.laddr[0].removeprefix("::ffff:"), each.laddr[1]))
    return sorted(found)
