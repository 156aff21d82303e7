"""Measures the two rates that bound all work on a device, and derives least times from them."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tests.bench.gpu_clock import medians_s, wake
from tests.bench.gpu_report import Row


@dataclass(frozen=True, slots=True)
class Roofline:
    """The rates. `bytes_per_s` counts reads and writes of a copy; `flops_per_s` is bfloat16's."""

    bytes_per_s: float
    flops_per_s: float

    def step_s(self, num_bytes: float, num_flops: float = 0.0) -> float:
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e9:.0f} GB/s, {self.flops_per_s / 1e12:.1f} TFLOP/s"


def measure(device: torch.device, *, small: bool) -> Roofline:
    """Time a copy far larger than any cache, and a product of large random matrices."""
    wake(device)
    num_bytes, width = (2**24, 256) if small else (2**32, 8192)
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    works = {"copy": lambda: target.copy_(source), "multiply": lambda: torch.mm(a, b, out=out)}
    times = medians_s(works, device)
    return Roofline(2 * num_bytes / times["copy"], 2 * width**3 / times["multiply"])


def rows_of(roofline: Roofline, device: torch.device) -> Iterator[Row]:
    state = _state(device)
    yield Row("copy bandwidth", roofline.bytes_per_s / 1e9, "GB/s", note=state)
    yield Row("bf16 product of random matrices", roofline.flops_per_s / 1e12, "TFLOP/s")


def _state(device: torch.device) -> str:
    """Read clocks, power and temperature, right after the work."""
    if device.type != "cuda":
        return ""
    asked = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {type(error).__name__}"
    return done.stdout.strip().partition("\n")[0]
