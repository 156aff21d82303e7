"""Dequantizes a packed weight to a dense one, for products of many rows.

Reading the codes is then the smaller part of the work, and the library multiplies faster than a
kernel that also decodes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.backends.cuda.triton.fourbit import decode, decoding, panel_offsets
from engine.backends.cuda.triton.launch import upcast
from engine.backends.cuda.triton.packed_weight import PANEL, PackedWeight

BLOCKS = 8  # blocks of inputs per program

_PANEL = tl.constexpr(PANEL)


@triton.jit
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    values_ptr,
    dense_ptr,
    out_features,
    in_features,
    blocks,
    out_padded,
    DECODE: tl.constexpr,
    BK: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Decode one panel's outputs, for BLOCKS blocks of its inputs."""
    W: tl.constexpr = BK // 4 if DECODE == "int8" else BK // 8
    HAS_ZEROS: tl.constexpr = DECODE == "int4" or DECODE == "int4_whole"
    DTYPE: tl.constexpr = dense_ptr.dtype.element_ty
    panel = tl.program_id(0).to(tl.int64)
    out = tl.program_id(0) * _PANEL + tl.arange(0, _PANEL)
    words_tile = words_ptr + panel * (blocks * _PANEL * W) + panel_offsets(blocks, _PANEL, W)
    dense_row = dense_ptr + out[:, None].to(tl.int64) * in_features
    first = tl.program_id(1) * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, blocks)):
        group = (block // GROUP_BLOCKS) * out_padded + out
        scale = tl.load(scales_ptr + group)[:, None]
        zero = tl.load(zeros_ptr + group)[:, None] if HAS_ZEROS else scale
        words = tl.load(words_tile + block * (_PANEL * W))
        weights = decode(words, scale, zero, values_ptr, DECODE, DTYPE, UPCAST)
        column = block * BK + tl.arange(0, BK)[None, :]
        mask = (out[:, None] < out_features) & (column < in_features)
        tl.store(dense_row + column, weights, mask=mask)


def dequantize(weight: PackedWeight, dense: Tensor) -> None:
    """Decode the weight into dense [out, in], contiguous and of any float dtype.

    Each value is computed in float32 and rounded once. Columns are in the order of the codes,
    whatever `input_order` is.
    """
    grid = (weight.words.shape[0], -(-weight.blocks // BLOCKS))
    dequantize_kernel[grid](
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.values,
        dense,
        weight.out_features,
        weight.in_features,
        weight.blocks,
        weight.out_padded,
        DECODE=decoding(weight, dense.dtype),
        BK=weight.block,
        GROUP_BLOCKS=weight.group_blocks,
        BLOCKS=BLOCKS,
        UPCAST=upcast(dense.dtype),
        num_warps=4,
    )


def multiply_dense(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, dense: Tensor
) -> None:
    """Compute out [N, out] = x [N, in] W^T + bias through `dense` [out, in]; all of one dtype."""
    dequantize(weight, dense)
    if bias is None:
        torch.mm(x, dense.t(), out=out)
    else:
        torch.addmm(bias, x, dense.t(), out=out)
