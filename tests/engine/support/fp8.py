"""A ScaledMm for any device: multiplies FP8 operands by way of float32."""

from torch import Tensor

from engine.model.fp8 import E4m3Rows


def dequantized_mm(
    x: E4m3Rows, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    y = (x.codes.float() * x.scales) @ (weight.float() * scales)
    out.copy_(y if bias is None else y + bias.float())
