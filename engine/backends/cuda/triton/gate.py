"""Computes activation(gate) * up, the middle of a gated MLP."""

import torch
import triton
import triton.language as tl

from engine.backends.cuda.triton.fp8_rows import store_e4m3
from engine.backends.cuda.triton.launch import block_of, warps_of
from engine.model.fp8 import E4m3Rows

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BLOCK = 1024  # values per program, if a row can be split


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    INVERSE_ROOT_2: tl.constexpr = 0.7071067811865476
    ROOT_8_BY_PI: tl.constexpr = 1.5957691216057308
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = gate * 0.5 * (1.0 + tl.erf(gate * INVERSE_ROOT_2))
    else:  # 1 + tanh(z) = 2 sigmoid(2 z)
        active = gate * tl.sigmoid((gate + gate * gate * gate * 0.044715) * ROOT_8_BY_PI)
    return active


@triton.jit
def gate_kernel(
    gate_up_ptr,
    out_ptr,
    codes_ptr,  # None: no FP8; otherwise a program computes a whole row
    scales_ptr,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_at = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    gated = (activate(gate, ACTIVATION) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + columns, gated, mask=inside)
    if codes_ptr is not None:
        codes_at = codes_ptr + row * WIDTH + columns
        store_e4m3(gated.to(tl.float32), inside, codes_at, scales_ptr + row)


def gate(
    gate_up: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    *,
    rounded: E4m3Rows | None = None,
) -> None:
    """Compute out [N, I] = activation(gate) * up of gate_up [N, 2 I], rounded once.

    Last dimensions are contiguous. `activation` is one of ACTIVATIONS. `rounded`, if given,
    receives out in FP8 too.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if len(out):
        width = out.shape[1]
        block = min(block_of(width), BLOCK) if rounded is None else block_of(width)
        gate_kernel[(len(out), -(-width // block))](
            gate_up,
            out,
            None if rounded is None else rounded.codes.view(torch.uint8),
            None if rounded is None else rounded.scales,
            gate_up.stride(0),
            out.stride(0),
            WIDTH=width,
            BLOCK=block,
            ACTIVATION=activation,
            num_warps=warps_of(block),
        )
