"""Packs 4-bit weights for the native kernels: src/fourbit_bf16.h, fourbit_int8.h and short_int8.h.

Scales stay float32. The kernels hold the values of the codes in bf16 or int8, times a factor that
keeps the rounding error small; the packed scales are divided by it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.memory import Blocks
from engine.backends.native.pack import PANEL, PackedWeight, panels_of, run_pack
from engine.model.quantized_weight import INT4_MIDDLE, MOST_MULTIPLIER, QuantizedWeight

NF4_FACTOR = 1.4367  # for the table in bf16
NF4_INT8_FACTOR = 124.114  # for the table in int8
GROUP_STEP = 32  # group sizes are multiples of it
# Larger groups are split, with their scales repeated: kLargestGroup of src/fourbit.h and
# kLargestInt8Group of src/linear_layout.h, as int8 activations have scales of their own per group.
LARGEST_GROUP = 256
LARGEST_INT8_GROUP = 128
SHORT_GROUP = 32  # kShortGroup of src/linear_layout.h: of weights with multipliers


def pack_nf4(context: Context, weight: QuantizedWeight, int8_activations: bool) -> PackedWeight:
    """Pack a weight.

    `group_size` must be a multiple of 32 that divides in_features. Raises ValueError.
    """
    if weight.input_order is not None:
        raise ValueError("an nf4 weight has no input_order: only int4 ones may")
    if int8_activations:
        return _pack(context, weight, structs.NF4_INT8, NF4_INT8_FACTOR)
    return _pack(context, weight, structs.NF4, NF4_FACTOR)


def pack_int4(context: Context, weight: QuantizedWeight, int8_activations: bool) -> PackedWeight:
    """Pack a weight. Zeros may be any float; the kernels are equally exact for all of them. Without
    zeros, or if they are all 8, it is symmetric, and int8 activations need none. With multipliers
    it is an int8 weight, and so are then its activations: with a scale per row.

    `group_size` must be a multiple of 32 that divides in_features, with multipliers 32; an
    `input_order` a permutation of the inputs. Raises ValueError.
    """
    if weight.multipliers is not None:
        _check_multipliers(weight, weight.multipliers)
        if int8_activations:
            return _pack_short(context, weight, weight.multipliers)
        weight = replace(weight, scales=weight.scales * weight.multipliers, multipliers=None)
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, INT4_MIDDLE)
    if zeros.shape != weight.scales.shape:
        raise ValueError(
            f"zeros {tuple(zeros.shape)}: expected {tuple(weight.scales.shape)}, as of scales"
        )
    zeros = zeros.float()
    if not int8_activations:
        return _pack(context, weight, structs.INT4, 1.0, INT4_MIDDLE - zeros)
    is_symmetric = bool((zeros == INT4_MIDDLE).all())
    return _pack(context, weight, structs.INT4_INT8, 1.0, None if is_symmetric else -zeros)


def _pack(
    context: Context,
    weight: QuantizedWeight,
    format: int,
    factor: float,
    zeros: Tensor | None = None,
) -> PackedWeight:
    _check(weight)
    is_int8 = format in (structs.NF4_INT8, structs.INT4_INT8)
    group_size = _packed_group_size(
        weight.group_size, LARGEST_INT8_GROUP if is_int8 else LARGEST_GROUP
    )
    repeats = weight.group_size // group_size
    packed = context.blocks.cut(panels_of(weight.out_features) * PANEL * weight.in_features // 2)
    run_pack(context, format, weight.codes.contiguous(), packed, weight.in_features, group_size)
    order = weight.input_order
    return PackedWeight(
        format,
        packed,
        scales=_by_panel(context.blocks, weight.scales.float() / factor, repeats),
        zeros=None if zeros is None else _by_panel(context.blocks, zeros, repeats),
        input_order=None if order is None else order.to(torch.int32).clone(),
        group_size=group_size,
    )


def _pack_short(context: Context, weight: QuantizedWeight, multipliers: Tensor) -> PackedWeight:
    in_features, panels = weight.in_features, panels_of(weight.out_features)
    packed = context.blocks.cut(panels * PANEL * in_features // 2)
    # as one group, whose steps lie in order
    run_pack(
        context, structs.SHORT_INT8, weight.codes.contiguous(), packed, in_features, in_features
    )
    return PackedWeight(
        structs.SHORT_INT8,
        packed,
        scales=weight.scales.float().flatten().clone(),
        multipliers=_by_panel(context.blocks, multipliers, 1),
        group_size=SHORT_GROUP,
    )


def _by_panel(blocks: Blocks, values: Tensor, repeats: int) -> Tensor:
    """Lay out [out, groups] as [panel, groups * repeats, 32] of its type, padded with zeros."""
    out_features, groups = values.shape
    panels = panels_of(out_features)
    nbytes = panels * groups * repeats * PANEL * values.itemsize
    packed = blocks.cut(nbytes).view(values.dtype)
    by_panel = packed.view(panels, groups, repeats, PANEL)
    padded = torch.nn.functional.pad(values, (0, 0, 0, panels * PANEL - out_features))
    by_panel.copy_(padded.view(panels, PANEL, groups, 1).permute(0, 2, 3, 1))
    return packed


def _packed_group_size(group_size: int, largest: int) -> int:
    """Return the largest divisor that is a multiple of 32 and at most `largest`."""
    sizes = range(min(group_size, largest), 0, -GROUP_STEP)
    return next(size for size in sizes if group_size % size == 0)


def _check_multipliers(weight: QuantizedWeight, multipliers: Tensor) -> None:
    groups, size = weight.in_features // SHORT_GROUP, weight.group_size
    if size != SHORT_GROUP or weight.in_features % size:
        raise ValueError(
            f"group_size {size} of {weight.in_features} inputs: with multipliers expected "
            f"{SHORT_GROUP}, which must divide them"
        )
    found = tuple(multipliers.shape), tuple(weight.scales.shape)
    expected = (weight.out_features, groups), (weight.out_features, 1)
    if found != expected:
        raise ValueError(
            f"multipliers {found[0]}, scales {found[1]}: expected {expected[0]} and {expected[1]}"
        )
    most = int(multipliers.to(torch.int32).abs().max())
    if multipliers.dtype != torch.int8 or most > MOST_MULTIPLIER:
        raise ValueError(
            f"multipliers {multipliers.dtype} of up to {most}: expected int8 of at most "
            f"{MOST_MULTIPLIER}"
        )
    if weight.zeros is not None or weight.input_order is not None:
        raise ValueError("a weight with multipliers has neither zeros nor an input_order")


def _check(weight: QuantizedWeight) -> None:
    in_features, group_size = weight.in_features, weight.group_size
    if group_size <= 0 or group_size % GROUP_STEP or in_features % group_size:
        raise ValueError(
            f"group_size {group_size} of {in_features} inputs: expected a multiple of "
            f"{GROUP_STEP} that divides them"
        )
    expected = (weight.out_features, in_features // group_size)
    if weight.codes.dtype != torch.uint8 or weight.scales.shape != expected:
        raise ValueError(
            f"codes {weight.codes.dtype}, scales {tuple(weight.scales.shape)}: expected uint8 and "
            f"{expected}"
        )
    order = weight.input_order
    if order is not None and not torch.equal(order.sort().values.long(), torch.arange(in_features)):
        raise ValueError(f"input_order is no permutation of the {in_features} inputs")
