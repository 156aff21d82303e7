"""Buffers: the activations of a layer, allocated once; graphs know their addresses."""

from dataclasses import dataclass

from torch import Tensor

from engine.backends.cuda.fp8 import Fp8Linear
from engine.model.decoder import Decoder
from engine.model.fp8 import E4m3Rows
from engine.model.layers import Linear


@dataclass(frozen=True, slots=True)
class Rows:
    """The input of a linear layer. Adapters always read `wide`, FP8 layers `rounded`."""

    wide: Tensor  # [N, in]
    rounded: E4m3Rows | None

    def first(self, n: int) -> "Rows":
        return Rows(self.wide[:n], None if self.rounded is None else self.rounded.first(n))


@dataclass(frozen=True, slots=True)
class Buffers:
    """Activations of a layer."""

    x: Tensor  # the residual stream
    normed: Rows
    qkv: Tensor
    attended: Rows
    delta: Tensor  # output of attention or mlp, to be added to x
    gate_up: Tensor
    gated: Rows
    output_x: Tensor  # x of the output rows alone
    output_attended: Rows

    @staticmethod
    def make(decoder: Decoder, capacity: int) -> "Buffers":
        spec, weight = decoder.spec, decoder.embedding.weight
        linears = [leaf for leaf in decoder.modules() if isinstance(leaf, Linear)]
        is_fp8 = any(isinstance(linear.multiply, Fp8Linear) for linear in linears)

        def tensor(width: int) -> Tensor:
            return weight.new_zeros(capacity, width)

        def rows(width: int) -> Rows:
            rounded = E4m3Rows.empty(capacity, width, weight.device) if is_fp8 else None
            return Rows(tensor(width), rounded)

        q_size = spec.num_heads * spec.head_dim
        return Buffers(
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

    def first(self, n: int) -> "Buffers":
        """Return views of the first n rows."""
        assert n <= len(self.x), f"{n} rows, room for {len(self.x)}"
        return Buffers(
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
