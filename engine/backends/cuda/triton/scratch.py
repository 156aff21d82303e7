"""Scratch: device memory that all layers of a model use in turn, on one stream."""

import torch
from torch import Tensor


class Scratch:
    """As large as the largest reservation, and at one address from its first use on: a CUDA
    graph remembers it. Nothing in it outlives the layer call that took it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nbytes = 0
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def reserve(self, nbytes: int) -> None:
        """Raises RuntimeError once the memory is in use and too small."""
        if self._buffer is not None and nbytes > len(self._buffer):
            raise RuntimeError(
                f"scratch of {len(self._buffer)} bytes is in use and cannot grow to {nbytes}: "
                f"build every layer before the first call"
            )
        self._nbytes = max(self._nbytes, nbytes)

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """The beginning of the memory as such a tensor; undefined content. What was not
        reserved is a ValueError."""
        size = dtype.itemsize * torch.Size(shape).numel()
        if size > self._nbytes:
            raise ValueError(f"{size} bytes of scratch: {self._nbytes} are reserved")
        if self._buffer is None:
            self._buffer = torch.empty(self._nbytes, dtype=torch.uint8, device=self.device)
        return self._buffer[:size].view(dtype).view(shape)
