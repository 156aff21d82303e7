"""PlainLayers: the layers of a Decoder by the native kernels, with an adapter that torch adds.

For probes: nothing of how adapters are packed and batched is used. It has a program and KV blocks
of its own, for a few tokens.
"""

from collections.abc import Generator, Sequence
from functools import cached_property

from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.decoder import NativeDecoder
from engine.backends.native.kv import RUN, KvLayout
from engine.backends.native.library import Context
from engine.backends.native.step import StepArrays
from engine.model.decoder import Decoder
from engine.model.inputs import LoraBatch
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams

MAX_ROWS = 4 * RUN
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
        self, token_ids: Sequence[int], copies: int, lora: LoraBatch | None
    ) -> Generator[None, None, Tensor] | None:
        """Compute hidden states [copies * N, E] of the same tokens, a layer at a time; None if they
        are too many."""
        num_blocks = -(-len(token_ids) // RUN)
        if copies * num_blocks * RUN > MAX_ROWS:
            return None
        requests = [
            ScheduledRequest("", 0, [*token_ids], 0, blocks, 0, _SAMPLING, samples=False)
            for blocks in (
                tuple(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(copies)
            )
        ]
        return self._run(StepArrays(requests, [*range(copies * len(token_ids))], RUN), lora)

    def _run(self, arrays: StepArrays, lora: LoraBatch | None) -> Generator[None, None, Tensor]:
        native, begin, count = self._native, 0, arrays.step.rows
        for stop in native.stops:
            native.program.run(arrays.step, begin, stop.end)
            begin = stop.end
            if lora is not None:
                lora.add(stop.layer, stop.site, stop.x.rows[:count], stop.y.rows[:count])
            if stop.site == "down":
                yield
        native.program.run(arrays.step, begin)
        return native.hidden(count)
