"""KvLayout: the native kernels' layout of a KV block, and conversion from and to plain tensors.

The engine moves blocks as bytes; only the kernels, tests and tools look inside. The layout is
described in src/kv_layout.h.
"""

import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.native import structs

RUN = 16  # positions whose keys are interleaved
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Describes one layer's blocks. Raises ValueError for shapes that kernels do not support."""

    kv_format: int  # structs.KV_BF16 or structs.KV_INT8
    block_size: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.kv_format not in (structs.KV_BF16, structs.KV_INT8):
            raise ValueError(
                f"kv_format {self.kv_format}: need {structs.KV_BF16} (bf16) or "
                f"{structs.KV_INT8} (int8)"
            )
        if self.block_size < RUN or self.block_size % RUN:
            raise ValueError(f"block_size {self.block_size}: need a multiple of {RUN}")
        if self.kv_heads < 1:
            raise ValueError(f"kv_heads {self.kv_heads}: need at least 1")
        if self.head_dim % 2 or not 2 <= self.head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim {self.head_dim}: need an even number from 2 to {MAX_HEAD_DIM}"
            )

    @property
    def block_bytes(self) -> int:
        return self.kv_heads * sum(self._part_bytes())

    def allocate(self, num_blocks: int, num_layers: int = 1) -> Tensor:
        """Allocate uint8 [num_blocks, num_layers, block_bytes], in huge pages if available.

        Attention jumps between blocks, and with small pages each jump would miss the TLB.
        """
        nbytes = num_blocks * num_layers * self.block_bytes
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory
        return flat.view(num_blocks, num_layers, self.block_bytes)

    def layer(self, blocks: Tensor, layer: int = 0) -> structs.ReefKvLayer:
        """Describe one layer of `allocate`'s tensor to the kernels; the tensor must outlive it."""
        return structs.ReefKvLayer(
            base=blocks[:, layer].data_ptr(),
            block_bytes=blocks.stride(0),
            format=self.kv_format,
            block_size=self.block_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )

    def pack(self, plain: Tensor) -> Tensor:
        """Pack k and v [2, block_size, kv_heads, head_dim] as uint8 [block_bytes]."""
        heads = plain.movedim(2, 0)  # [kv_heads, 2, block_size, head_dim]
        parts: list[Tensor] = []
        if self.kv_format == structs.KV_BF16:
            elements = heads.to(torch.bfloat16)
        else:
            scales = heads.float().abs().amax(-1, keepdim=True) / 127
            elements = (heads.float() / scales.clamp_min(1e-38)).round().to(torch.int8)
            parts = [scales[:, 0, :, 0], scales[:, 1, :, 0]]
        keys = F.pad(elements[:, 0], (0, self._key_dim - self.head_dim))
        if self.kv_format == structs.KV_INT8:
            keys = (keys.int() + 128).to(torch.uint8)
        keys = keys.reshape(self.kv_heads, -1, RUN, self._key_dim // self._group, self._group)
        values = F.pad(elements[:, 1], (0, self._padded_dim - self.head_dim))
        values = values.reshape(self.kv_heads, -1, self._group, self._padded_dim)
        parts = [keys.transpose(2, 3), values.transpose(2, 3), *parts]
        as_bytes = [p.contiguous().view(self.kv_heads, -1).view(torch.uint8) for p in parts]
        return torch.cat(as_bytes, 1).flatten()

    def unpack(self, packed: Tensor) -> Tensor:
        """Unpack uint8 [block_bytes] to float32 k and v [2, block_size, kv_heads, head_dim]."""
        parts = packed.view(self.kv_heads, -1).split(self._part_bytes(), 1)
        if self.kv_format == structs.KV_BF16:
            keys, values = (part.contiguous().view(torch.bfloat16).float() for part in parts[:2])
        else:
            keys = parts[0].contiguous().float() - 128
            values = parts[1].contiguous().view(torch.int8).float()
        keys = keys.view(self.kv_heads, -1, self._key_dim // self._group, RUN, self._group)
        keys = keys.transpose(2, 3).reshape(self.kv_heads, self.block_size, -1)
        values = values.view(self.kv_heads, -1, self._padded_dim, self._group).transpose(2, 3)
        values = values.reshape(self.kv_heads, self.block_size, -1)
        plain = torch.stack([keys[..., : self.head_dim], values[..., : self.head_dim]])
        if self.kv_format == structs.KV_INT8:
            plain *= torch.stack([p.contiguous().view(torch.float32) for p in parts[2:]])[..., None]
        return plain.transpose(1, 2).contiguous()

    @property
    def _group(self) -> int:
        """Dimensions of a key, or positions of a value, that lie side by side."""
        return 4 if self.kv_format == structs.KV_INT8 else 2

    @property
    def _key_dim(self) -> int:
        return -(-self.head_dim // self._group) * self._group

    @property
    def _padded_dim(self) -> int:
        return -(-self.head_dim // 16) * 16

    def _part_bytes(self) -> list[int]:
        """List the bytes of one KV head: keys, values, and the scales of both if there are any."""
        elements = [self.block_size * self._key_dim, self.block_size * self._padded_dim]
        if self.kv_format == structs.KV_BF16:
            return [2 * n for n in elements]
        return [*elements, 4 * self.block_size, 4 * self.block_size]


def check_heads(heads: int, kv_heads: int) -> None:
    """Raise ValueError unless every kv head serves the same number of heads."""
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} heads: need a multiple of kv_heads {kv_heads}")


def check_rotary(rotary_dim: int, head_dim: int) -> None:
    """Raise ValueError unless rotary_dim dimensions of head_dim can be rotated; 0: none are."""
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim {rotary_dim}: need an even number from 0 to {head_dim}")
