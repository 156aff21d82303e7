"""PlainLayers: the layers of a Decoder by the native kernels, with an adapter as it was read.

For probes: nothing of how adapters are packed and batched is used. It has a program and KV blocks
of its own, for a few tokens.
"""

import time
from collections.abc import Generator, Sequence
from functools import cached_property

from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.decoder import NativeDecoder
from engine.backends.native.kv import RUN, KvLayout
from engine.backends.native.library import Context
from engine.backends.native.plain_sites import PlainSites, are_plain
from engine.backends.native.step import StepArrays
from engine.lora.weights import LoraWeights
from engine.model.decoder import Decoder
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams

MAX_ROWS = 4 * RUN
PART_S = 0.004  # of a call: other threads of Python go on meanwhile, and a step waits
_SAMPLING = SamplingParams(max_tokens=1)  # nothing is sampled


class PlainLayers:
    """Runs in the thread that owns the context."""

    def __init__(self, decoder: Decoder, context: Context) -> None:
        self._decoder = decoder
        self._context = context

    @cached_property
    def _native(self) -> NativeDecoder:
        spec = self._decoder.spec
        layout = KvLayout(structs.KV_BF16, RUN, spec.num_kv_heads, spec.head_dim)
        self._kv_cache = layout.allocate(MAX_ROWS // RUN, spec.num_layers)
        kv_layers = [layout.layer(self._kv_cache, i) for i in range(spec.num_layers)]
        return NativeDecoder(self._decoder, self._context, kv_layers, MAX_ROWS, MAX_ROWS)

    def __call__(
        self, token_ids: Sequence[int], copies: int, weights: LoraWeights, first: int
    ) -> Generator[None, None, Tensor] | None:
        """Compute hidden states [copies * N, E] of the same tokens, a few layers at a time."""
        num_blocks, num_rows = -(-len(token_ids) // RUN), copies * len(token_ids)
        has_more = weights.changes_rows or weights.head is not None
        if has_more or copies * num_blocks * RUN > MAX_ROWS or not are_plain(weights.sites):
            return None
        requests = [
            ScheduledRequest("", 0, [*token_ids], 0, blocks, 0, _SAMPLING, samples=False)
            for blocks in (
                tuple(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(copies)
            )
        ]
        return self._run(StepArrays(requests, [*range(num_rows)], RUN), weights, first)

    def _run(
        self, arrays: StepArrays, weights: LoraWeights, first: int
    ) -> Generator[None, None, Tensor]:
        native, count = self._native, arrays.step.rows
        sites = PlainSites(weights.sites, self._decoder.lora_sites, count, first)
        arrays.step.plain = sites.struct
        ends, begin, num_layers = native.layer_ends, 0, 1
        while ends:
            start = time.monotonic()
            native.program.run(arrays.step, begin, ends[:num_layers][-1])
            begin, ends = ends[:num_layers][-1], ends[num_layers:]
            layer_s = (time.monotonic() - start) / num_layers
            num_layers = max(1, int(PART_S / max(layer_s, 1e-9)))
            yield
        native.program.run(arrays.step, begin)
        return native.hidden(count)
