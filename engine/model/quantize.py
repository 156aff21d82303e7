"""Quantizes a dense weight to a QuantizedWeight, a few rows at a time.

Codes of int8 and nf4 equal those of bitsandbytes. int8: per output, symmetric, scale = max|w| /
127. nf4: blocks of 64 adjacent inputs, scale = max|w|, the code whose value is nearest to w /
scale, the lower of two that are equally near. int4: per output, scale = max|w| / 120, times a whole
number per block of 32, of three that whose squared error is least; symmetric, code - 8. fp8: per
output, scale = max|w| / 448, the nearest e4m3. Computed in float32 for every dtype of the weight,
on the weight's device.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from engine.model.fp8 import E4M3, MULTIPLE, quantize_rows
from engine.model.layers import LoraSite
from engine.model.quantized_weight import (
    CHUNK_VALUES,
    INT4_MIDDLE,
    MOST_MULTIPLIER,
    NF4_VALUES,
    QuantizedWeight,
    pack_pairs,
)
from engine.model.spec import ModelError

NF4_BLOCK = 64
INT4_BLOCK = 32
MULTIPLIERS = 3  # that are tried for a block
DEVICE_CHUNK_VALUES = 2**24  # like CHUNK_VALUES, but enough to keep a whole GPU busy
# Midpoints between adjacent values, computed in float32 as the values themselves
_LIMITS = tuple(float((torch.tensor(a) + torch.tensor(b)) / 2) for a, b in pairwise(NF4_VALUES))
_TINY = 1e-38  # below it, 1 / scale would overflow


Quantize = Callable[[Tensor], QuantizedWeight]


class NotFiniteWeight(ValueError):
    """Raised if a weight holds NaN or infinity, or is too large for float32."""


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """Quantize a weight [out, in] of any float dtype to int8."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], 1, device=weight.device)
    for rows, wide in _chunks(weight):
        # Divide by a tensor: for a number, CUDA would multiply by its inverse
        scale = wide.abs().amax(1, keepdim=True) / wide.new_tensor(127.0)
        # A denormal scale is itself rounded, so the largest value may exceed 127 steps
        steps = wide.div_(scale.where(scale > 0, 1.0)).round_().clamp_(-127, 127)
        codes[rows] = steps.to(torch.int8)
        scales[rows] = scale
    return QuantizedWeight("int8", codes, _finite(scales), group_size=weight.shape[1])


def quantize_nf4(weight: Tensor) -> QuantizedWeight:
    """Quantize a weight [out, in] of any float dtype to nf4; in must be a multiple of 64."""
    num_out, num_in = weight.shape
    codes = torch.empty(num_out, num_in // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(num_out, num_in // NF4_BLOCK, device=weight.device)
    for rows, wide in _chunks(weight):
        blocks = wide.view(len(wide), -1, NF4_BLOCK)
        scale = blocks.abs().amax(-1)
        blocks.mul_((1.0 / scale.clamp(min=_TINY))[..., None])
        codes[rows] = pack_pairs(_nearest_codes(wide))
        scales[rows] = scale
    return QuantizedWeight("nf4", codes, _finite(scales), group_size=NF4_BLOCK)


def quantize_int4(weight: Tensor) -> QuantizedWeight:
    """Quantize a weight [out, in] of any float dtype to int4; in must be a multiple of 32."""
    num_out, num_in = weight.shape
    codes = torch.empty(num_out, num_in // 2, dtype=torch.uint8, device=weight.device)
    groups = (num_out, num_in // INT4_BLOCK)
    multipliers = torch.empty(groups, dtype=torch.int8, device=weight.device)
    scales = torch.empty(num_out, 1, device=weight.device)
    for rows, wide in _chunks(weight):
        blocks = wide.view(len(wide), -1, INT4_BLOCK)
        steps, own, scales[rows] = _best_steps(blocks)
        codes[rows] = pack_pairs((steps.flatten(1) + INT4_MIDDLE).to(torch.uint8))
        multipliers[rows] = own.to(torch.int8)
    return QuantizedWeight(
        "int4", codes, _finite(scales), group_size=INT4_BLOCK, multipliers=multipliers
    )


def _best_steps(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return steps -8 ... 7 of blocks [out, G, 32], multipliers [out, G] and scales [out, 1]."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest.abs().amax(1, keepdim=True) / (INT4_MIDDLE * MOST_MULTIPLIER)  # [out, 1, 1]
    # the multiplier whose step -8 is the block's largest value
    wanted = largest * (-1.0 / (INT4_MIDDLE * scale).clamp(min=_TINY))
    steps, multiplier, least = _steps(blocks, scale, _whole(wanted, 0))
    for below in range(1, MULTIPLIERS):
        others, other, error = _steps(blocks, scale, _whole(wanted, below))
        is_better = error < least
        steps, multiplier = others.where(is_better, steps), other.where(is_better, multiplier)
        least = error.where(is_better, least)
    return steps, multiplier[..., 0], scale[..., 0]


def _whole(wanted: Tensor, below: int) -> Tensor:
    """Return the next whole number at least as large, less `below`, with the sign of `wanted`."""
    # the largest block's quotient may be rounded to a little more than the limit
    size = wanted.abs().ceil_().clamp_(max=MOST_MULTIPLIER).sub_(below).clamp_(min=0)
    return size.copysign_(wanted)


def _steps(blocks: Tensor, scale: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round to steps of scale * multiplier [out, G, 1]; return steps, multipliers and the squared
    errors."""
    size = scale * multiplier
    inverse = size.sign() / size.abs().clamp(min=_TINY)
    steps = (blocks * inverse).round_().clamp_(-INT4_MIDDLE, INT4_MIDDLE - 1)
    return steps, multiplier, (steps * size).sub_(blocks).square_().sum(-1, keepdim=True)


def quantize_fp8(weight: Tensor) -> QuantizedWeight:
    """Quantize a weight [out, in] of any float dtype to fp8."""
    codes = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
    scales = torch.empty(weight.shape[0], 1, device=weight.device)
    for rows, wide in _chunks(weight):
        rounded = quantize_rows(wide)
        codes[rows], scales[rows] = rounded.codes, rounded.scales
    return QuantizedWeight("fp8", codes, _finite(scales), group_size=weight.shape[1])


QUANTIZERS: dict[str, Quantize] = {
    "int8": quantize_int8,
    "nf4": quantize_nf4,
    "int4": quantize_int4,
    "fp8": quantize_fp8,
}


BLOCKS = {"nf4": NF4_BLOCK, "int4": INT4_BLOCK}  # inputs that share a scale


def check_quantizable(quantization: str, sites: Iterable[LoraSite]) -> None:
    """Raise ModelError if blocks of 4-bit codes or FP8 tiles do not divide a layer's sizes."""
    for site in sites:
        sizes = (site.in_features, site.out_features)
        if quantization == "fp8" and any(size % MULTIPLE for size in sizes):
            raise ModelError(
                f"quantization='fp8': {site.slices[0].module} belongs to a layer of {sizes[0]} "
                f"inputs and {sizes[1]} outputs, which must be multiples of {MULTIPLE}; use "
                f"'int8' or 'none'"
            )
        block = BLOCKS.get(quantization)
        if block is not None and site.in_features % block:
            raise ModelError(
                f"quantization={quantization!r}: {site.slices[0].module} has {site.in_features} "
                f"input features, which must be a multiple of {block}; use 'int8' or 'none'"
            )


def _chunks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield float32 copies of a few rows each, which the caller may overwrite."""
    values = CHUNK_VALUES if weight.device.type == "cpu" else DEVICE_CHUNK_VALUES
    step = max(1, values // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(torch.float32, copy=True)


def _nearest_codes(values: Tensor) -> Tensor:
    """Count the limits below each value: 15 passes within the cache beat a search per value."""
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    above = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    for limit in _LIMITS:
        codes += torch.gt(values, limit, out=above).view(torch.uint8)
    return codes


def _finite(scales: Tensor) -> Tensor:
    if not scales.isfinite().all():
        raise NotFiniteWeight("holds values that are not finite")
    return scales
