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
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_layer[blocks, 0, offsets] = k
    kv_layer[blocks, 1, offsets] = v


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
        places = torch.arange(context_len, device=q.device)
        behind = places[start - end :, None] - places  # how far a key lies behind a query
        is_seen = (behind >= 0) & (behind < (window or context_len))
        out[start:end] = _attend(q[start:end].float(), k, v, is_seen, scale, soft_cap)
    return out


def _gather(kv_layer: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values [length, H_kv, D] of one request, in float32."""
    block_size = kv_layer.shape[2]
    blocks = kv_layer[block_table[: -(-length // block_size)]].float()
    return blocks[:, 0].flatten(0, 1)[:length], blocks[:, 1].flatten(0, 1)[:length]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, is_seen: Tensor, scale: float, soft_cap: float | None
) -> Tensor:
    """Attend q [N, H, D] to those of k and v [L, H_kv, D] that it sees [N, L] -> [N, H, D].

    H / H_kv adjacent heads share keys.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,lhd->hnl", q, k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, v)


WEIGHT_OPS = WeightOps(pack_linear, float_head(pack_linear))
TORCH_OPS = TorchOps(rms_norm, apply_rotary, GATED_ACTIVATIONS, store_kv, paged_attention)
