"""Holds the settings of all parts of the GPU benchmark, and makes batches by hand."""

from dataclasses import dataclass
from typing import TypeVar

import torch

from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.bench.gpu_clock import Budget
from tests.bench.gpu_roofline import Roofline
from tests.bench.models import Shape

BLOCK_SIZE = 16
COLD_BYTES = 2**28  # used between two uses of the same data: several times a cache's size

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """`tiny`: in the interpreter. `quick`: on a device, only to check that everything runs."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape
    roofline: Roofline
    budget: Budget
    tiny: bool = False
    quick: bool = False

    @property
    def is_judged(self) -> bool:
        return not self.tiny and not self.quick

    @property
    def num_sms(self) -> int:
        if self.device.type != "cuda":
            return 4
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    @property
    def rounds(self) -> int:
        """Number of rounds of a measurement, whose value is their median."""
        return 15 if self.is_judged else 1

    def pick(self, full: T, quick: T, tiny: T) -> T:
        return tiny if self.tiny else quick if self.quick else full

    def copies(self, num_bytes: int) -> int:
        """Return how many copies of this size must take turns so that none stays in a cache."""
        return 2 if not self.is_judged else max(2, -(-COLD_BYTES // num_bytes))

    def noise(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype)


def decode_requests(
    batch: int, context: int, chunk: int = 1, slots: list[int] | None = None
) -> list[ScheduledRequest]:
    """Make requests whose last `chunk` tokens are new, with blocks and, if given, adapters."""
    width = -(-context // BLOCK_SIZE)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    return [
        ScheduledRequest(
            f"r{i}",
            0,
            [7] * chunk,
            context - chunk,
            tuple(range(i * width, (i + 1) * width)),
            slots[i] if slots else 0,
            sampling,
            True,
        )
        for i in range(batch)
    ]
