"""NativeLinear: a linear layer whose weight is packed for the native kernels.

The weight is copied once, by the context's threads, into panels of 32 outputs (src/linear.h);
the given tensors are not kept.
"""

import ctypes as c

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.memory import separate_bytes, temporary_bytes
from engine.backends.native.pack import Packer, Weight, pack_bf16, pack_int8, pack_int8_wide
from engine.backends.native.pack4 import pack_int4, pack_nf4
from engine.model.quantized_weight import QuantizedWeight


class NativeLinear:
    """Computes y = x W^T + bias.

    `weight` is bf16 [out, in] or quantized; `bias` is [out] of any float.

    `int8_activations` rounds activations to int8 per row and group, faster and less exact, in
    formats that support both (nf4, int4). bf16 weights always use exact activations, int8 weights
    ones rounded per row.
    `packer` is for another kernel than that of the weight's format.
    Raises ValueError for a weight that no kernel supports.
    """

    def __init__(
        self,
        context: Context,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        int8_activations: bool = False,
        packer: Packer | None = None,
    ) -> None:
        self.out_features, self.in_features = _shape(weight)
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias {tuple(bias.shape)}: expected [{self.out_features}]")
        self._weight = (packer or _packer(weight))(context, weight, int8_activations)
        self._bias = None if bias is None else bias.detach().float().clone()
        self.struct = self._struct()
        self._run = context.function("linear", structs.ReefLinearArgs)
        self._scratch_bytes = context.library["reef_linear_scratch_bytes"]
        self._scratch_bytes.argtypes = [c.POINTER(structs.ReefLinear), structs.i32]
        self._scratch_bytes.restype = structs.i64

    @property
    def nbytes(self) -> int:
        """Bytes that a call reads besides x."""
        return sum(t.nbytes for t in self._tensors() if t is not None)

    def scratch_bytes(self, rows: int) -> int:
        """Bytes that `LinearArgs.scratch` must hold for this many rows."""
        return self._scratch_bytes(self.struct, rows)

    def __call__(self, x: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Multiply x bf16 [N, in], last dimension contiguous; return [N, out] in `out_dtype`,
        bfloat16 or float32."""
        self._check(x, out_dtype)
        return self.into(x, torch.empty(x.shape[0], self.out_features, dtype=out_dtype))

    def into(self, x: Tensor, y: Tensor) -> Tensor:
        """Write the result to y [N, out], whose last dimension is contiguous; return y."""
        self._check(x, y.dtype)
        num_rows = x.shape[0]  # len(x) takes a microsecond
        if num_rows:
            scratch = temporary_bytes(self.scratch_bytes(num_rows))  # lives as long as the call
            self._run(self.args(x, y, scratch))
        return y

    def args(self, x: Tensor, y: Tensor, scratch: Tensor) -> structs.ReefLinearArgs:
        """Make the library's arguments for y [N, out] = layer(x [N, in]), unchecked.

        They point into the three tensors and keep none of them.
        """
        return structs.ReefLinearArgs(
            linear=c.pointer(self.struct),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            y=y.data_ptr(),
            y_stride=y.stride(0),
            rows=x.shape[0],
            y_is_float=y.dtype == torch.float32,
            scratch=scratch.data_ptr(),
        )

    def _check(self, x: Tensor, out_dtype: torch.dtype) -> None:
        if x.dtype != torch.bfloat16 or x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(
                f"x {x.dtype} {tuple(x.shape)}: expected bfloat16 [N, {self.in_features}]"
            )
        if x.stride(1) != 1 and self.in_features > 1:
            raise ValueError(f"x has strides {x.stride()}: its last dimension must be contiguous")
        if out_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"out_dtype {out_dtype}: allowed are bfloat16 and float32")

    def _struct(self) -> structs.ReefLinear:
        packed, scales, zeros, multipliers, input_order, bias = map(_address, self._tensors())
        return structs.ReefLinear(
            format=self._weight.format,
            in_features=self.in_features,
            out_features=self.out_features,
            group_size=self._weight.group_size,
            packed=packed,
            scales=scales,
            zeros=zeros,
            multipliers=multipliers,
            bias=bias,
            input_order=input_order,
        )

    def _tensors(self) -> tuple[Tensor | None, ...]:
        w = self._weight
        return w.packed, w.scales, w.zeros, w.multipliers, w.input_order, self._bias


class NativeHead:
    """Computes logits float32 [N, out] of x bf16 [N, in]; the next call overwrites them.

    The buffer is reused, as the system would zero megabytes allocated anew in every step. The
    inputs of an int8 weight, which have outliers, are rounded to 16 bits, not to 8.
    """

    def __init__(self, context: Context, weight: Weight) -> None:
        packer = None if isinstance(weight, Tensor) else pack_int8_wide
        self._linear = NativeLinear(context, weight, packer=packer)
        self._cells = torch.empty(0)

    def __call__(self, x: Tensor, width: int | None = None) -> Tensor:
        """Multiply. With `width`, return [N, width], whose columns from `out` on are undefined."""
        out = self._linear.out_features
        logits = self.room(x.shape[0], out if width is None else width)
        self._linear.into(x, logits if width is None else logits[:, :out])
        return logits

    def room(self, num_rows: int, width: int) -> Tensor:
        """Return [num_rows, width] of the buffer, undefined."""
        if num_rows * width > self._cells.shape[0]:
            self._cells = separate_bytes(4 * num_rows * width).view(torch.float32)
        return self._cells[: num_rows * width].view(num_rows, width)


PACKERS: dict[str, Packer] = {  # by QuantizedWeight.format; "bf16" for a plain tensor
    "bf16": pack_bf16,
    "int8": pack_int8,
    "nf4": pack_nf4,
    "int4": pack_int4,
}


def _packer(weight: Weight) -> Packer:
    if isinstance(weight, Tensor) and weight.dtype != torch.bfloat16:
        raise ValueError(f"weight {weight.dtype}: expected bfloat16, or a QuantizedWeight")
    name = "bf16" if isinstance(weight, Tensor) else weight.format
    if name not in PACKERS:
        raise ValueError(f"weight format {name!r}: allowed are {', '.join(PACKERS)}")
    return PACKERS[name]


def _shape(weight: Weight) -> tuple[int, int]:
    if isinstance(weight, QuantizedWeight):
        return weight.out_features, weight.in_features
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight {tuple(weight.shape)}: expected [out, in], neither of them 0")
    return weight.shape[0], weight.shape[1]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
