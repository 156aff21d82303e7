"""The ops that a decoder is built from: what each computes, whatever implements it.

`engine.model.reference` is the specification of all of them. WeightOps make a linear layer out of a
weight, which every backend does in its own way; TorchOps are what a Decoder calls when it computes
by itself. Shapes: N tokens, H heads, D head dim, E hidden, I intermediate. Every op treats its rows
alone: what one request has in its KV blocks, be it NaN, never reaches another's rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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


class ApplyRmsNorm(Protocol):
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
class WeightOps:
    """Turn weights into linear layers, for one device and dtype."""

    pack_linear: PackLinear
    pack_head: PackHead


@dataclass(frozen=True, slots=True)
class TorchOps:
    """Everything else that a Decoder's own `forward` calls."""

    rms_norm: ApplyRmsNorm
    apply_rotary: ApplyRotary
    gated_activation: Mapping[str, Callable[[Tensor], Tensor]]  # [N, 2 I] -> [N, I]: act(a) * b
    store_kv: StoreKv
    paged_attention: PagedAttention


def float_head(pack_linear: PackLinear) -> PackHead:
    """A head that is multiplied like any linear layer, and then widened."""

    def pack(weight: Tensor) -> Multiply:
        multiply = pack_linear(weight, None)
        return lambda x: multiply(x).float()

    return pack
