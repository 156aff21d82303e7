"""Makes a DeviceRunner whose model and adapters are plain torch.

The model reads its inputs from the views that a captured graph would use, and adapters from the
arena's bytes, so that errors of the runner give wrong tokens. Padding rows come out as NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from engine.backends.cuda.adapter_copies import AdapterCopies, PackedAdapter, pack_adapter
from engine.backends.cuda.extent import UNIT_BYTES, AdapterExtent, move_bytes
from engine.backends.cuda.forward import DeviceForward, Numbers, StepLimits
from engine.backends.cuda.head import HeadBatch
from engine.backends.cuda.inputs import StepInputs
from engine.backends.cuda.runner import DeviceRunner
from engine.backends.cuda.streams import Device, HostDevice
from engine.backends.kv_cache import blocks_of_arena
from engine.lora.weights import LoraWeights
from engine.model.decoder import Decoder
from engine.model.inputs import AttentionInputs, ForwardInputs, LoraBatch

BLOCK_SIZE = 4
ARENA_BYTES = 2**21
TILE_TOKENS = 16
SCRATCH = torch.zeros(256, dtype=torch.uint8)


class PlainBank:
    def __init__(self, arena: Tensor) -> None:
        self.arena = arena
        self.places: dict[int, tuple[int, AdapterExtent]] = {}

    def place(self, slot: int, offset_bytes: int, extent: AdapterExtent) -> None:
        assert slot not in self.places and offset_bytes % UNIT_BYTES == 0
        self.places[slot] = offset_bytes, extent

    def move(self, slot: int, offset_bytes: int) -> None:
        source, extent = self.places[slot]
        move_bytes(self.arena, source, offset_bytes, extent.nbytes, SCRATCH.clone())
        self.places[slot] = offset_bytes, extent

    def evict(self, slot: int) -> None:
        self.places.pop(slot, None)

    def max_words(self, num_rows: int) -> int:
        return num_rows

    def plan(self, row_slots: Sequence[int]) -> Numbers:
        return np.asarray(row_slots, np.int32)

    def batch(self, num_rows: int, words: Tensor) -> LoraBatch:
        assert len(words) == num_rows
        return PlainLora(self, words)

    def head(self, row_slots: Sequence[int]) -> None:
        return None


@dataclass(frozen=True)
class PlainLora:
    bank: PlainBank
    row_slots: Tensor

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        for row, slot in enumerate(self.row_slots.tolist()[: len(x)]):
            if not slot:
                continue
            offset, extent = self.bank.places[slot]
            where = extent.sites.get((layer, site))
            if where is None:
                continue
            a = self._tensor(extent, offset + where.a_bytes, where.lora_rank, where.in_features)
            h = a @ x[row]
            for s in where.slices:
                b = self._tensor(extent, offset + s.b_bytes, s.r1 - s.r0, s.out1 - s.out0)
                y[row, s.out0 : s.out1] += h[s.r0 : s.r1] @ b

    def _tensor(self, extent: AdapterExtent, start: int, rows: int, columns: int) -> Tensor:
        assert extent.dtype is not None
        nbytes = rows * columns * extent.dtype.itemsize
        return self.bank.arena[start : start + nbytes].view(extent.dtype).view(rows, columns)


class PlainModel:
    def __init__(self, decoder: Decoder, kv_cache: Tensor) -> None:
        self.decoder, self.kv_cache = decoder, kv_cache

    def forward(
        self,
        inputs: StepInputs,
        lora: LoraBatch | None = None,
        output_lora: LoraBatch | None = None,
        *,
        out: Tensor,
    ) -> Tensor:
        token_ids, slot_mapping = inputs.token_ids, inputs.slot_mapping
        attention, output_rows = inputs.attention, inputs.output_rows
        context_lens = [length for length in attention.context_lens.tolist() if length]
        row_starts = attention.cu_seqlens_q.tolist()[: len(context_lens) + 1]
        rows = row_starts[-1]
        assert (slot_mapping[rows:] == -1).all() and (slot_mapping[:rows] >= 0).all()
        hidden = torch.full((len(token_ids), self.decoder.spec.hidden_size), torch.nan)
        if rows:
            hidden[:rows] = self.decoder(
                ForwardInputs(
                    token_ids[:rows].long(),
                    inputs.positions[:rows].long(),
                    AttentionInputs(
                        num_decodes=sum(b - a == 1 for a, b in pairwise(row_starts)),
                        cu_seqlens_q=row_starts,
                        context_lens=context_lens,
                        block_tables=attention.block_tables.long(),
                        slot_mapping=slot_mapping[:rows].long(),
                    ),
                    lora,
                ),
                self.kv_cache,
            )
        if len(out) == len(token_ids):
            return out.copy_(hidden)
        if lora is not None:
            assert isinstance(lora, PlainLora) and isinstance(output_lora, PlainLora)
            assert torch.equal(output_lora.row_slots, lora.row_slots[output_rows.long()])
        return out.copy_(hidden[output_rows.long()])

    def logits(self, hidden: Tensor, head: HeadBatch | None = None) -> Tensor:
        return self.decoder.logits(hidden)


def pack_all(adapters: Sequence[LoraWeights]) -> dict[str, PackedAdapter]:
    return {weights.digest: pack_adapter(weights, HostDevice()) for weights in adapters}


def make_plain(
    decoder: Decoder,
    host_adapter: Callable[[str], PackedAdapter],
    *,
    uses_graphs: bool = True,
    device: Device | None = None,
    limits: StepLimits | None = None,
    arena_bytes: int = ARENA_BYTES,
) -> DeviceRunner:
    device = device or HostDevice()
    limits = limits or StepLimits(8, 64, 128, BLOCK_SIZE)
    spec, dtype = decoder.spec, decoder.embedding.weight.dtype
    arena = torch.full((arena_bytes,), 0xFF, dtype=torch.uint8)  # NaN: not written yet
    kv_cache, bank = blocks_of_arena(arena, limits.block_size, spec, dtype), PlainBank(arena)
    forward = DeviceForward(
        device,
        PlainModel(decoder, kv_cache),
        bank,
        limits,
        tile_tokens=TILE_TOKENS,
        hidden_size=spec.hidden_size,
        dtype=dtype,
        uses_graphs=uses_graphs,
    )
    forward.capture_graphs()
    copies = AdapterCopies(device, arena, kv_cache[0].nbytes, bank, host_adapter)
    return DeviceRunner(device, forward, copies)
