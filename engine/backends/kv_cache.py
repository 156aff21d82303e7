"""Allocates the paged K/V tensor as one piece of memory, and copies its blocks.

Layout is block-major, `[num_blocks, num_layers, 2, block_size, H_kv, D]`: a block is one
contiguous piece of memory, so that it can be copied, evicted or moved as a unit.

On a CPU, adapters lie outside: an extent in the arena is memory that KV blocks give back to the
operating system, so that both together stay within the arena's size.
"""

import ctypes
import mmap
from collections.abc import Sequence

import torch

from engine.model.spec import ModelSpec, kv_bytes_per_token
from engine.scheduler.batch import AdapterLoad, AdapterMove, BlockCopy, Move

_MADVISE = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
_MADV_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


def allocate_kv_cache(
    num_blocks: int, block_size: int, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Allocate zeros, so that padding reads finite values; a CPU commits the pages on first use."""
    shape = (num_blocks, spec.num_layers, 2, block_size, spec.num_kv_heads, spec.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


def blocks_of_arena(
    arena: torch.Tensor, block_size: int, spec: ModelSpec, dtype: torch.dtype
) -> torch.Tensor:
    """View an arena of bytes as blocks, from its low end, as many as it can hold."""
    block_bytes = block_size * kv_bytes_per_token(spec, dtype)
    num_blocks = arena.numel() // block_bytes
    shape = (num_blocks, spec.num_layers, 2, block_size, spec.num_kv_heads, spec.head_dim)
    return arena[: num_blocks * block_bytes].view(dtype).view(shape)


def copy_blocks(kv_cache: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
    """Make the copies one after the other: each may read what an earlier one wrote."""
    for source, destination in copies:
        kv_cache[destination] = kv_cache[source]


# ==== a CPU's arena ====


def move_on_host(kv_cache: torch.Tensor, moves: Sequence[Move]) -> None:
    """Make the moves one after the other; an adapter's is only of the memory that it stands for."""
    for move in moves:
        if isinstance(move, AdapterMove):
            give_back(kv_cache, move.destination_bytes, move.nbytes)
        else:
            copy_blocks(kv_cache, [move])


def load_on_host(kv_cache: torch.Tensor, load: AdapterLoad) -> None:
    """Give back what the adapter's extent covers: the adapter lies elsewhere in host memory."""
    give_back(kv_cache, load.offset_bytes, load.nbytes)


def give_back(kv_cache: torch.Tensor, offset: int, nbytes: int) -> None:
    """Return whole pages of these bytes to the operating system; they read as zeros from now on.

    Does nothing where the system cannot. No block in use may lie there.
    """
    if _MADVISE is None or _MADV_DONTNEED is None or kv_cache.device.type != "cpu":
        return
    base, page = kv_cache.data_ptr(), mmap.PAGESIZE
    start = -(-(base + offset) // page) * page
    end = (base + min(offset + nbytes, kv_cache.nbytes)) // page * page
    if start < end:
        address, length = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        _MADVISE(address, length, ctypes.c_int(_MADV_DONTNEED))
