"""Tests the thread pool: every chunk runs once, and jobs do not affect later ones."""

import os
import subprocess
import sys

import pytest
import torch

from engine.backends.native import structs
from engine.backends.native.library import Context


def gather(context: Context, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(len(rows), x.shape[1], dtype=torch.bfloat16)
    run = context.function("gather", structs.ReefGatherArgs)
    run(
        structs.ReefGatherArgs(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            rows_of_x=rows.data_ptr(),
            y=y.data_ptr(),
            y_stride=y.stride(0),
            rows=len(rows),
            width=x.shape[1],
        )
    )
    return y


def test_thousands_of_jobs_in_a_row_lose_and_repeat_nothing(isa: str) -> None:
    context = Context(isa, 4)
    x = torch.randn(64, 1024).bfloat16()
    for i in range(3000):
        rows = torch.randint(0, 64, (1 + i * 37 % 90,), dtype=torch.int32)
        assert torch.equal(gather(context, x, rows), x[rows.long()]), i
    context.close()


def test_jobs_are_right_while_another_process_takes_the_cores(isa: str) -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        context = Context(isa, 3)
        x = torch.randn(64, 4096).bfloat16()
        for _ in range(300):
            rows = torch.randint(0, 64, (80,), dtype=torch.int32)
            assert torch.equal(gather(context, x, rows), x[rows.long()])
        context.close()
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_contexts_open_and_close_without_a_thread_left(isa: str) -> None:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(50):
        context = Context(isa, 3)
        gather(context, torch.zeros(64, 4096).bfloat16(), torch.arange(64, dtype=torch.int32))
        context.close()
    assert len(os.listdir("/proc/self/task")) == before


def test_unsupported_contexts_are_refused_by_name(isa: str) -> None:
    with pytest.raises(ValueError, match=r"with 0 threads: this machine has "):
        Context(isa, 0)
    with pytest.raises(ValueError, match="isa 'none' with 1 threads"):
        Context("none", 1)
