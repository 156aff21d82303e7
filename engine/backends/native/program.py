"""Program: records the operations of a forward pass once and runs them with one call per step.

Comparable to a CUDA graph: no Python runs between two operations, and what changes from step to
step (rows, requests, adapters) is read from the step. Defines buffers and operations;
`engine.backends.native.decoder` decides which of them make up a model.
"""

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.linear import NativeLinear

_LINE = 32  # bfloat16s in a cache line


@dataclass(frozen=True, slots=True)
class Buffer:
    """Activations [capacity, width] in bfloat16; a slice of columns is a Buffer too."""

    rows: Tensor

    @property
    def pointer(self) -> int:
        return self.rows.data_ptr()

    @property
    def stride(self) -> int:
        return self.rows.stride(0)

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def columns(self, start: int, end: int) -> "Buffer":
        return Buffer(self.rows[:, start:end])


@dataclass(frozen=True, slots=True)
class Norm:
    """Computes x / rms(x) * weight; weight [width] in float32, unless the row's adapter has another
    one for the norm of this number."""

    weight: Tensor
    eps: float
    number: int


@dataclass(frozen=True, slots=True)
class Delta:
    """The output of a branch, to be added to the residual stream times a constant."""

    buffer: Buffer
    scale: float = 1.0


class Program:
    """Records operations, then runs them. `capacity` bounds the rows of a step.

    Operations after `gather` compute the step's output rows alone.
    """

    def __init__(self, context: Context, capacity: int) -> None:
        self.capacity = capacity
        self._context = context
        self._ops: list[structs.ReefOp] = []
        self._on_outputs = False
        self._keep: list[object] = []  # all objects that recorded pointers point to
        self._scratch_bytes = 0
        self._recorded: c.Array[structs.ReefOp] | None = None
        self._lora_h = torch.empty(0, dtype=torch.bfloat16)
        self._run = context.library.reef_run
        self._run.argtypes = [c.c_void_p, c.c_void_p, c.c_int32, c.POINTER(structs.ReefStep)]
        self._run.restype = None

    def buffer(self, width: int) -> Buffer:
        """Allocate a buffer whose rows begin on cache lines, and never a multiple of 1 KiB apart:
        the rows of a tile would then compete for a few sets of the cache."""
        stride = -(-width // _LINE) * _LINE
        stride += _LINE if stride % 512 == 0 else 0
        return Buffer(self._zeros(self.capacity * stride).view(self.capacity, stride)[:, :width])

    @property
    def num_ops(self) -> int:
        return len(self._ops)

    # ==== recording ====

    def embed(self, table: Tensor, out: Buffer, scale: float) -> None:
        self._keep.append(table)
        args = structs.ReefEmbedArgs(
            table=table.data_ptr(),
            x=out.pointer,
            x_stride=out.stride,
            scale=scale,
            width=out.width,
        )
        self._add("embed", args, out)

    def norm(
        self, x: Buffer, norm: Norm, out: Buffer, delta: Delta | None = None, groups: int = 1
    ) -> None:
        """Record x += delta; out = norm(x), for each of `groups` equal parts of a row."""
        weight = norm.weight.float().contiguous()
        self._keep.append(weight)
        args = structs.ReefNormArgs(
            x=x.pointer,
            x_stride=x.stride,
            delta=delta.buffer.pointer if delta else None,
            delta_stride=delta.buffer.stride if delta else 0,
            delta_scale=delta.scale if delta else 0.0,
            y=out.pointer,
            y_stride=out.stride,
            weight=weight.data_ptr(),
            eps=norm.eps,
            width=x.width // groups,
            groups=groups,
            norm=norm.number,
        )
        self._add("norm", args, x, out)

    def linear(self, x: Buffer, parts: Sequence[NativeLinear], out: Buffer, lora_site: int) -> None:
        """Record out = the parts' results side by side, plus each row's adapter at this site."""
        end = 0
        for part in parts:
            start, end = end, end + part.out_features
            op = self._linear_part(x, part, out.columns(start, end))
        assert end == out.width
        op.lora_site = lora_site  # with the last part, when all of `out` is computed
        op.lora = structs.ReefLoraArgs(
            in_features=x.width,
            x=x.pointer,
            x_stride=x.stride,
            y=out.pointer,
            y_stride=out.stride,
        )

    def _linear_part(self, x: Buffer, linear: NativeLinear, out: Buffer) -> structs.ReefOp:
        self._keep.append(linear)
        self._scratch_bytes = max(self._scratch_bytes, linear.scratch_bytes(self.capacity))
        args = structs.ReefLinearArgs(
            linear=c.pointer(linear.struct),
            x=x.pointer,
            x_stride=x.stride,
            y=out.pointer,
            y_stride=out.stride,
        )
        return self._add("linear", args, x, out)

    def store(
        self, kv: structs.ReefKvLayer, qkv: Buffer, heads: int, cos: Tensor, sin: Tensor
    ) -> None:
        """Record rotating q and k by the row's position and writing k and v; cos and sin
        [positions, R]."""
        self._keep += [cos, sin]
        args = structs.ReefStoreArgs(
            kv=kv,
            qkv=qkv.pointer,
            qkv_stride=qkv.stride,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            heads=heads,
            rotary_dim=cos.shape[1],
        )
        self._add("store", args, qkv)

    def attention(
        self,
        kv: structs.ReefKvLayer,
        q: Buffer,
        out: Buffer,
        *,
        heads: int,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        args = structs.ReefAttentionArgs(
            kv=kv,
            q=q.pointer,
            q_stride=q.stride,
            out=out.pointer,
            out_stride=out.stride,
            heads=heads,
            window=window or 0,
            scale=scale,
            soft_cap=soft_cap or 0.0,
        )
        self._add("attention", args, q, out)

    def gate(self, x: Buffer, out: Buffer, activation: str) -> None:
        args = structs.ReefGateArgs(
            x=x.pointer,
            x_stride=x.stride,
            y=out.pointer,
            y_stride=out.stride,
            width=out.width,
            activation=structs.ACTIVATIONS[activation],
        )
        self._add("gate", args, x, out)

    def gather(self, x: Buffer, out: Buffer) -> None:
        """Record out = the output rows of x; later operations run on those alone."""
        self._on_outputs = True
        args = structs.ReefGatherArgs(
            x=x.pointer,
            x_stride=x.stride,
            y=out.pointer,
            y_stride=out.stride,
            width=x.width,
        )
        self._add("gather", args, x, out)

    def _add(self, kind: str, args: c.Structure, *buffers: Buffer) -> structs.ReefOp:
        assert self._recorded is None, "recorded after the first run"
        op = structs.ReefOp(kind=structs.OP_KINDS.index(kind), lora_site=-1)
        op.on_outputs = self._on_outputs
        setattr(op, kind, args)
        self._keep += [args, *buffers]
        self._ops.append(op)
        return op

    # ==== running ====

    def run(self, step: structs.ReefStep, begin: int = 0, end: int | None = None) -> None:
        """Run operations [begin, end) on one step, which must fit the capacity; by default all."""
        assert 0 < step.rows <= self.capacity and step.num_outputs <= self.capacity
        if self._recorded is None:
            self._recorded = self._finish()
        if step.lora or step.output_lora:
            self._make_room_for_lora(step)
        first = c.addressof(self._recorded) + begin * c.sizeof(structs.ReefOp)
        count = (len(self._ops) if end is None else end) - begin
        self._run(self._context.handle, first, count, c.byref(step))

    def profile(self, step: structs.ReefStep) -> dict[str, float]:
        """Run the step and return the seconds that each kind of operation took."""
        spent = (c.c_int64 * len(self._ops))()
        step.nanoseconds = c.cast(spent, c.c_void_p)
        self.run(step)
        step.nanoseconds = None
        seconds: dict[str, float] = {}
        for op, nanoseconds in zip(self._ops, spent, strict=True):
            kind = structs.OP_KINDS[op.kind]
            seconds[kind] = seconds.get(kind, 0.0) + nanoseconds / 1e9
        return seconds

    def _finish(self) -> "c.Array[structs.ReefOp]":
        scratch = self._zeros(-(-self._scratch_bytes // 2))
        self._keep.append(scratch)
        for op in self._ops:
            if structs.OP_KINDS[op.kind] == "linear":
                op.linear.scratch = scratch.data_ptr()
        return (structs.ReefOp * len(self._ops))(*self._ops)

    def _make_room_for_lora(self, step: structs.ReefStep) -> None:
        batches = [b.contents for b in (step.lora, step.output_lora) if b]
        width = max(batch.max_lora_rank for batch in batches)
        width += width % 2
        if self._lora_h.numel() < self.capacity * width:
            self._lora_h = self._zeros(self.capacity * width)
        step.lora_h, step.lora_h_stride = self._lora_h.data_ptr(), width

    def _zeros(self, numel: int) -> Tensor:
        """Allocate bfloat16 zeros [numel] in huge pages: scattered small pages share cache sets."""
        return self._context.blocks.cut(2 * numel).view(torch.bfloat16).zero_()
