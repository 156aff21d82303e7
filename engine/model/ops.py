"""Defines the ops that a decoder is built from, independently of their implementations.

`engine.model.reference` is the specification of all of them. WeightOps make a linear layer out of a
weight, which every backend does in its own way; a Decoder that computes by itself calls TorchOps.
Shapes: N tokens, H heads, D head dim, E hidden, I intermediate. Every op computes its rows
independently: values in one request's KV blocks, even NaN, never affect another's rows.
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
        """Make x @ weight [out, in]^T + bias; may keep the weight or a copy of it."""
        ...


class PackHead(Protocol):
    def __call__(self, weight: Tensor | QuantizedWeight) -> Multiply:
        """Make x @ weight [out, in]^T in float32; the weight is dense or int8. The result is a
        tensor that the caller may change and that the next call may overwrite."""
        ...


class ApplyRmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Compute x / rms(x) * weight over the last dimension in float32, rounded once."""
        ...


class ApplyRotary(Protocol):
    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate x [N, H, D] in place by cos and sin [N, R]; dimensions from R on are kept."""
        ...


class StoreKv(Protocol):
    def __call__(self, k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
        """Write k and v [N, H_kv, D] to slots [N] of kv_layer [blocks, 2, block_size, H_kv, D]."""
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
        """Compute attention of q [N, H, D] over each request's own keys -> [N, H, D].

        A query at position p sees keys p - window + 1 .. p. Scores are q.k * scale, then
        soft_cap * tanh(scores / soft_cap) if there is a soft_cap.
        """
        ...


@dataclass(frozen=True, slots=True)
class WeightOps:
    """Turns weights into linear layers, for one device and dtype."""

    pack_linear: PackLinear
    pack_head: PackHead


@dataclass(frozen=True, slots=True)
class TorchOps:
    """All other ops that a Decoder's own `forward` calls."""

    rms_norm: ApplyRmsNorm
    apply_rotary: ApplyRotary
    gated_activation: Mapping[str, Callable[[Tensor], Tensor]]  # [N, 2 I] -> [N, I]: act(a) * b
    store_kv: StoreKv
    paged_attention: PagedAttention


def float_head(pack_linear: PackLinear) -> PackHead:
    """Make heads that multiply like any linear layer and then widen to float32."""

    def pack(weight: Tensor | QuantizedWeight) -> Multiply:
        multiply = pack_linear(weight, None)
        return lambda x: multiply(x).float()

    return pack
