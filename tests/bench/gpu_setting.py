"""What every part of the GPU benchmark is run with, and the batches that it makes by hand."""

from dataclasses import dataclass
from typing import TypeVar

import torch

from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.bench.gpu_clock import Budget
from tests.bench.gpu_roofline import Roofline
from tests.bench.models import Shape

BLOCK_SIZE = 16
COLD_BYTES = 2**28  # between two uses of the same: several times what a cache holds

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """`tiny`: in the interpreter; `quick`: on a device, but only to see that everything runs."""

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
        """Of a measurement whose value is the median of its rounds."""
        return 15 if self.is_judged else 1

    def pick(self, full: T, quick: T, tiny: T) -> T:
        return tiny if self.tiny else quick if self.quick else full

    def copies(self, num_bytes: int) -> int:
        """How many of this size take turns so that none is still in a cache."""
        return 2 if not self.is_judged else max(2, -(-COLD_BYTES // num_bytes))

    def noise(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype)


def decode_requests(
    batch: int, context: int, chunk: int = 1, slots: list[int] | None = None
) -> list[ScheduledRequest]:
    """Requests whose last `chunk` tokens are new, each with blocks and, if given, an adapter."""
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
