"""Computes y = x W^T for a low-bit weight, decoded in registers just before the product.

A program takes BM rows of x and BN outputs and loops over blocks of BK inputs; a weight is read
and decoded once for every BM rows. Each weight is multiplied by its scale in float32 and rounded
to x's dtype before the product, as `dequantize` and a cast would do; sums are float32.

If one program per tile would leave processors idle, the inputs are cut into SPLIT_K parts, each
summed into its own float32 plane, and `sum_kernel` adds the planes in order. No atomics: the same
x gives the same bits, and a row's bits do not depend on the other rows as long as BM and SPLIT_K
stay the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.backends.cuda.triton import nf4_lookup
from engine.backends.cuda.triton.crossovers import GemmTiles
from engine.backends.cuda.triton.launch import interpreting, upcast
from engine.backends.cuda.triton.packed_weight import PANEL, PackedWeight

_TABLE_BF16 = tl.constexpr(nf4_lookup.table_ptx("bf16x2"))
_TABLE_FP16 = tl.constexpr(nf4_lookup.table_ptx("f16x2"))
_TABLE_CONSTRAINTS = tl.constexpr(nf4_lookup.TABLE_CONSTRAINTS)
_LOOKUP = tl.constexpr(nf4_lookup.lookup_ptx())
_LOOKUP_CONSTRAINTS = tl.constexpr(nf4_lookup.LOOKUP_CONSTRAINTS)
_EXPONENT = tl.constexpr(0x4B000000)  # of the float 2^23
_PANEL = tl.constexpr(PANEL)
SUM_BLOCK = 1024


# ==== Rounding ====


@triton.jit
def rounded(value, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Round float32 to DTYPE, to nearest, ties to even.

    UPCAST: to bfloat16 in the interpreter, whose cast only cuts off the lower half, so the value
    is rounded here first, in integers. Does not handle NaN.
    """
    if UPCAST:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


# ==== Decoding: words [BN, W] int32 -> weights [BN, W * codes in a word] ====


@triton.jit
def _interleave4(a, b, c, d):
    """Join four [X, W] to [X, 4 W], whose columns 4 w .. 4 w + 3 are column w of a, b, c, d."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(joined, (a.shape[0], 4 * a.shape[1]))


@triton.jit
def _interleave2(a, b):
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _whole(words, less, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Return the field at bit SHIFT of every word minus `less`, a whole number, as an exact float.

    Needs no conversion: with a field at bit LOW of its last bits, the float 2^23 becomes
    2^23 + field * 2^LOW.
    """
    LOW: tl.constexpr = SHIFT % 16
    half = words.to(tl.uint32, bitcast=True) >> (SHIFT - LOW)
    field = (half & (MASK << LOW)) | _EXPONENT
    return field.to(tl.float32, bitcast=True) * (0.5**LOW) - (2.0 ** (23 - LOW) + less)


@triton.jit
def _value(words, zero, values_ptr, SHIFT: tl.constexpr, DECODE: tl.constexpr):
    """Return the unscaled values of the codes at bit SHIFT of every word."""
    if DECODE == "int8":
        value = _whole(words, 128, SHIFT, 255)
    elif DECODE == "int4_whole":
        value = _whole(words, zero, SHIFT, 15)
    elif DECODE == "int4":
        value = _whole(words, 0, SHIFT, 15) - zero
    else:
        value = tl.load(values_ptr + ((words >> SHIFT) & 15))
    return value


@triton.jit
def _four(words, zero, values_ptr, FIRST: tl.constexpr, DECODE: tl.constexpr):
    """Return the unscaled values of the codes at bits FIRST, FIRST + 8, FIRST + 16, FIRST + 24."""
    return _interleave4(
        _value(words, zero, values_ptr, FIRST, DECODE),
        _value(words, zero, values_ptr, FIRST + 8, DECODE),
        _value(words, zero, values_ptr, FIRST + 16, DECODE),
        _value(words, zero, values_ptr, FIRST + 24, DECODE),
    )


@triton.jit
def _nf4_in_registers(words, scale, DTYPE: tl.constexpr):
    TABLE: tl.constexpr = _TABLE_FP16 if DTYPE == tl.float16 else _TABLE_BF16  # noqa: SIM300
    t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
        TABLE,
        _TABLE_CONSTRAINTS,
        [scale],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    a, b, c, d = tl.inline_asm_elementwise(
        _LOOKUP,
        _LOOKUP_CONSTRAINTS,
        [words, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    pairs = _interleave4(a, b, c, d)
    halves = _interleave2(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return halves.to(DTYPE, bitcast=True)


@triton.jit
def decode(
    words,
    scale,
    zero,
    values_ptr,
    DECODE: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Decode words [BN, W] with scale and zero [BN, 1] to weights in DTYPE, inputs in order.

    DECODE is a format; or nf4_registers: nf4 by `nf4_lookup`, for a 16-bit DTYPE and not in the
    interpreter; or int4_whole: int4 with less work, for zeros that are whole numbers.
    """
    # The last operation must not be a reshape: the compiler would move it into shared memory, for
    # which small blocks have no layout
    if DECODE == "nf4_registers":
        return _nf4_in_registers(words, scale, DTYPE)
    else:
        values = _four(words, zero, values_ptr, 0, DECODE)
        if DECODE != "int8":
            values = _interleave2(values, _four(words, zero, values_ptr, 4, DECODE))
        return rounded(values * scale, DTYPE, UPCAST)


@triton.jit
def panel_offsets(blocks, BN: tl.constexpr, W: tl.constexpr):
    """Return offsets [BN, W] of the first block's words from the first word of the first output."""
    out = tl.arange(0, BN)
    row = (out // _PANEL) * (blocks * _PANEL * W) + (out % _PANEL) * W
    return row[:, None] + tl.arange(0, W)[None, :]


# ==== The product ====


@triton.jit(do_not_specialize=["rows"])
def gemm_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    values_ptr,
    bias_ptr,
    y_ptr,
    rows,
    out_features,
    in_features,
    blocks,
    out_padded,
    stride_x,
    stride_y,
    DECODE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    W: tl.constexpr = BK // 4 if DECODE == "int8" else BK // 8
    HAS_ZEROS: tl.constexpr = DECODE == "int4" or DECODE == "int4_whole"
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first_out = tl.program_id(1) * BN
    out = first_out + tl.arange(0, BN)
    part = tl.program_id(2)
    block_words: tl.constexpr = _PANEL * W

    wide_row = row.to(tl.int64)[:, None]
    x_tile = x_ptr + wide_row * stride_x + tl.arange(0, BK)[None, :]
    words_tile = words_ptr + (first_out // _PANEL).to(tl.int64) * (blocks * block_words)
    words_tile += panel_offsets(blocks, BN, W)
    if ONE_GROUP:
        scale = tl.load(scales_ptr + out)[:, None]
        zero = tl.load(zeros_ptr + out)[:, None] if HAS_ZEROS else scale

    acc = tl.zeros((BM, BN), tl.float32)
    step = tl.cdiv(blocks, SPLIT_K)
    for block in range(part * step, tl.minimum(part * step + step, blocks)):
        mask = row[:, None] < rows
        if not EVEN_K:
            mask = mask & (block * BK + tl.arange(0, BK)[None, :] < in_features)
        x = tl.load(x_tile + block * BK, mask=mask, other=0.0)
        words = tl.load(words_tile + block * block_words)
        if not ONE_GROUP:
            group = (block // GROUP_BLOCKS) * out_padded + out
            scale = tl.load(scales_ptr + group)[:, None]
            zero = tl.load(zeros_ptr + group)[:, None] if HAS_ZEROS else scale
        weights = decode(words, scale, zero, values_ptr, DECODE, DTYPE, UPCAST)
        if UPCAST:
            weights = weights.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(x, tl.trans(weights), acc, input_precision="ieee")

    if HAS_BIAS:
        acc += tl.load(bias_ptr + out)[None, :]
    # A plane's stride is computed: as an argument, multiples of 16 would get a kernel of their own
    at = y_ptr + (part.to(tl.int64) * rows + wide_row) * stride_y + out[None, :]
    mask = (row[:, None] < rows) & (out[None, :] < out_features)
    ROUND: tl.constexpr = UPCAST and SPLIT_K == 1
    tl.store(at, rounded(acc, y_ptr.dtype.element_ty, ROUND), mask=mask)


@triton.jit
def sum_kernel(
    planes_ptr,
    bias_ptr,
    y_ptr,
    out_features,
    stride_y,
    PLANES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute y [rows, out] = sum of planes [PLANES, rows, out] + bias.

    Each program computes part of a row.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = out < out_features
    at = planes_ptr + row * out_features + out
    total = tl.load(at, mask=mask, other=0.0)
    for plane in tl.static_range(1, PLANES):
        total += tl.load(at + plane * rows * out_features, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + out, mask=mask, other=0.0)
    total = rounded(total, y_ptr.dtype.element_ty, UPCAST)
    tl.store(y_ptr + row * stride_y + out, total, mask=mask)


# ==== Launchers ====


def multiply(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    planes: Tensor,
    tiles: GemmTiles,
) -> None:
    """Compute out [N, out] = x [N, in] W^T + bias; x's columns are in the order of the codes.

    `bias` is float32 [padded out]; `planes` float32 with at least `planes_size` elements. The
    last dimensions of x and out are contiguous. The grid depends on N and the strides alone:
    nothing is read from the device, nothing allocated.
    """
    rows, split = len(x), tiles.split_k
    target = planes if split > 1 else out
    stride_y = weight.out_features if split > 1 else out.stride(0)
    grid = (-(-rows // tiles.rows), weight.out_padded // tiles.outputs, split)
    gemm_kernel[grid](
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.values,
        bias,
        target,
        rows,
        weight.out_features,
        weight.in_features,
        weight.blocks,
        weight.out_padded,
        x.stride(0),
        stride_y,
        DECODE=decoding(weight, x.dtype),
        BM=tiles.rows,
        BN=tiles.outputs,
        BK=weight.block,
        SPLIT_K=split,
        GROUP_BLOCKS=weight.group_blocks,
        ONE_GROUP=len(weight.scales) == 1,
        HAS_BIAS=bias is not None and split == 1,
        EVEN_K=weight.in_features % weight.block == 0,
        UPCAST=upcast(x.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if split > 1:
        _sum_planes(planes, bias, out, split)


def planes_size(weight: PackedWeight, rows: int, tiles: GemmTiles) -> int:
    """Number of float32 elements of `planes` that `multiply` needs for this many rows."""
    return tiles.split_k * rows * weight.out_features if tiles.split_k > 1 else 0


def decoding(weight: PackedWeight, dtype: torch.dtype) -> str:
    """Return the kernels' DECODE for this weight and dtype of x."""
    if weight.format == "nf4" and dtype != torch.float32 and not interpreting():
        return "nf4_registers"
    return "int4_whole" if weight.has_whole_zeros else weight.format


def _sum_planes(planes: Tensor, bias: Tensor | None, out: Tensor, split: int) -> None:
    rows, out_features = out.shape
    sum_kernel[rows, -(-out_features // SUM_BLOCK)](
        planes,
        bias,
        out,
        out_features,
        out.stride(0),
        PLANES=split,
        HAS_BIAS=bias is not None,
        BLOCK=SUM_BLOCK,
        UPCAST=upcast(out.dtype),
    )
