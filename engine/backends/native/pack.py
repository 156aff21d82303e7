"""Packs a weight into the layout that its kernel reads, on the context's threads."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.model.quantized_weight import QuantizedWeight

PANEL = 32  # outputs per panel: kPanel of src/linear_layout.h
MAX_WIDE_INPUTS = 2**16  # whose products of bytes int32 holds

Weight = Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight: the number of its format, and the data that kernels read, in 64-byte
    aligned memory (`Context.blocks`). The format defines `scales` and the other fields."""

    format: int
    packed: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    multipliers: Tensor | None = None
    input_order: Tensor | None = None
    group_size: int = 0


# (context, weight of its format, int8_activations)
Packer = Callable[..., PackedWeight]


def pack_bf16(context: Context, weight: Tensor, _: bool = False) -> PackedWeight:
    """Pack as [panel][pair of inputs][32 outputs][2]."""
    source = weight if weight.stride(1) == 1 else weight.contiguous()
    out_features, in_features = source.shape
    pairs = -(-in_features // 2)
    packed = context.blocks.cut(panels_of(out_features) * pairs * PANEL * 4)
    run_pack(context, structs.BF16, source, packed, in_features)
    return PackedWeight(structs.BF16, packed)


def pack_int8(context: Context, weight: QuantizedWeight, _: bool = False) -> PackedWeight:
    """Pack as [panel][four inputs][32 outputs][4], each code plus 128; scales float32 [out]."""
    return _pack_int8(structs.INT8, context, weight)


def pack_int8_wide(context: Context, weight: QuantizedWeight, _: bool = False) -> PackedWeight:
    """Pack like `pack_int8`, for the kernel that rounds activations to 16 bits instead of 8."""
    if weight.in_features > MAX_WIDE_INPUTS:
        raise ValueError(f"{weight.in_features} inputs: at most {MAX_WIDE_INPUTS} are summed")
    return _pack_int8(structs.INT8_WIDE, context, weight)


def _pack_int8(format: int, context: Context, weight: QuantizedWeight) -> PackedWeight:
    out_features, in_features = weight.codes.shape
    quads = -(-in_features // 4)
    packed = context.blocks.cut(panels_of(out_features) * quads * PANEL * 4)
    run_pack(context, format, weight.codes.contiguous(), packed, in_features)
    return PackedWeight(format, packed, weight.scales.detach().float().flatten().clone())


def run_pack(
    context: Context,
    format: int,
    source: Tensor,
    packed: Tensor,
    in_features: int,
    group_size: int = 0,
) -> None:
    """Pack `source` [out, ...] into `packed` on the context's threads; `group_size`: 4-bit only."""
    context.function("pack", structs.ReefPackArgs)(
        structs.ReefPackArgs(
            format=format,
            in_features=in_features,
            out_features=len(source),
            group_size=group_size,
            weight=source.data_ptr(),
            weight_stride=source.stride(0) * source.element_size(),
            packed=packed.data_ptr(),
        )
    )


def panels_of(out_features: int) -> int:
    return -(-out_features // PANEL)
