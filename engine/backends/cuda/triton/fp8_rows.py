"""Rounds rows to FP8 (e4m3), each with its own scale, as inputs of FP8 linear layers.

The rounding is done in integers: exact on every device and in the interpreter, and at no extra
time, as these kernels are limited by memory. Constants are local, here and in `gate`: Triton
compares all global ones at every launch of a kernel that may use them.
"""

import torch
import triton
import triton.language as tl

from engine.backends.cuda.triton.launch import block_of, warps_of
from engine.model.fp8 import E4m3Rows


@triton.jit
def e4m3_bits(values):
    """Round float32, at most 448 in magnitude, to the nearest e4m3, ties to even, as uint8."""
    DENORMAL: tl.constexpr = 2.0**-6  # below it e4m3 values are multiples of 2^-9
    DENORMAL_SHIFT: tl.constexpr = 2.0**14  # adding it puts the multiple into a float32's last bits
    DENORMAL_BITS: tl.constexpr = 0x46800000  # bits of DENORMAL_SHIFT
    EXPONENTS_APART: tl.constexpr = (127 - 7) << 3  # difference of the exponent biases
    NAN: tl.constexpr = 0x7F
    magnitude = tl.abs(values)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - EXPONENTS_APART
    shifted = (magnitude + DENORMAL_SHIFT).to(tl.int32, bitcast=True)
    code = tl.where(magnitude < DENORMAL, shifted - DENORMAL_BITS, normal)
    code = tl.where(values != values, NAN, code)
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def store_e4m3(values, inside, codes_ptr, scale_ptr):
    """Store codes, through pointers [BLOCK], and scale of a whole row: float32, 0 outside."""
    LARGEST: tl.constexpr = 448.0  # largest e4m3 value
    TINY: tl.constexpr = 1e-12  # smaller rows get the scale of this: 1 / scale must not overflow
    largest = tl.maximum(tl.max(tl.abs(values), 0), TINY)
    tl.store(scale_ptr, tl.div_rn(largest, LARGEST))
    scaled = values * tl.div_rn(LARGEST, largest)
    clamped = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    clamped = tl.where(scaled != scaled, scaled, clamped)
    tl.store(codes_ptr, e4m3_bits(clamped), mask=inside)


@triton.jit
def quantize_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    store_e4m3(x, inside, codes_ptr + row * WIDTH + columns, scales_ptr + row)


def quantize_rows(x: torch.Tensor, rows: E4m3Rows) -> None:
    """Round x [N, width], any float dtype, contiguous rows, into `rows` of the same shape."""
    if len(x):
        width = x.shape[1]
        block = block_of(width)
        quantize_rows_kernel[(len(x),)](
            x,
            rows.codes.view(torch.uint8),
            rows.scales,
            x.stride(0),
            WIDTH=width,
            BLOCK=block,
            num_warps=warps_of(block),
        )
