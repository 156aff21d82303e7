"""TorchForward: computes a forward pass with torch, on any device that it supports."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.backends.kv_cache import load_on_host, move_on_host
from engine.backends.sampler import TorchPicker
from engine.backends.torch.bank import AdapterBank
from engine.backends.torch.inputs import build_inputs
from engine.lora.weights import LoraWeights
from engine.model.decoder import Decoder
from engine.scheduler.batch import AdapterLoad, Move, ScheduledBatch


class TorchForward:
    """Owns the KV tensor [blocks, layers, 2, block_size, H_kv, D] and the adapters."""

    def __init__(self, decoder: Decoder, kv_cache: Tensor, block_size: int) -> None:
        self.device = kv_cache.device
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._block_size = block_size
        self._bank = AdapterBank(self.device)
        self.picker = TorchPicker()

    def load_adapter(self, load: AdapterLoad, packed: LoraWeights) -> None:
        load_on_host(self._kv_cache, load)
        self._bank.load(load.slot, packed)

    def evict_adapter(self, slot: int) -> None:
        self._bank.evict(slot)

    def move(self, moves: Sequence[Move]) -> None:
        move_on_host(self._kv_cache, moves)

    def hidden(self, batch: ScheduledBatch, output_rows: list[int]) -> Tensor:
        lora, overlays = self._bank.batch(batch), self._bank.overlays(batch)
        inputs = build_inputs(batch, self._block_size, self.device, lora, overlays)
        hidden = self._decoder(inputs, self._kv_cache)
        return hidden[torch.tensor(output_rows, dtype=torch.long, device=self.device)]

    def logits(self, hidden: Tensor, adapter_slots: Sequence[int]) -> Tensor:
        return self._decoder.logits(hidden, self._bank.heads(adapter_slots))
