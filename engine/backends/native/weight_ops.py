"""Makes WeightOps of the native kernels: bfloat16 on a CPU."""

import torch
from torch import Tensor

from engine.backends.native.library import Context
from engine.backends.native.linear import NativeHead, NativeLinear
from engine.model.layers import Build
from engine.model.ops import WeightOps
from engine.model.quantized_weight import QuantizedWeight
from engine.model.reference import TORCH_OPS


def native_build(context: Context, *, int8_activations: bool) -> Build:
    """Make the Build of a Decoder for NativeDecoder; its own `forward` uses the slow reference."""

    def pack_linear(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> NativeLinear:
        return NativeLinear(context, weight, bias, int8_activations=int8_activations)

    def pack_head(weight: Tensor | QuantizedWeight) -> NativeHead:
        return NativeHead(context, weight)

    weight_ops = WeightOps(pack_linear, pack_head)
    return Build(weight_ops, TORCH_OPS, torch.bfloat16, torch.device("cpu"))
