"""What real processes do with their time, seen from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.process_usage import ProcessUsage, UsageMeter

SPIN = "print(flush=True)\nwhile True: pass"
SLEEP = "import time; print(flush=True); time.sleep(3600)"


@contextmanager
def running(program: str, processor: int | None = None) -> Iterator[int]:
    if processor is not None:
        program = f"import os; os.sched_setaffinity(0, [{processor}]); {program}"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"\n"
            yield process.pid
        finally:
            process.kill()


def measure(pid: int, seconds: float = 0.5) -> tuple[ProcessUsage, float]:
    meter = UsageMeter(pid)
    assert meter.read(0.0) is None, "nothing to compare with"
    began_s = time.monotonic()
    time.sleep(seconds)
    elapsed_s = time.monotonic() - began_s
    usage = meter.read(elapsed_s)
    assert usage is not None
    return usage, elapsed_s


def test_a_process_that_computes_computes_or_waits_for_its_turn() -> None:
    with running(SPIN) as pid:
        usage, elapsed_s = measure(pid)
    assert usage.computing_s > 0
    assert usage.computing_s + usage.waiting_s > 0.7 * elapsed_s


@pytest.mark.parametrize("program", [SPIN, SLEEP])
def test_a_process_that_is_stopped_or_sleeps_does_neither(program: str) -> None:
    with running(program) as pid:
        if program == SPIN:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.2)
        usage, elapsed_s = measure(pid)
    assert usage.computing_s < 0.01 * elapsed_s and usage.waiting_s < 0.1 * elapsed_s


def test_processes_that_share_a_processor_wait_for_each_other() -> None:
    processor = min(os.sched_getaffinity(0))
    with running(SPIN, processor) as pid, running(SPIN, processor), running(SPIN, processor):
        usage, elapsed_s = measure(pid, 1.0)
    assert usage.waiting_s > 0.4 * elapsed_s and 0 < usage.computing_s < 0.6 * elapsed_s


def test_of_a_process_that_has_ended_nothing_is_known() -> None:
    with running(SLEEP) as pid:
        meter = UsageMeter(pid)
        meter.read(0.0)
    assert meter.read(1.0) is None


def test_after_forgetting_there_is_nothing_to_compare_with() -> None:
    meter = UsageMeter(os.getpid())
    meter.read(0.0)
    assert meter.read(1.0) is not None
    meter.forget()
    assert meter.read(1.0) is None


def test_where_there_is_no_proc_nothing_is_known(tmp_path: Path) -> None:
    meter = UsageMeter(os.getpid(), tmp_path)
    meter.read(0.0)
    assert meter.read(1.0) is None


def test_a_wait_for_a_disk_counts_as_long_as_it_lasts(tmp_path: Path) -> None:
    folder = tmp_path / "7" / "task" / "7"
    folder.mkdir(parents=True)
    (folder / "schedstat").write_text("1000000000 0 1\n")
    (folder / "stat").write_text("7 (a name) with) D 1 1\n")
    meter = UsageMeter(7, tmp_path)
    meter.read(0.0)
    assert meter.read(2.0) == ProcessUsage(0.0, 2.0)
    (folder / "stat").write_text("7 (a name) with) T 1 1\n")
    assert meter.read(2.0) == ProcessUsage(0.0, 0.0)
