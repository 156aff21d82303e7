"""Memory that kernels stream through: aligned to cache lines, in huge pages where it is large."""

import mmap

import torch
from torch import Tensor

ALIGNMENT = 64
HUGE_PAGE = 2 * 2**20


def aligned_bytes(nbytes: int) -> Tensor:
    """uint8 [nbytes] that starts at a multiple of 64 bytes; its content is undefined.

    From 2 MiB on it starts at a huge page, and untouched pages take no memory.
    """
    if nbytes < HUGE_PAGE:
        return _aligned(torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8), nbytes, ALIGNMENT)
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(torch.frombuffer(memory, dtype=torch.uint8), nbytes, HUGE_PAGE)


def _aligned(block: Tensor, nbytes: int, alignment: int) -> Tensor:
    start = -block.data_ptr() % alignment
    return block[start : start + nbytes]
