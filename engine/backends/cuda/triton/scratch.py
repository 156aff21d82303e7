"""Scratch: device memory that all layers of a model use in turn, on one stream."""

import torch
from torch import Tensor


class Scratch:
    """Holds as much memory as the largest reservation asked for.

    The address is fixed from the first use on, because CUDA graphs record it. Contents are valid
    only during the layer call that took them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nbytes = 0
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def reserve(self, nbytes: int) -> None:
        """Ensure that `nbytes` can be taken. Raises RuntimeError if memory in use cannot grow."""
        if self._buffer is not None and nbytes > len(self._buffer):
            raise RuntimeError(
                f"scratch of {len(self._buffer)} bytes is in use and cannot grow to {nbytes}: "
                f"build every layer before the first call"
            )
        self._nbytes = max(self._nbytes, nbytes)

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return the start of the memory as a tensor of this dtype and shape, content undefined.

        Raises ValueError if it needs more than was reserved.
        """
        size = dtype.itemsize * torch.Size(shape).numel()
        if size > self._nbytes:
            raise ValueError(f"{size} bytes of scratch: {self._nbytes} are reserved")
        if self._buffer is None:
            self._buffer = torch.empty(self._nbytes, dtype=torch.uint8, device=self.device)
        return self._buffer[:size].view(dtype).view(shape)
