"""FusedDecoder: runs a Decoder on a GPU as a chain of fused kernels on fixed buffers.

Reads the modules of a loaded Decoder once and runs what their `forward` methods would do. It
decides nothing about the model, so a family that the Decoder can express needs no code here. A
forward allocates nothing, reads nothing back and launches the same kernels for every batch of one
size, so a CUDA graph can capture it. Importing this module imports Triton.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.backends.cuda.buffers import Buffers, Rows
from engine.backends.cuda.head import HeadBatch
from engine.backends.cuda.inputs import StepInputs
from engine.backends.cuda.layer import (
    AddNorm,
    Beside,
    FusedLayer,
    PagedAttentionInto,
)
from engine.backends.cuda.triton.embed import embed
from engine.backends.cuda.triton.own import OwnWeights, own_weights
from engine.model.decoder import Decoder, DecoderLayer
from engine.model.inputs import LoraBatch
from engine.model.rotary import RotaryTable


class FusedDecoder:
    """Computes with the decoder's weights and a KV cache [blocks, layers, 2, block_size, H_kv, D].

    The decoder was built with `cuda_build`. `capacity` bounds the rows of a forward. Given
    `beside`, a layer's shrink of adapters runs there concurrently with its multiplication; every
    `lora` of `forward` must then be a LoraBatchInParts.
    """

    def __init__(
        self,
        decoder: Decoder,
        paged_attention: PagedAttentionInto,
        kv_cache: Tensor,
        capacity: int,
        beside: Beside | None = None,
    ) -> None:
        self._embedding = decoder.embedding
        self._scale = float(decoder.embedding.scale)
        self._head = decoder.head
        tables = _tables(decoder)
        self._layers: list[FusedLayer] = []
        pending: nn.Module | None = None
        for layer, kv_layer in zip(decoder.layers, kv_cache.unbind(1), strict=True):
            assert isinstance(layer, DecoderLayer)
            table = tables[layer.attention.rotary_index]
            self._layers.append(
                FusedLayer.of(layer, pending, table, kv_layer, paged_attention, beside)
            )
            pending = layer.leave_mlp
        self._norm = AddNorm.of(decoder.norm, pending)
        self._buffers = Buffers.make(decoder, capacity)

    def forward(
        self,
        inputs: StepInputs,
        lora: LoraBatch | None = None,
        output_lora: LoraBatch | None = None,
        *,
        out: Tensor,
    ) -> Tensor:
        """Write hidden states after the last norm to `out`, which is returned, and the KV cache.

        A row whose slot is -1 stores nothing. If out [M, E] has fewer rows than the step, it gets
        those of `inputs.output_rows` [M], and the last layer computes these alone after its
        attention: if there is `lora`, then only if `output_lora` has the same adapters for them.
        """
        b = self._buffers.first(len(inputs.token_ids))
        output_rows = inputs.output_rows if len(out) < len(inputs.token_ids) else None
        self._embed(inputs.token_ids, b.x, own_weights(lora))
        for layer in self._layers[:-1]:
            layer.attend(b, inputs, lora)
            layer.transform(b, lora)
        last = self._layers[-1]
        last.attend(b, inputs, lora)
        if output_rows is not None and (lora is None or output_lora is not None):
            b, lora, output_rows = self._cut(b, output_rows), output_lora, None
        last.transform(b, lora)
        if output_rows is None:
            self._norm(b.x, b.delta, Rows(out, None), own_weights(lora))
            return out
        self._norm(b.x, b.delta, Rows(b.normed.wide, None), own_weights(lora))
        return torch.index_select(b.normed.wide, 0, output_rows, out=out)

    def logits(self, hidden: Tensor, head: HeadBatch | None = None) -> Tensor:
        """Compute logits: hidden [M, E] -> [M, V] in float32; V may be larger with `head`."""
        return self._head(hidden) if head is None else head.logits(hidden, self._head)

    def _embed(self, token_ids: Tensor, x: Tensor, own: OwnWeights | None) -> None:
        weight = self._embedding.weight
        if own is not None:
            embed(token_ids, weight, self._scale, own, x)
            return
        torch.index_select(weight, 0, token_ids, out=x)
        if self._scale != 1.0:
            x.mul_(self._embedding.scale)

    def _cut(self, b: Buffers, rows: Tensor) -> Buffers:
        """Copy the last layer's remaining inputs, for these rows, to buffers of their own."""
        outputs = self._buffers.first(len(rows))
        torch.index_select(b.x, 0, rows, out=outputs.output_x)
        torch.index_select(b.attended.wide, 0, rows, out=outputs.output_attended.wide)
        return replace(outputs, x=outputs.output_x, attended=outputs.output_attended)


def _tables(decoder: Decoder) -> list[RotaryTable]:
    """Make the decoder's rotary tables again, in float32."""
    own = decoder.rotary_tables[0]
    assert isinstance(own, RotaryTable)
    rotaries = dict.fromkeys(decoder.spec.rotaries)
    return [RotaryTable(r, len(own.cos), torch.float32, own.cos.device) for r in rotaries]
