"""Quantizes a dense weight to a QuantizedWeight, a few rows at a time.

Codes of int8 and nf4 equal those of bitsandbytes. int8: per output, symmetric, scale = max|w| /
127. nf4: blocks of 64 adjacent inputs, scale = max|w|, the code whose value is nearest to w /
scale, the lower of two that are equally near. int4: blocks of 64, symmetric, code - 8; the scale is
that of three whose squared error is least. fp8: per output, scale = max|w| / 448, the nearest
e4m3. Computed in float32 for every dtype of the weight, on the weight's device.
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
    NF4_VALUES,
    QuantizedWeight,
    pack_pairs,
)
from engine.model.spec import ModelError

NF4_BLOCK = 64
INT4_BLOCK = 64
# The step that a block's largest value becomes. Beyond -8 it is clamped, which most others gain by.
INT4_STEPS = (-8.0, -8.4, -8.8)
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
    """Quantize a weight [out, in] of any float dtype to int4; in must be a multiple of 64."""
    num_out, num_in = weight.shape
    codes = torch.empty(num_out, num_in // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(num_out, num_in // INT4_BLOCK, device=weight.device)
    for rows, wide in _chunks(weight):
        steps, scale = _best_steps(wide.view(len(wide), -1, INT4_BLOCK))
        codes[rows] = pack_pairs((steps.flatten(1) + INT4_MIDDLE).to(torch.uint8))
        scales[rows] = scale
    return QuantizedWeight("int4", codes, _finite(scales), group_size=INT4_BLOCK)


def _best_steps(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the steps -8 ... 7 of blocks [..., 64], and their scales, by INT4_STEPS."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    steps, scale, least = _steps(blocks, largest / INT4_STEPS[0])
    for count in INT4_STEPS[1:]:
        others, other_scale, error = _steps(blocks, largest / count)
        is_better = error < least
        steps, scale = others.where(is_better, steps), other_scale.where(is_better, scale)
        least = error.where(is_better, least)
    return steps, scale[..., 0]


def _steps(blocks: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round to steps of these scales [..., 1]; return steps, scales and the squared errors."""
    inverse = scale.sign() / scale.abs().clamp(min=_TINY)
    steps = (blocks * inverse).round_().clamp_(-INT4_MIDDLE, INT4_MIDDLE - 1)
    return steps, scale, (steps * scale).sub_(blocks).square_().sum(-1, keepdim=True)


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
