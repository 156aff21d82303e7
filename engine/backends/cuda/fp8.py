"""Computes FP8 linear layers: e4m3 weights with a scale per output, activations with one per row.

Multiplies with torch's `_scaled_mm` with row-wise scales, which needs a device of capability 8.9 or
higher. On other devices the format is refused: see `check_fp8`.
"""

from typing import Protocol

import torch
from torch import Tensor

from engine.model.fp8 import MULTIPLE, E4m3Rows, quantize_rows
from engine.model.quantized_weight import QuantizedWeight

CAPABILITY = (8, 9)  # the first with FP8 in its tensor cores


class ScaledMm(Protocol):
    def __call__(
        self, x: E4m3Rows, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
    ) -> None:
        """Compute out [N, out] = x @ weight + bias; weight e4m3 [in, out] with its inputs
        contiguous, scales float32 [1, out]. out is contiguous."""
        ...


def scaled_mm(
    x: E4m3Rows, weight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.codes,
        weight,
        scale_a=x.scales,
        scale_b=scales,
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out,
    )


class Fp8Linear:
    """Computes y = x W^T + bias.

    `weight` is in the format fp8 [out, in], `bias` [out] of any float.
    Copies the weight to `device`, without a second copy in any other form. Raises ValueError for
    sizes that are no multiples of 16.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        multiply: ScaledMm = scaled_mm,
    ) -> None:
        self.out_features, self.in_features = weight.out_features, weight.in_features
        if self.out_features % MULTIPLE or self.in_features % MULTIPLE:
            raise ValueError(
                f"weight [{self.out_features}, {self.in_features}] in fp8: "
                f"both must be multiples of {MULTIPLE}"
            )
        self._weight = weight.codes.to(device).T
        self._scales = weight.scales.to(device).T.contiguous()
        self._bias = None if bias is None else bias.to(device, dtype)
        self._multiply = multiply

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [N, in]; return [N, out] in x's dtype."""
        return self.into(x, torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device))

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """Write the result to out [N, out], contiguous; return it."""
        return self.rows_into(quantize_rows(x), out)

    def rows_into(self, rows: E4m3Rows, out: Tensor) -> Tensor:
        """Multiply an x that is rounded already."""
        if len(out):
            self._multiply(rows, self._weight, self._scales, self._bias, out)
        return out


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if FP8 layers cannot run; the message says what they need."""
    if device.type != "cuda":
        raise ValueError(
            f"fp8 needs a CUDA device of capability {_text(CAPABILITY)} or higher, not "
            f"{device.type}; use 'int8' or 'nf4'"
        )
    if dtype != torch.bfloat16:
        raise ValueError(f"fp8 computes in bfloat16, not {dtype}; use dtype 'bfloat16'")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ValueError(
            f"fp8 needs a CUDA device of capability {_text(CAPABILITY)} or higher; "
            f"{torch.cuda.get_device_name(device)} has {_text(found)}; use 'nf4' or 'int8'"
        )


def _text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
