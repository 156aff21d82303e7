"""Allocates the paged K/V tensor as one piece of memory, and copies its blocks.

Layout is block-major, `[num_blocks, num_layers, 2, block_size, H_kv, D]`: a block is one
contiguous piece of memory, so that it can be copied, evicted or moved as a unit.
"""

from collections.abc import Sequence

import torch

from engine.model.spec import ModelSpec, kv_bytes_per_token
from engine.scheduler.batch import BlockCopy


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
