"""The paged K/V tensor: the one allocation that holds its blocks, and copies between them.

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
    """Zeroed, so that padding reads finite values; on CPU the pages are committed when used."""
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
    """One after the other: a copy may read what one before it wrote."""
    for source, destination in copies:
        kv_cache[destination] = kv_cache[source]
