"""Rows rounded to FP8 (e4m3), each with a scale of its own: what FP8 linear layers read.

The rounding is done in integers: exact on every device and in the interpreter, and free beside
the memory that these kernels wait for. Constants are local, here and in `gate`: Triton compares
all global ones at every launch of a kernel that may use them.
"""

import torch
import triton
import triton.language as tl

from engine.backends.cuda.fp8 import E4m3Rows
from engine.backends.cuda.triton.launch import block_of, warps_of


@triton.jit
def e4m3_bits(values):
    """float32, at most 448 in magnitude -> the nearest e4m3, ties to even, as uint8."""
    DENORMAL: tl.constexpr = 2.0**-6  # below it e4m3 counts steps of 2^-9
    DENORMAL_SHIFT: tl.constexpr = 2.0**14  # added, it leaves that count in a float32's last bits
    DENORMAL_BITS: tl.constexpr = 0x46800000  # those of DENORMAL_SHIFT
    EXPONENTS_APART: tl.constexpr = (127 - 7) << 3  # float32's bias and e4m3's
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
    """A whole row, float32 and 0 outside: its codes through pointers [BLOCK], its scale."""
    LARGEST: tl.constexpr = 448.0  # of e4m3
    TINY: tl.constexpr = 1e-12  # rows below it have its scale: 1 / scale must not overflow
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
    """x [N, width] of any float, its last dimension contiguous, into `rows` of the same shape."""
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
