"""The two rates that nothing on a device can beat, and the times that follow from them."""

from dataclasses import dataclass

import torch

from tests.bench.gpu_clock import median_s


@dataclass(frozen=True, slots=True)
class Roofline:
    """`bytes_per_s` counts what a copy reads and what it writes; `flops_per_s` is of bfloat16."""

    bytes_per_s: float
    flops_per_s: float

    def step_s(self, num_bytes: float, num_flops: float = 0.0) -> float:
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e9:.0f} GB/s, {self.flops_per_s / 1e12:.1f} TFLOP/s"


def measure(device: torch.device, *, tiny: bool) -> Roofline:
    """By a copy far larger than any cache, and a product of large matrices of random numbers."""
    return Roofline(
        _copy_bytes_per_s(2**24 if tiny else 2**32, device),
        _multiply_flops_per_s(256 if tiny else 8192, device),
    )


def _copy_bytes_per_s(num_bytes: int, device: torch.device) -> float:
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_s(lambda: target.copy_(source), device)


def _multiply_flops_per_s(width: int, device: torch.device) -> float:
    a, b = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * width**3 / median_s(lambda: torch.mm(a, b, out=out), device)
