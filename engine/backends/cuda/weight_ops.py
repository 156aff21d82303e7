"""Makes WeightOps of a GPU: linear layers that can write to a given tensor."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.backends.cuda.fp8 import Fp8Linear, ScaledMm, check_fp8, scaled_mm
from engine.model.layers import Build
from engine.model.ops import WeightOps
from engine.model.quantized_weight import QuantizedWeight
from engine.model.reference import TORCH_OPS


@runtime_checkable
class DeviceLinear(Protocol):
    """A packed linear layer: computes x [N, in] -> x W^T + bias [N, out], in x's dtype."""

    @property
    def out_features(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """Write the result to out [N, out], whose last dimension is contiguous; return out."""
        ...


class DenseLinear:
    """Multiplies by the unpacked weight [out, in], with the vendor's library."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features = len(weight)
        self._weight = weight.T
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.into(x, x.new_empty(len(x), self.out_features))

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        if self._bias is None:
            return torch.mm(x, self._weight, out=out)
        return torch.addmm(self._bias, x, self._weight, out=out)


class DenseHead:
    """Computes x [M, in] -> logits [M, out] in float32, summed in float32 if the device can."""

    def __init__(self, weight: Tensor | QuantizedWeight) -> None:
        if not isinstance(weight, Tensor):  # engine.settle refuses the configuration
            raise TypeError(f"an output layer in {weight.format} is not computed on a GPU")
        self._weight = weight.T

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, self._weight, out_dtype=torch.float32)
        return torch.mm(x, self._weight).float()


def cuda_build(
    device: torch.device, dtype: torch.dtype, *, fp8_multiply: ScaledMm | None = None
) -> Build:
    """Make the Build of a Decoder for FusedDecoder; its own `forward` uses the slow reference.

    `pack_linear` makes DeviceLinears; dense weights are used in place, others copied.
    Low-bit layers share their scratch: all must be made before the first one is called.

    `fp8_multiply` replaces the device's own FP8 multiplication, and the check that it has one.
    Without it, an FP8 weight raises ValueError as `check_fp8` does.
    """

    weight_only = _WeightOnly(device, dtype)

    def pack_linear(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> DeviceLinear:
        if isinstance(weight, Tensor):
            return DenseLinear(weight, bias)
        if weight.format == "fp8":
            if fp8_multiply is None:
                check_fp8(device, dtype)
            return Fp8Linear(weight, bias, device, dtype, fp8_multiply or scaled_mm)
        return weight_only(weight, bias)

    return Build(WeightOps(pack_linear, DenseHead), TORCH_OPS, dtype, device)


class _WeightOnly:
    """Makes layers of low-bit weights; the first one imports Triton."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._scratch: Any = None

    def __call__(self, weight: QuantizedWeight, bias: Tensor | None) -> DeviceLinear:
        from engine.backends.cuda.triton.scratch import Scratch
        from engine.backends.cuda.triton.weight_only import WeightOnlyLinear

        if self._scratch is None:
            self._scratch = Scratch(self._device)
        return WeightOnlyLinear(weight, bias, self._device, self._dtype, self._scratch)
