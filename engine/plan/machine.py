"""Measures how fast this machine reads memory and multiplies matrices, in about two seconds.

Takes the best of many tries, so that other load on the machine does not count.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from engine.sizes import Machine

READ_BYTES = {"cpu": 2**27, "cuda": 2**30}  # larger than any cache
MATRIX_SIZE = {"cpu": 512, "cuda": 8192}  # about a millisecond: some try will not be interrupted
PERIOD_S = 1.0


def given_or_measured(dtype: torch.dtype, bandwidth: float | None, flops: float | None) -> Machine:
    """Return the machine with GB/s and TFLOP/s as given; measures the missing ones."""
    if bandwidth is not None and flops is not None:
        return Machine(bandwidth * 1e9, flops * 1e12, "as given")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = measure(device, dtype)
    if bandwidth is not None:
        machine = replace(machine, bytes_per_s=bandwidth * 1e9)
        return replace(machine, source=f"the first as given, the second {machine.source}")
    if flops is not None:
        machine = replace(machine, flops_per_s=flops * 1e12)
        return replace(machine, source=f"the second as given, the first {machine.source}")
    return machine


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Time a sum over a large tensor, and a product of square matrices of `dtype`."""
    num_bytes = READ_BYTES[device.type]
    cells = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    n = MATRIX_SIZE[device.type]
    left, right = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    read_s = _best_s(lambda: cells.sum(), device)
    multiply_s = _best_s(lambda: left @ right, device)
    num_threads = torch.get_num_threads()
    threads = "one CPU thread" if num_threads == 1 else f"{num_threads} CPU threads"
    name = threads if device.type == "cpu" else "the GPU"
    return Machine(num_bytes / read_s, 2 * n**3 / multiply_s, f"measured here, on {name}")


def _best_s(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    work()  # the first call sets things up
    best, deadline = float("inf"), time.perf_counter() + PERIOD_S
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
