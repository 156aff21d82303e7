"""Copies many small arrays at once, in either direction, through pinned memory that is reused.

Arrays and tensors are of 4-byte types. An upload's pinned buffer is reused only after its copy has
ended; a download's only after it has been read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.cuda.streams import Device, Event

Words = NDArray[Any]  # int32 or float32
WORD_BYTES = 4
ALIGNMENT = 64  # words: sections start at multiples of 256 bytes, for the kernels' reads


class PinnedRing:
    """Pinned buffers that are used in turn, two of them if the host runs a step ahead."""

    def __init__(self, device: Device, count: int = 2) -> None:
        self._device = device
        self._buffers = [device.pinned(0) for _ in range(count)]
        self._sent: list[Event | None] = [None] * count
        self._turn = 0

    def take(self, nbytes: int) -> Tensor:
        """Return the next buffer, of at least `nbytes`, once no copy reads it any more."""
        self._turn = (self._turn + 1) % len(self._buffers)
        event = self._sent[self._turn]
        if event is not None:
            event.wait()
        if self._buffers[self._turn].numel() < nbytes:
            whole = 1 << (nbytes - 1).bit_length()  # as torch would; leaves room to grow
            self._buffers[self._turn] = self._device.pinned(whole)
        return self._buffers[self._turn]

    @property
    def turn(self) -> int:
        """Index of the buffer that was taken last."""
        return self._turn

    def sent(self) -> None:
        """Note that the copies from the buffer taken last have been launched."""
        self._sent[self._turn] = self._device.record()


class Upload:
    """Copies arrays to newly allocated device memory."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._ring = PinnedRing(device)

    def send(self, arrays: Sequence[Words]) -> list[Tensor]:
        """Copy the arrays to the device, each with its shape and type."""
        if not arrays:
            return []
        starts, total = places([a.size for a in arrays])
        pinned = self._ring.take(total * WORD_BYTES)[: total * WORD_BYTES].view(torch.int32)
        words = pinned.numpy()
        for start, array in zip(starts, arrays, strict=True):
            words[start : start + array.size] = array.reshape(-1).view(np.int32)
        there = torch.empty(total, dtype=torch.int32, device=self._device.torch_device)
        self._device.copy(there, pinned)
        self._ring.sent()
        return [
            there[start : start + a.size].view(_torch_dtype(a)).view(a.shape)
            for start, a in zip(starts, arrays, strict=True)
        ]


class Download:
    """Copies tensors to pinned memory, to be read when they have arrived."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: list[Tensor] = []

    def send(self, tensors: Sequence[Tensor]) -> "Arrival":
        words = [t.reshape(-1).view(torch.int32) for t in tensors]
        packed = torch.cat(words)
        pinned = self._take(packed.numel() * WORD_BYTES)
        self._device.copy(pinned[: packed.numel() * WORD_BYTES].view(torch.int32), packed)
        shapes = [(tuple(t.shape), t.dtype) for t in tensors]
        return Arrival(self._device.record(), pinned, shapes, self._free)

    def _take(self, nbytes: int) -> Tensor:
        while self._free:
            buffer = self._free.pop()
            if buffer.numel() >= nbytes:
                return buffer
        return self._device.pinned(nbytes)


class Arrival:
    """Tensors that are being copied to the host."""

    def __init__(
        self,
        event: Event,
        pinned: Tensor,
        shapes: list[tuple[tuple[int, ...], torch.dtype]],
        free: list[Tensor],
    ) -> None:
        self._event, self._pinned, self._shapes, self._free = event, pinned, shapes, free

    def read(self) -> list[Tensor]:
        """Wait, copy out of the pinned memory and free it for reuse; call once."""
        self._event.wait()
        words, start = self._pinned.view(torch.int32).clone(), 0
        self._free.append(self._pinned)
        tensors: list[Tensor] = []
        for shape, dtype in self._shapes:
            count = int(np.prod(shape))
            tensors.append(words[start : start + count].view(dtype).view(shape))
            start += count
        return tensors


def places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return the first word of each section of these sizes, and the words in all."""
    starts: list[int] = []
    end = 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def _torch_dtype(array: Words) -> torch.dtype:
    assert array.dtype in (np.int32, np.float32), f"{array.dtype} is not packed"
    return torch.int32 if array.dtype == np.int32 else torch.float32
