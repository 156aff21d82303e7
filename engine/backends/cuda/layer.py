"""FusedLayer: reads a DecoderLayer and launches its kernels in order, for a FusedDecoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from engine.backends.cuda.buffers import Buffers, Rows
from engine.backends.cuda.fp8 import Fp8Linear
from engine.backends.cuda.inputs import StepInputs
from engine.backends.cuda.places import norm_name
from engine.backends.cuda.positions import DevicePositions
from engine.backends.cuda.triton.fp8_rows import quantize_rows
from engine.backends.cuda.triton.gate import gate
from engine.backends.cuda.triton.norm import add_rms_norm
from engine.backends.cuda.triton.own import OwnWeights, own_weights
from engine.backends.cuda.triton.rotary import rotate_and_store
from engine.backends.cuda.weight_ops import DeviceLinear
from engine.model.decoder import Attention, DecoderLayer, HeadNorms
from engine.model.inputs import LoraBatch, LoraBatchInParts
from engine.model.layers import Linear, RmsNorm, Scale
from engine.model.rotary import RotaryTable

# Starts work concurrently with the caller's next kernels; the returned call waits for its end
Beside = Callable[[Callable[[], None]], Callable[[], None]]


class PagedAttentionInto(Protocol):
    def __call__(
        self,
        q: Tensor,
        kv_layer: Tensor,
        positions: DevicePositions,
        *,
        out: Tensor,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """Write PagedAttention of engine.model.ops to out [N, H, D], and return it.

        q's rows are not contiguous: it is a part of the qkv layer's output.
        """
        ...


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """Runs one DecoderLayer; the norm that follows adds its mlp's output."""

    enter_attention: "AddNorm"
    qkv: "_Site"
    attention: "_Attention"
    o: "_Site"
    enter_mlp: "AddNorm"
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
        beside: Beside | None,
    ) -> "FusedLayer":
        return FusedLayer(
            enter_attention=AddNorm.of(layer.enter_attention, pending),
            qkv=_Site.of(layer.attention.qkv, beside),
            attention=_Attention.of(layer.attention, table, kv_layer, paged_attention),
            o=_Site.of(layer.attention.o, beside),
            enter_mlp=AddNorm.of(layer.enter_mlp, layer.leave_attention),
            gate_up=_Site.of(layer.mlp.gate_up, beside),
            activation=layer.mlp.activation,
            down=_Site.of(layer.mlp.down, beside),
        )

    def attend(self, b: Buffers, inputs: StepInputs, lora: LoraBatch | None) -> None:
        own = own_weights(lora)
        self.enter_attention(b.x, b.delta, b.normed, own)
        self.qkv(b.normed, b.qkv, lora)
        self.attention(b.qkv, inputs, b.attended.wide, own)

    def transform(self, b: Buffers, lora: LoraBatch | None) -> None:
        """Compute everything after attention, for any rows."""
        if b.attended.rounded is not None:
            quantize_rows(b.attended.wide, b.attended.rounded)
        self.o(b.attended, b.delta, lora)
        self.enter_mlp(b.x, b.delta, b.normed, own_weights(lora))
        self.gate_up(b.normed, b.gate_up, lora)
        gate(b.gate_up, b.gated.wide, self.activation, rounded=b.gated.rounded)
        self.down(b.gated, b.delta, lora)


@dataclass(frozen=True, slots=True)
class AddNorm:
    """Computes x += scale * leave(delta), if there is a delta yet; out = norm(x)."""

    weight: Tensor
    eps: float
    adds: bool
    scale: float
    leave: Tensor | None
    names: tuple[str, str | None]  # of the norm, and of the one that `leave` belongs to

    @staticmethod
    def of(norm: nn.Module, pending: nn.Module | None) -> "AddNorm":
        assert isinstance(norm, RmsNorm)
        assert not isinstance(pending, RmsNorm) or pending.eps == norm.eps
        return AddNorm(
            weight=norm.weight,
            eps=norm.eps,
            adds=pending is not None,
            scale=pending.scale if isinstance(pending, Scale) else 1.0,
            leave=pending.weight if isinstance(pending, RmsNorm) else None,
            names=(norm_name(norm), norm_name(pending) if isinstance(pending, RmsNorm) else None),
        )

    def __call__(self, x: Tensor, delta: Tensor, out: Rows, own: OwnWeights | None) -> None:
        add_rms_norm(
            x,
            delta if self.adds else None,
            self.weight,
            self.eps,
            out.wide,
            scale=self.scale,
            leave=self.leave,
            rounded=out.rounded,
            own=own,
            names=self.names,
        )


@dataclass(frozen=True, slots=True)
class _Attention:
    """Turns the qkv layer's output into attention's: head norms, rotary, store, attention."""

    kv_layer: Tensor
    table: RotaryTable
    norms: HeadNorms | None
    names: tuple[str, str] | None  # of these norms
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
        norms = attention.norm_heads if isinstance(attention.norm_heads, HeadNorms) else None
        return _Attention(
            kv_layer=kv_layer,
            table=table,
            norms=norms,
            names=norms and (norm_name(norms.q_norm), norm_name(norms.k_norm)),
            num_heads=attention.num_heads,
            scale=attention.scale,
            window=attention.window,
            soft_cap=attention.soft_cap,
            paged_attention=paged_attention,
        )

    def __call__(
        self, qkv: Tensor, inputs: StepInputs, out: Tensor, own: OwnWeights | None
    ) -> None:
        norms = self.norms
        rotate_and_store(
            qkv,
            self.table.cos,
            self.table.sin,
            inputs.positions,
            inputs.slot_mapping,
            self.kv_layer,
            q_norm=None if norms is None else norms.q_norm.weight,
            k_norm=None if norms is None else norms.k_norm.weight,
            eps=0.0 if norms is None else norms.q_norm.eps,
            own=own,
            names=self.names,
        )
        shape = (len(qkv), self.num_heads, self.kv_layer.shape[-1])
        self.paged_attention(
            qkv[:, : out.shape[1]].view(shape),
            self.kv_layer,
            inputs.attention,
            out=out.view(shape),
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )


@dataclass(frozen=True, slots=True)
class _Site:
    """A linear layer to which each row's adapter is added."""

    layer: int
    site: str
    into: Callable[[Rows, Tensor], None]
    beside: Beside | None  # None: one after the other

    @staticmethod
    def of(linear: Linear, beside: Beside | None) -> "_Site":
        return _Site(linear.layer, linear.site, _into(linear.matrices(DeviceLinear)), beside)

    def __call__(self, x: Rows, out: Tensor, lora: LoraBatch | None) -> None:
        if lora is not None and self.beside is not None:
            self._with_beside(self.beside, x, out, cast(LoraBatchInParts, lora))
            return
        self.into(x, out)
        if lora is not None:
            lora.add(self.layer, self.site, x.wide, out)

    def _with_beside(self, beside: Beside, x: Rows, out: Tensor, lora: LoraBatchInParts) -> None:
        """Shrink concurrently with the layer. The next site's x depends on `out`, so no two shrinks
        ever overlap."""
        wait = beside(lambda: lora.shrink(self.layer, self.site, x.wide))
        try:
            self.into(x, out)
        finally:
            wait()  # else the next step might overwrite what the shrink still reads
        lora.expand(self.layer, self.site, out)


def _into(parts: tuple[DeviceLinear, ...]) -> Callable[[Rows, Tensor], None]:
    linear, *more = parts
    if more:
        return _side_by_side(parts)
    if isinstance(linear, Fp8Linear):
        return lambda x, out: _rounded_into(linear, x, out)
    return lambda x, out: _wide_into(linear, x, out)


def _wide_into(linear: DeviceLinear, x: Rows, out: Tensor) -> None:
    linear.into(x.wide, out)


def _rounded_into(linear: Fp8Linear, x: Rows, out: Tensor) -> None:
    assert x.rounded is not None
    linear.rows_into(x.rounded, out)


def _side_by_side(parts: tuple[DeviceLinear, ...]) -> Callable[[Rows, Tensor], None]:
    """Combine layers that write to adjacent columns."""

    def into(x: Rows, out: Tensor) -> None:
        start = 0
        for part in parts:
            stop = start + part.out_features
            part.into(x.wide, out[:, start:stop])
            start = stop

    return into
