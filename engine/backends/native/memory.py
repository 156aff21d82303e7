"""Allocates memory for kernels: aligned to cache lines, and in huge pages if it is long-lived."""

import mmap

import torch
from torch import Tensor

ALIGNMENT = 64
HUGE_PAGE = 2 * 2**20
BLOCK = 64 * 2**20


def temporary_bytes(nbytes: int) -> Tensor:
    """Allocate uint8 [nbytes], undefined, from torch's allocator: for short-lived data."""
    block = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    begin = -block.data_ptr() % ALIGNMENT
    return block[begin : begin + nbytes]


def separate_bytes(nbytes: int) -> Tensor:
    """Allocate uint8, undefined, `nbytes` rounded up to huge pages, which are freed together."""
    whole = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
    return _map(whole)[:whole]


class Blocks:
    """Cuts memory for long-lived data, such as weights, from blocks of huge pages.

    Neighbours share pages, so that reading them in order causes few TLB misses. A block is
    freed once all its pieces are freed. Not thread-safe.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)  # of the newest block, not touched yet

    def cut(self, nbytes: int) -> Tensor:
        """Return uint8 [nbytes], aligned; its content is undefined."""
        taken = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if taken > BLOCK // 4:
            return _map(nbytes)[:nbytes]  # separate, so that it is freed independently
        if taken > self._rest.numel():
            self._rest = _map(BLOCK)
        piece, self._rest = self._rest[:nbytes], self._rest[taken:]
        return piece


def _map(nbytes: int) -> Tensor:
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return _from_multiple(torch.frombuffer(memory, dtype=torch.uint8), HUGE_PAGE)


def _from_multiple(block: Tensor, alignment: int) -> Tensor:
    return block[-block.data_ptr() % alignment :]
