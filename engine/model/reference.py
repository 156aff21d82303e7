"""Implements every op in plain torch, clearly rather than fast, as the reference in all tests.

Computes in float32 and rounds once at the end. `engine.model.ops` specifies shapes and meaning.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.inputs import AttentionInputs
from engine.model.ops import TorchOps, WeightOps, float_head
from engine.model.quantized_weight import QuantizedWeight, dequantize


def pack_linear(
    weight: Tensor | QuantizedWeight, bias: Tensor | None
) -> Callable[[Tensor], Tensor]:
    def multiply(x: Tensor) -> Tensor:
        wide = dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.float()
        y = x.float() @ wide.T
        return (y if bias is None else y + bias.float()).to(x.dtype)

    return multiply


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight.float()).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    turned = x[..., : cos.shape[-1]]
    wide, half = turned.float(), cos.shape[-1] // 2
    swapped = torch.cat([wide[..., half:], wide[..., :half]], -1)
    turned.copy_(wide * cos[:, None].float() + swapped * sin[:, None].float())


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        return (activation(gate) * up).to(gate_up.dtype)

    return apply


GATED_ACTIVATIONS = {
    "silu": _gated(F.silu),
    "gelu": _gated(F.gelu),
    "gelu_tanh": _gated(lambda x: F.gelu(x, approximate="tanh")),
}


def store_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
    block_size = kv_layer.shape[2]
    for i, slot in enumerate(slot_mapping.tolist()):
        block, offset = divmod(slot, block_size)
        kv_layer[block, 0, offset] = k[i]
        kv_layer[block, 1, offset] = v[i]


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    attention: AttentionInputs,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    out = torch.empty_like(q)
    for i, context_len in enumerate(attention.context_lens):
        start, end = attention.cu_seqlens_q[i], attention.cu_seqlens_q[i + 1]
        k, v = _gather(kv_layer, attention.block_tables[i], context_len)
        for row in range(start, end):
            last = context_len - (end - row)  # this query's position
            first = 0 if window is None else max(0, last - window + 1)
            keys, values = k[first : last + 1], v[first : last + 1]
            out[row] = _attend(q[row].float(), keys, values, scale, soft_cap)
    return out


def _gather(kv_layer: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values [length, H_kv, D] of one request, in float32."""
    block_size = kv_layer.shape[2]
    blocks = kv_layer[block_table[: -(-length // block_size)]].float()
    return blocks[:, 0].flatten(0, 1)[:length], blocks[:, 1].flatten(0, 1)[:length]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """Attend q [H, D] to k and v [L, H_kv, D] -> [H, D]; H / H_kv adjacent heads share keys."""
    group = q.shape[0] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("hd,lhd->hl", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return torch.einsum("hl,lhd->hd", scores.softmax(-1), v)


WEIGHT_OPS = WeightOps(pack_linear, float_head(pack_linear))
TORCH_OPS = TorchOps(rms_norm, apply_rotary, GATED_ACTIVATIONS, store_kv, paged_attention)
