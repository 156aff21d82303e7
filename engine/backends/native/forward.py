"""NativeForward: computes a forward pass with the native CPU kernels, in one call from Python."""

from collections.abc import Sequence

from torch import Tensor

from engine.backends.kv_cache import load_on_host, move_on_host
from engine.backends.native.bank import NativeAdapterBank
from engine.backends.native.decoder import NativeDecoder
from engine.backends.native.kv import KvLayout
from engine.backends.native.library import Context
from engine.backends.native.panels import PanelWeights
from engine.backends.native.picker import NativePicker
from engine.backends.native.step import StepArrays
from engine.model.decoder import Decoder
from engine.scheduler.batch import AdapterLoad, Move, ScheduledBatch


class NativeForward:
    """Owns the KV blocks, uint8 [blocks, layers, bytes of a layer's block], and the adapters."""

    def __init__(
        self,
        decoder: Decoder,
        context: Context,
        kv_layout: KvLayout,
        num_blocks: int,
        max_model_len: int,
        max_rows: int,
    ) -> None:
        num_layers = decoder.spec.num_layers
        self._kv_cache = kv_layout.allocate(num_blocks, num_layers)
        self._block_size = kv_layout.block_size
        kv_layers = [kv_layout.layer(self._kv_cache, i) for i in range(num_layers)]
        self._decoder = NativeDecoder(decoder, context, kv_layers, max_model_len, max_rows)
        keys = [(s.layer, s.site) for s in decoder.lora_sites]
        self._bank = NativeAdapterBank(keys, self._decoder.norm_names)
        self.picker = NativePicker(context)

    def load_adapter(self, load: AdapterLoad, packed: PanelWeights) -> None:
        load_on_host(self._kv_cache, load)
        self._bank.load(load.slot, packed)

    def evict_adapter(self, slot: int) -> None:
        self._bank.evict(slot)

    def move(self, moves: Sequence[Move]) -> None:
        move_on_host(self._kv_cache, moves)

    def hidden(self, batch: ScheduledBatch, output_rows: list[int]) -> Tensor:
        arrays = self._step(batch, output_rows)
        self._decoder.run(arrays, self._bank.embeddings(batch))
        return self._decoder.hidden(len(output_rows))

    def profile(self, batch: ScheduledBatch, output_rows: list[int]) -> dict[str, float]:
        """Run the batch like `hidden` and return the seconds of each kind of operation; changes of
        the embedding are left out."""
        arrays = self._step(batch, output_rows)
        return self._decoder.program.profile(arrays.step)

    def logits(self, hidden: Tensor, adapter_slots: Sequence[int]) -> Tensor:
        return self._decoder.logits(hidden, self._bank.heads(adapter_slots))

    def _step(self, batch: ScheduledBatch, output_rows: list[int]) -> StepArrays:
        arrays = StepArrays(batch.requests, output_rows, self._block_size)
        lora = self._bank.batch(batch)
        if lora is not None:
            is_all = len(output_rows) == arrays.step.rows
            arrays.use(lora, lora if is_all else self._bank.batch(batch, output_rows))
        norms = self._bank.norms(batch, output_rows)
        if norms is not None:
            arrays.use_norms(*norms)
        return arrays
