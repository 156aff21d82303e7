"""Adds to the residual and applies RMSNorm, in one pass over each row."""

import torch
import triton
import triton.language as tl

from engine.backends.cuda.triton.fp8_rows import store_e4m3
from engine.backends.cuda.triton.launch import block_of, warps_of
from engine.backends.cuda.triton.own import OwnWeights, own_arguments, own_weight
from engine.model.fp8 import E4m3Rows


@triton.jit
def normalised(
    x,
    weight_ptr,
    table_ptr,  # None: no row has an adapter
    floats_ptr,
    words_ptr,
    table_stride,
    place,
    row,
    columns,
    inside,
    eps,
    WIDTH: tl.constexpr,
):
    """Return x / rms(x) * weight of one row: float32 [BLOCK], 0 outside."""
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if table_ptr is not None:
        weight = own_weight(
            weight, table_ptr, floats_ptr, words_ptr, table_stride, place, row, columns, inside
        )
    return x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * weight


@triton.jit(do_not_specialize=["table_stride", "place", "leave_place"])
def add_rms_norm_kernel(
    x_ptr,
    delta_ptr,  # None: nothing is added
    leave_ptr,  # None: delta is added as it is
    weight_ptr,
    out_ptr,
    codes_ptr,  # None: no FP8
    scales_ptr,
    table_ptr,
    floats_ptr,
    words_ptr,
    x_stride,
    delta_stride,
    out_stride,
    table_stride,
    place,
    leave_place,
    scale,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x_at = x_ptr + row * x_stride + columns
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta_at = delta_ptr + row * delta_stride + columns
        delta = tl.load(delta_at, mask=inside, other=0.0).to(tl.float32)
        if leave_ptr is not None:
            delta = normalised(
                delta,
                leave_ptr,
                table_ptr,
                floats_ptr,
                words_ptr,
                table_stride,
                leave_place,
                row,
                columns,
                inside,
                eps,
                WIDTH,
            )
        added = (x + delta * scale).to(x_ptr.dtype.element_ty)
        tl.store(x_at, added, mask=inside)
        x = added.to(tl.float32)  # normalise the rounded values, which later layers read
    normed = normalised(
        x,
        weight_ptr,
        table_ptr,
        floats_ptr,
        words_ptr,
        table_stride,
        place,
        row,
        columns,
        inside,
        eps,
        WIDTH,
    ).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + columns, normed, mask=inside)
    if codes_ptr is not None:
        codes_at = codes_ptr + row * WIDTH + columns
        store_e4m3(normed.to(tl.float32), inside, codes_at, scales_ptr + row)


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    scale: float = 1.0,
    leave: torch.Tensor | None = None,
    rounded: E4m3Rows | None = None,
    own: OwnWeights | None = None,
    names: tuple[str | None, str | None] = (None, None),
) -> None:
    """Compute x += scale * delta in place, then out = x / rms(x) * weight, each rounded once.

    x, delta and out are [N, E], their last dimension contiguous. weight [E] has any float dtype.
    With `leave` [E], delta itself is normalised with that weight before it is added. `rounded`, if
    given, receives out in FP8 too. N may be 0. `own`: adapters of the rows, which may have weights
    of their own; `names` of the two norms, as an adapter names them.
    """
    if len(x):
        width = x.shape[1]
        block = block_of(width)
        table, floats, words, *numbers = own_arguments(own, *names)
        add_rms_norm_kernel[(len(x),)](
            x,
            delta,
            leave,
            weight,
            out,
            None if rounded is None else rounded.codes.view(torch.uint8),
            None if rounded is None else rounded.scales,
            table,
            floats,
            words,
            x.stride(0),
            0 if delta is None else delta.stride(0),
            out.stride(0),
            *numbers,
            scale,
            eps,
            WIDTH=width,
            BLOCK=block,
            num_warps=warps_of(block),
        )
