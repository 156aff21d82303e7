"""NativeDecoder: runs a Decoder as a program of native operations, with no Python between layers.

Reads the modules of a loaded Decoder and records what their `forward` methods would do. It decides
nothing about the model, so a family that the Decoder can express needs no code here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.backends.native import structs
from engine.backends.native.library import Context
from engine.backends.native.linear import NativeHead, NativeLinear
from engine.backends.native.overlay_kernels import OverlayKernels, Rows, hide_absent_ids
from engine.backends.native.overlays import Embedding, Head
from engine.backends.native.program import Buffer, Delta, Norm, Program
from engine.backends.native.step import StepArrays
from engine.model.decoder import Attention, Decoder, DecoderLayer, HeadNorms
from engine.model.layers import Linear, RmsNorm, Scale
from engine.model.rotary import RotaryTable


class NativeDecoder:
    """Computes with the weights and KV cache that it was made from: `run(step)`, then `hidden(n)`.

    `kv_layers` says where each layer's blocks are; `capacity` bounds the rows of a step.
    `norm_names` lists the norms by their numbers, `layer_ends` the operations after each layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: Context,
        kv_layers: list[structs.ReefKvLayer],
        max_model_len: int,
        capacity: int,
    ) -> None:
        spec = decoder.spec
        self._head, self._vocab_size = decoder.head, spec.vocab_size
        self._overlays = OverlayKernels(context)
        self.norm_names: list[str] = []
        self.layer_ends: list[int] = []
        self.program = program = Program(context, capacity)
        self._buffers = buffers = _Buffers.make(program, decoder)
        self._sites = {(s.layer, s.site): i for i, s in enumerate(decoder.lora_sites)}
        self._rotations = [
            RotaryTable(rotary, max_model_len, torch.float32, torch.device("cpu"))
            for rotary in dict.fromkeys(spec.rotaries)
        ]
        embedding, self._embedding_scale = decoder.embedding, float(decoder.embedding.scale)
        program.embed(embedding.weight, buffers.x, self._embedding_scale)
        pending: Delta | None = None
        for layer, kv in zip(decoder.layers, kv_layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            is_last = layer is decoder.layers[-1]
            pending = self._layer(layer, kv, buffers, pending, is_last)
            self.layer_ends.append(program.num_ops)
            if is_last:
                buffers = buffers.of_outputs()
        program.norm(buffers.x, self._norm(decoder.norm), buffers.normed, pending)

    def run(self, arrays: StepArrays, changes: Sequence[tuple[Embedding, Rows]] = ()) -> None:
        """Run a step; `changes` are those that adapters make to the embedding, with their rows."""
        if not changes:
            return self.program.run(arrays.step)
        shared = torch.frombuffer(arrays.token_ids, dtype=torch.int32)
        token_ids = shared.long()
        shared[shared >= self._vocab_size] = 0  # the base has no such row: an adapter's replaces it
        self.program.run(arrays.step, end=1)
        x = self._buffers.x.rows[: len(token_ids)]
        self._overlays.embed(changes, token_ids, x, self._embedding_scale)
        self.program.run(arrays.step, begin=1)

    def hidden(self, num_outputs: int) -> Tensor:
        """Return [num_outputs, E] of the last step, valid until the next step."""
        return self._buffers.normed.rows[:num_outputs]

    def logits(self, hidden: Tensor, changes: Sequence[tuple[Head, Rows]] = ()) -> Tensor:
        """Compute logits: hidden [M, E] -> [M, V] in float32; `changes` are those that adapters
        make to the output layer, with their rows of hidden."""
        if not changes:
            return self._head.forward(hidden)  # as a call, but for hooks, which cost a microsecond
        multiply = self._head.multiply
        assert isinstance(multiply, NativeHead)
        width = max(self._vocab_size, *(head.vocab_size for head, _ in changes))
        num_rows = hidden.shape[0]
        num_whole = sum(len(rows) for head, rows in changes if head.is_whole)
        is_needed = num_whole < num_rows  # else nothing of the base's output layer is left
        logits = multiply(hidden, width) if is_needed else multiply.room(num_rows, width)
        self._overlays.head(changes, hidden, logits)
        self._head.finish(logits)
        hide_absent_ids(logits, changes, self._vocab_size)
        return logits

    def _layer(
        self,
        layer: DecoderLayer,
        kv: structs.ReefKvLayer,
        buffers: "_Buffers",
        pending: Delta | None,
        is_last: bool,
    ) -> Delta:
        program = self.program
        program.norm(buffers.x, self._norm(layer.enter_attention), buffers.normed, pending)
        self._attend(layer.attention, kv, buffers)
        if is_last:  # the other rows' hidden states are not needed
            outputs = buffers.of_outputs()
            program.gather(buffers.x, outputs.x)
            program.gather(buffers.attended, outputs.attended)
            buffers = outputs
        self._linear(layer.attention.o, buffers.attended, buffers.delta)
        pending = self._leave(layer.leave_attention, buffers.delta)
        program.norm(buffers.x, self._norm(layer.enter_mlp), buffers.normed, pending)
        self._linear(layer.mlp.gate_up, buffers.normed, buffers.gate_up)
        program.gate(buffers.gate_up, buffers.gated, layer.mlp.activation)
        self._linear(layer.mlp.down, buffers.gated, buffers.delta)
        return self._leave(layer.leave_mlp, buffers.delta)

    def _attend(self, attention: Attention, kv: structs.ReefKvLayer, buffers: "_Buffers") -> None:
        program, heads, kv_heads = self.program, attention.num_heads, attention.num_kv_heads
        q_end, k_end = heads * attention.head_dim, (heads + kv_heads) * attention.head_dim
        q, k = buffers.qkv.columns(0, q_end), buffers.qkv.columns(q_end, k_end)
        self._linear(attention.qkv, buffers.normed, buffers.qkv)
        norms = attention.norm_heads
        if isinstance(norms, HeadNorms):
            program.norm(q, self._norm(norms.q_norm), q, groups=heads)
            program.norm(k, self._norm(norms.k_norm), k, groups=kv_heads)
        rotation = self._rotations[attention.rotary_index]
        program.store(kv, buffers.qkv, heads, rotation.cos, rotation.sin)
        program.attention(
            kv,
            q,
            buffers.attended,
            heads=heads,
            scale=attention.scale,
            window=attention.window,
            soft_cap=attention.soft_cap,
        )

    def _linear(self, linear: Linear, x: Buffer, out: Buffer) -> None:
        site = self._sites[linear.layer, linear.site]
        self.program.linear(x, linear.matrices(NativeLinear), out, site)

    def _norm(self, module: nn.Module) -> Norm:
        assert isinstance(module, RmsNorm), f"a layer begins with {type(module).__name__}"
        self.norm_names.append(module.key.removesuffix(".weight"))
        return Norm(module.weight, module.eps, len(self.norm_names) - 1)

    def _leave(self, leave: nn.Module, delta: Buffer) -> Delta:
        if isinstance(leave, RmsNorm):
            self.program.norm(delta, self._norm(leave), delta)
        return Delta(delta, leave.scale if isinstance(leave, Scale) else 1.0)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Activations of a layer; `of_outputs` are those of the output rows alone."""

    x: Buffer  # the residual stream
    normed: Buffer
    qkv: Buffer
    attended: Buffer
    delta: Buffer
    gate_up: Buffer
    gated: Buffer
    output_x: Buffer
    output_attended: Buffer

    @staticmethod
    def make(program: Program, decoder: Decoder) -> "_Buffers":
        spec = decoder.spec
        q_size = spec.num_heads * spec.head_dim
        widths = {
            "x": spec.hidden_size,
            "normed": spec.hidden_size,
            "qkv": q_size + 2 * spec.num_kv_heads * spec.head_dim,
            "attended": q_size,
            "delta": spec.hidden_size,
            "gate_up": 2 * spec.intermediate_size,
            "gated": spec.intermediate_size,
            "output_x": spec.hidden_size,
            "output_attended": q_size,
        }
        return _Buffers(**{name: program.buffer(width) for name, width in widths.items()})

    def of_outputs(self) -> "_Buffers":
        return _Buffers(
            x=self.output_x,
            normed=self.normed,
            qkv=self.qkv,
            attended=self.output_attended,
            delta=self.delta,
            gate_up=self.gate_up,
            gated=self.gated,
            output_x=self.output_x,
            output_attended=self.output_attended,
        )
