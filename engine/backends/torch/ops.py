"""Chooses the fastest ops that torch has, on a CPU or any other of its devices.

If the CPU supports it, linear layers use oneDNN with weights packed once: torch's own linear packs
them again in every call. Quantized weights are expanded when they are packed: results are those of
their format, but they take as much memory as dense weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.torch.attention import GatheredAttention, store_kv
from engine.model import reference
from engine.model.layers import Build
from engine.model.ops import Multiply, PackLinear, TorchOps, WeightOps, float_head
from engine.model.quantized_weight import QuantizedWeight, dequantize_to


def torch_build(device: torch.device, dtype: torch.dtype) -> Build:
    """Make a Build whose Decoder computes by itself, as fast as torch can on this device."""
    pack_linear = select_pack_linear(device, dtype)
    return Build(
        WeightOps(pack_linear, float_head(pack_linear)),
        TorchOps(rms_norm, apply_rotary, GATED_ACTIVATIONS, store_kv, GatheredAttention()),
        dtype,
        device,
    )


# ==== Linear ====


def select_pack_linear(device: torch.device, dtype: torch.dtype) -> PackLinear:
    pack_dense = _pack_onednn if device.type == "cpu" and _onednn_has(dtype) else _pack_plain

    def pack(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Multiply:
        if isinstance(weight, QuantizedWeight):
            weight = dequantize_to(weight, dtype, device)
        return pack_dense(weight, bias)

    return pack


def _onednn_has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def _pack_plain(weight: Tensor, bias: Tensor | None) -> Multiply:
    return lambda x: F.linear(x, weight, bias)


def _pack_onednn(weight: Tensor, bias: Tensor | None) -> Multiply:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, packed, bias, "none", [], "")


# ==== Norm, rotary, activation ====


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dtype != x.dtype:  # torch's own has no fused path for mixed dtypes
        return reference.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    dim = cos.shape[-1]
    turned = x[..., :dim]
    swapped = turned.roll(dim // 2, -1)
    turned.mul_(cos[:, None]).addcmul_(swapped, sin[:, None])


def _silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _gelu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate).mul_(up)


def _gelu_tanh(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)


GATED_ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}
