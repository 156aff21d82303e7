"""WeightOnlyLinear: a linear layer whose weight stays low-bit on the device."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.backends.cuda.triton import bitsandbytes_gemm
from engine.backends.cuda.triton.crossovers import Choice, Shape, choices_for, choose
from engine.backends.cuda.triton.dequantize import multiply_dense
from engine.backends.cuda.triton.fourbit import multiply, planes_size
from engine.backends.cuda.triton.packed_weight import PackedWeight, pack
from engine.backends.cuda.triton.scratch import Scratch
from engine.model.quantized_weight import QuantizedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # float32 is for tests: no tensor cores


class WeightOnlyLinear:
    """Computes x W^T + bias with W = `dequantize(weight)` rounded to `dtype`, sums in float32.

    The codes are repacked once; the given tensors are not kept. The implementation depends on the
    number of rows alone; `choices` defaults to those of `crossovers`. While the choice stays the
    same, a row's bits do not depend on the other rows; between two choices they may differ, as
    sums are taken in another order. The library's product of `dequantize` may itself choose by
    the number of rows.

    `scratch` is shared by all layers that run on one stream; every layer must exist before the
    first is called. If None, the layer has its own. With an `input_order` every call allocates a
    copy of x, even if `out` is given.
    Raises ValueError for a weight, bias or dtype that no kernel supports.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Scratch | None = None,
        choices: tuple[Choice, ...] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype}: allowed are {', '.join(map(str, DTYPES))}")
        if bias is not None and bias.shape != (weight.out_features,):
            raise ValueError(f"bias {tuple(bias.shape)}: expected [{weight.out_features}]")
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.dtype = dtype
        self._weight = pack(weight, device)
        self._bias = None if bias is None else bias.detach().to(device, dtype, copy=True)
        self._wide_bias = None if self._bias is None else _padded(self._bias, self._weight)
        self._scratch = scratch or Scratch(device)
        choices = choices or _choices(self._weight, device, dtype)
        self._choices = _available(choices, weight, device)
        self._bitsandbytes = self._pack_bitsandbytes(weight, device)
        self._scratch.reserve(max(self._scratch_bytes(choice) for choice in self._choices))

    @property
    def nbytes(self) -> int:
        """Bytes of everything that stays on the device, except the scratch."""
        copied = self.out_features * self.in_features // 2 if self._bitsandbytes else 0
        biases = (t.nbytes for t in (self._bias, self._wide_bias) if t is not None)
        return self._weight.nbytes + copied + sum(biases)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer to x [N, in] in its dtype, last dimension contiguous -> [N, out]."""
        return self.into(x, torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device))

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """Write the result into out [N, out], whose last dimension is contiguous; returns out."""
        self._check(x, out)
        if len(x):
            order = self._weight.input_order
            self._run(x if order is None else x.index_select(1, order), out)
        return out

    def _run(self, x: Tensor, out: Tensor) -> None:
        choice = choose(self._choices, len(x))
        if choice.tiles is not None:
            size = planes_size(self._weight, len(x), choice.tiles)
            planes = self._scratch.take(torch.float32, size)
            multiply(x, self._weight, self._wide_bias, out, planes, choice.tiles)
        elif self._bitsandbytes is not None and choice.implementation == "bitsandbytes":
            out.copy_(self._bitsandbytes(x))
        else:
            dense = self._scratch.take(self.dtype, self.out_features, self.in_features)
            multiply_dense(x, self._weight, self._bias, out, dense)

    def _scratch_bytes(self, choice: Choice) -> int:
        if choice.tiles is not None:
            assert choice.up_to_rows is not None
            return 4 * planes_size(self._weight, choice.up_to_rows, choice.tiles)
        dense = self.dtype.itemsize * self.out_features * self.in_features
        return dense if choice.implementation == "dequantize" else 0

    def _pack_bitsandbytes(
        self, weight: QuantizedWeight, device: torch.device
    ) -> Callable[[Tensor], Tensor] | None:
        if all(choice.implementation != "bitsandbytes" for choice in self._choices):
            return None
        return bitsandbytes_gemm.pack(weight, self._bias, device)

    def _check(self, x: Tensor, out: Tensor) -> None:
        if x.dtype != self.dtype or x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(
                f"x {x.dtype} {tuple(x.shape)}: expected {self.dtype} [N, {self.in_features}]"
            )
        if out.dtype != self.dtype or out.shape != (len(x), self.out_features):
            raise ValueError(
                f"out {out.dtype} {tuple(out.shape)}: expected {self.dtype} "
                f"{(len(x), self.out_features)}"
            )
        for name, tensor in (("x", x), ("out", out)):
            if tensor.stride(1) != 1 and tensor.shape[1] > 1:
                raise ValueError(
                    f"{name} has strides {tensor.stride()}: its last dimension must be contiguous"
                )


def _choices(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> tuple[Choice, ...]:
    shape = Shape(weight.format, weight.out_features, weight.in_features)
    if device.type != "cuda":
        return choices_for(shape, weight.blocks, device.type, processors=1)
    if dtype == torch.float32:  # no tensor cores: fused tiles would need too many registers
        return (Choice(None, "dequantize"),)
    properties = torch.cuda.get_device_properties(device)
    processors = properties.multi_processor_count
    return choices_for(shape, weight.blocks, properties.name, processors)


def _available(
    choices: tuple[Choice, ...], weight: QuantizedWeight, device: torch.device
) -> tuple[Choice, ...]:
    """Drop bitsandbytes choices if it cannot be used; the next choice takes their rows."""
    has = partial(bitsandbytes_gemm.takes, weight, device)
    return tuple(c for c in choices if c.implementation != "bitsandbytes" or has())


def _padded(bias: Tensor, weight: PackedWeight) -> Tensor:
    return torch.nn.functional.pad(bias.float(), (0, weight.out_padded - len(bias)))
