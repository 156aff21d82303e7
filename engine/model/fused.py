"""A Decoder as a chain of fused kernels on buffers that stay: the same model for a GPU.

Reads the modules of a loaded Decoder once and runs what their `forward` methods would do. It adds
no choice of its own, so a family that the Decoder can express needs nothing here. A forward
allocates nothing, reads nothing back and launches the same kernels for every batch of one size, so
a CUDA graph can capture it. Imports Triton: whoever has a GPU imports this module.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.kernels.fp8 import E4m3Rows, Fp8Linear
from engine.kernels.inputs import LoraBatch
from engine.kernels.triton.fp8_rows import quantize_rows
from engine.kernels.triton.gate import gate
from engine.kernels.triton.norm import add_rms_norm
from engine.kernels.triton.rotary import rotate_and_store
from engine.model.decoder import Attention, Decoder, DecoderLayer, HeadNorms
from engine.model.layers import Linear, RmsNorm, Scale, SideBySide
from engine.model.rotary import RotaryTable


class PagedAttentionInto(Protocol):
    def __call__(
        self,
        q: Tensor,
        kv_layer: Tensor,
        attention: Any,
        *,
        out: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """As PagedAttention of engine.kernels.dispatch, into out [N, H, D], returned. q's rows lie
        apart: it is a part of the qkv layer's output. `attention` is what `forward` was given."""
        ...


class FusedDecoder:
    """Weights and KV cache [blocks, layers, 2, block_size, H_kv, D] are those it was made from.

    The decoder was loaded with `device_ops`. `capacity` bounds the rows of a forward.
    """

    def __init__(
        self,
        decoder: Decoder,
        paged_attention: PagedAttentionInto,
        kv_cache: Tensor,
        capacity: int,
    ) -> None:
        self._embedding = decoder.embedding
        self._is_scaled = float(decoder.embedding.scale) != 1.0
        self._head = decoder.head
        tables = _tables(decoder)
        self._layers: list[_Layer] = []
        pending: nn.Module | None = None
        for layer, kv_layer in zip(decoder.layers, kv_cache.unbind(1), strict=True):
            assert isinstance(layer, DecoderLayer)
            table = tables[layer.attention.rotary_index]
            self._layers.append(_Layer.of(layer, pending, table, kv_layer, paged_attention))
            pending = layer.leave_mlp
        self._norm = _AddNorm.of(decoder.norm, pending)
        self._buffers = _Buffers.make(decoder, capacity)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        attention: Any,
        lora: LoraBatch | None = None,
        output_rows: Tensor | None = None,
        output_lora: LoraBatch | None = None,
        *,
        out: Tensor,
    ) -> Tensor:
        """Hidden states after the last norm to out [N, E], returned; writes the KV cache.

        token_ids, positions and slot_mapping [N] are int32 or int64; a row whose slot is -1
        stores nothing. With output_rows [M] out is [M, E], of those rows alone, and so is all that
        the last layer computes after its attention: if there is `lora`, then only if `output_lora`
        has the same adapters for these rows.
        """
        b = self._buffers.first(len(token_ids))
        self._embed(token_ids, b.x)
        for layer in self._layers[:-1]:
            layer.attend(b, positions, slot_mapping, attention, lora)
            layer.transform(b, lora)
        last = self._layers[-1]
        last.attend(b, positions, slot_mapping, attention, lora)
        if output_rows is not None and (lora is None or output_lora is not None):
            b, lora, output_rows = self._cut(b, output_rows), output_lora, None
        last.transform(b, lora)
        if output_rows is None:
            self._norm(b.x, b.delta, _Rows(out, None))
            return out
        self._norm(b.x, b.delta, _Rows(b.normed.wide, None))
        return torch.index_select(b.normed.wide, 0, output_rows, out=out)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, E] -> [M, V] in float32."""
        return self._head(hidden)

    def _embed(self, token_ids: Tensor, x: Tensor) -> None:
        torch.index_select(self._embedding.weight, 0, token_ids, out=x)
        if self._is_scaled:
            x.mul_(self._embedding.scale)

    def _cut(self, b: "_Buffers", rows: Tensor) -> "_Buffers":
        """The buffers of these rows alone, with what the last layer still needs."""
        outputs = self._buffers.first(len(rows))
        torch.index_select(b.x, 0, rows, out=outputs.output_x)
        torch.index_select(b.attended.wide, 0, rows, out=outputs.output_attended.wide)
        return replace(outputs, x=outputs.output_x, attended=outputs.output_attended)


def _tables(decoder: Decoder) -> list[RotaryTable]:
    """The decoder's own, but in float32."""
    own = decoder.rotary_tables[0]
    assert isinstance(own, RotaryTable)
    rotaries = dict.fromkeys(decoder.spec.rotaries)
    return [RotaryTable(r, len(own.cos), torch.float32, own.cos.device) for r in rotaries]


# ==== Buffers ====


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a linear layer reads. Adapters always read `wide`, FP8 layers `rounded`."""

    wide: Tensor  # [N, in]
    rounded: E4m3Rows | None

    def first(self, n: int) -> "_Rows":
        return _Rows(self.wide[:n], None if self.rounded is None else self.rounded.first(n))


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Activations of a layer."""

    x: Tensor  # the residual stream
    normed: _Rows
    qkv: Tensor
    attended: _Rows
    delta: Tensor  # what attention or mlp will add to x
    gate_up: Tensor
    gated: _Rows
    output_x: Tensor  # of the output rows alone
    output_attended: _Rows

    @staticmethod
    def make(decoder: Decoder, capacity: int) -> "_Buffers":
        spec, weight = decoder.spec, decoder.embedding.weight
        linears = [leaf for leaf in decoder.modules() if isinstance(leaf, Linear)]
        is_fp8 = any(isinstance(linear.multiply, Fp8Linear) for linear in linears)

        def tensor(width: int) -> Tensor:
            return weight.new_zeros(capacity, width)

        def rows(width: int) -> _Rows:
            rounded = E4m3Rows.empty(capacity, width, weight.device) if is_fp8 else None
            return _Rows(tensor(width), rounded)

        q_size = spec.num_heads * spec.head_dim
        return _Buffers(
            x=tensor(spec.hidden_size),
            normed=rows(spec.hidden_size),
            qkv=tensor(q_size + 2 * spec.num_kv_heads * spec.head_dim),
            attended=rows(q_size),
            delta=tensor(spec.hidden_size),
            gate_up=tensor(2 * spec.intermediate_size),
            gated=rows(spec.intermediate_size),
            output_x=tensor(spec.hidden_size),
            output_attended=rows(q_size),
        )

    def first(self, n: int) -> "_Buffers":
        """Views of n rows."""
        assert n <= len(self.x), f"{n} rows, room for {len(self.x)}"
        return _Buffers(
            x=self.x[:n],
            normed=self.normed.first(n),
            qkv=self.qkv[:n],
            attended=self.attended.first(n),
            delta=self.delta[:n],
            gate_up=self.gate_up[:n],
            gated=self.gated.first(n),
            output_x=self.output_x[:n],
            output_attended=self.output_attended.first(n),
        )


# ==== Layers ====


@dataclass(frozen=True, slots=True)
class _Layer:
    """One DecoderLayer; what its mlp gives is added by whatever norm comes next."""

    enter_attention: "_AddNorm"
    qkv: "_Site"
    attention: "_Attention"
    o: "_Site"
    enter_mlp: "_AddNorm"
    gate_up: "_Site"
    activation: str
    down: "_Site"

    @staticmethod
    def of(
        layer: DecoderLayer,
        pending: nn.Module | None,
        table: RotaryTable,
        kv_layer: Tensor,
        paged_attention: PagedAttentionInto,
    ) -> "_Layer":
        return _Layer(
            enter_attention=_AddNorm.of(layer.enter_attention, pending),
            qkv=_Site.of(layer.attention.qkv),
            attention=_Attention.of(layer.attention, table, kv_layer, paged_attention),
            o=_Site.of(layer.attention.o),
            enter_mlp=_AddNorm.of(layer.enter_mlp, layer.leave_attention),
            gate_up=_Site.of(layer.mlp.gate_up),
            activation=layer.mlp.activation,
            down=_Site.of(layer.mlp.down),
        )

    def attend(
        self,
        b: _Buffers,
        positions: Tensor,
        slot_mapping: Tensor,
        attention: Any,
        lora: LoraBatch | None,
    ) -> None:
        self.enter_attention(b.x, b.delta, b.normed)
        self.qkv(b.normed, b.qkv, lora)
        self.attention(b.qkv, positions, slot_mapping, attention, b.attended.wide)

    def transform(self, b: _Buffers, lora: LoraBatch | None) -> None:
        """All that follows attention, of any rows."""
        if b.attended.rounded is not None:
            quantize_rows(b.attended.wide, b.attended.rounded)
        self.o(b.attended, b.delta, lora)
        self.enter_mlp(b.x, b.delta, b.normed)
        self.gate_up(b.normed, b.gate_up, lora)
        gate(b.gate_up, b.gated.wide, self.activation, rounded=b.gated.rounded)
        self.down(b.gated, b.delta, lora)


@dataclass(frozen=True, slots=True)
class _AddNorm:
    """x += scale * leave(delta), if there is a delta yet; out = norm(x)."""

    weight: Tensor
    eps: float
    adds: bool
    scale: float
    leave: Tensor | None

    @staticmethod
    def of(norm: nn.Module, pending: nn.Module | None) -> "_AddNorm":
        assert isinstance(norm, RmsNorm)
        assert not isinstance(pending, RmsNorm) or pending.eps == norm.eps
        return _AddNorm(
            weight=norm.weight,
            eps=norm.eps,
            adds=pending is not None,
            scale=pending.scale if isinstance(pending, Scale) else 1.0,
            leave=pending.weight if isinstance(pending, RmsNorm) else None,
        )

    def __call__(self, x: Tensor, delta: Tensor, out: _Rows) -> None:
        add_rms_norm(
            x,
            delta if self.adds else None,
            self.weight,
            self.eps,
            out.wide,
            scale=self.scale,
            leave=self.leave,
            rounded=out.rounded,
        )


@dataclass(frozen=True, slots=True)
class _Attention:
    """From the qkv layer's output to attention's: head norms, rotary, store, attention."""

    kv_layer: Tensor
    table: RotaryTable
    norms: HeadNorms | None
    num_heads: int
    scale: float
    window: int | None
    soft_cap: float | None
    paged_attention: PagedAttentionInto

    @staticmethod
    def of(
        attention: Attention,
        table: RotaryTable,
        kv_layer: Tensor,
        paged_attention: PagedAttentionInto,
    ) -> "_Attention":
        norms = attention.norm_heads
        return _Attention(
            kv_layer=kv_layer,
            table=table,
            norms=norms if isinstance(norms, HeadNorms) else None,
            num_heads=attention.num_heads,
            scale=attention.scale,
            window=attention.window,
            soft_cap=attention.soft_cap,
            paged_attention=paged_attention,
        )

    def __call__(
        self, qkv: Tensor, positions: Tensor, slot_mapping: Tensor, attention: Any, out: Tensor
    ) -> None:
        norms = self.norms
        rotate_and_store(
            qkv,
            self.table.cos,
            self.table.sin,
            positions,
            slot_mapping,
            self.kv_layer,
            q_norm=None if norms is None else norms.q_norm.weight,
            k_norm=None if norms is None else norms.k_norm.weight,
            eps=0.0 if norms is None else norms.q_norm.eps,
        )
        shape = (len(qkv), self.num_heads, self.kv_layer.shape[-1])
        self.paged_attention(
            qkv[:, : out.shape[1]].view(shape),
            self.kv_layer,
            attention,
            out=out.view(shape),
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )


@dataclass(frozen=True, slots=True)
class _Site:
    """A linear layer, and what each row's adapter adds to it."""

    layer: int
    site: str
    into: Callable[[_Rows, Tensor], None]

    @staticmethod
    def of(linear: Linear) -> "_Site":
        return _Site(linear.layer, linear.site, _into(linear.multiply))

    def __call__(self, x: _Rows, out: Tensor, lora: LoraBatch | None) -> None:
        self.into(x, out)
        if lora is not None:
            lora.add(self.layer, self.site, x.wide, out)


def _into(multiply: Any) -> Callable[[_Rows, Tensor], None]:
    if isinstance(multiply, SideBySide):
        return _side_by_side(multiply.multiplies)
    if isinstance(multiply, Fp8Linear):
        return lambda x, out: _rounded_into(multiply, x, out)
    assert hasattr(multiply, "into"), "the decoder was loaded with other ops"
    return lambda x, out: multiply.into(x.wide, out)


def _rounded_into(linear: Fp8Linear, x: _Rows, out: Tensor) -> None:
    assert x.rounded is not None
    linear.rows_into(x.rounded, out)


def _side_by_side(parts: tuple[Any, ...]) -> Callable[[_Rows, Tensor], None]:
    """Each into its own columns."""

    def into(x: _Rows, out: Tensor) -> None:
        start = 0
        for part in parts:
            stop = start + part.out_features
            part.into(x.wide, out[:, start:stop])
            start = stop

    return into
