"""Ops: the arithmetic a decoder calls, and the choice of its implementation.

The choice is made once, at start; callers cannot tell which one they have. Shapes: N tokens,
H heads, D head dim, E hidden, I intermediate. Every op treats its rows alone: what one request
has in its KV blocks, be it NaN, never reaches another's rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from engine.backends.native.library import Context
from engine.backends.native.linear import NativeHead, NativeLinear
from engine.backends.torch import torch_ops
from engine.model import reference
from engine.model.inputs import AttentionInputs
from engine.model.quantized_weight import QuantizedWeight

Multiply = Callable[[Tensor], Tensor]  # [N, in] -> [N, out]


class PackLinear(Protocol):
    def __call__(self, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Multiply:
        """x @ weight [out, in]^T + bias; may keep its own copy of the weight or the weight."""
        ...


class PackHead(Protocol):
    def __call__(self, weight: Tensor) -> Multiply:
        """x @ weight [out, in]^T in float32: a tensor that the caller may change and that the
        next call may overwrite."""
        ...


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension, in float32, rounded once to x's dtype."""
        ...


class ApplyRotary(Protocol):
    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Turns x [N, H, D] in place by cos and sin [N, R]; dimensions from R on are kept."""
        ...


class StoreKv(Protocol):
    def __call__(self, k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
        """Writes k and v [N, H_kv, D] to slots [N] of kv_layer [blocks, 2, block_size, H_kv, D]."""
        ...


class PagedAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        kv_layer: Tensor,
        attention: AttentionInputs,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """q [N, H, D] over each request's own keys -> [N, H, D].

        A query at position p sees keys p - window + 1 .. p. Scores are q.k * scale, then
        soft_cap * tanh(scores / soft_cap) where there is one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of everything, for one device and dtype."""

    pack_linear: PackLinear
    pack_head: PackHead
    rms_norm: RmsNorm
    apply_rotary: ApplyRotary
    gated_activation: Mapping[str, Callable[[Tensor], Tensor]]  # [N, 2 I] -> [N, I]: act(a) * b
    store_kv: StoreKv
    paged_attention: PagedAttention


def select_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest that torch has for this dtype on this device."""
    pack_linear = torch_ops.select_pack_linear(device, dtype)
    return Ops(
        pack_linear=pack_linear,
        pack_head=_float_head(pack_linear),
        rms_norm=torch_ops.rms_norm,
        apply_rotary=torch_ops.apply_rotary,
        gated_activation=torch_ops.GATED_ACTIVATIONS,
        store_kv=torch_ops.store_kv,
        paged_attention=torch_ops.PagedAttention(),
    )


def native_ops(context: Context, *, int8_activations: bool) -> Ops:
    """bfloat16 on a CPU, with linear layers of the native kernels."""

    def pack_linear(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Multiply:
        return NativeLinear(context, weight, bias, int8_activations=int8_activations)

    def pack_head(weight: Tensor) -> Multiply:
        return NativeHead(context, weight)

    torch_only = select_ops(torch.device("cpu"), torch.bfloat16)
    return replace(torch_only, pack_linear=pack_linear, pack_head=pack_head)


def reference_ops() -> Ops:
    """Every op as written in `reference`: slow, plain, the oracle of every other."""
    return Ops(
        pack_linear=reference.pack_linear,
        pack_head=_float_head(reference.pack_linear),
        rms_norm=reference.rms_norm,
        apply_rotary=reference.apply_rotary,
        gated_activation=reference.GATED_ACTIVATIONS,
        store_kv=reference.store_kv,
        paged_attention=reference.paged_attention,
    )


def _float_head(pack_linear: PackLinear) -> PackHead:
    def pack(weight: Tensor) -> Multiply:
        multiply = pack_linear(weight, None)
        return lambda x: multiply(x).float()

    return pack
