"""DeviceForward: runs the model's forward pass on one device, with decode steps in graphs.

A step whose requests all have one token replays a graph if one is large enough; any other launches
its kernels one by one. Either way it reads its numbers from fixed memory that one copy fills.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.announcer import SILENT, Announcer
from engine.backends.cuda.graphs import GraphFigures, GraphRunner, graph_sizes
from engine.backends.cuda.head import HeadBatch
from engine.backends.cuda.inputs import (
    InputBuffers,
    RequestKey,
    StepInputs,
    StepNumbers,
    StepShape,
)
from engine.backends.cuda.positions import (
    PositionsCapacity,
    exact_capacity,
    prefill_pages,
)
from engine.backends.cuda.streams import Device
from engine.model.inputs import LoraBatch
from engine.scheduler.batch import ScheduledRequest

Numbers = NDArray[np.int32]

# Triton compiles anew for a 1 and for multiples of 16. Low-bit layers have tiles for up to 64
# rows, others for up to 256, and are dequantized for more
WARM_UP_ROWS = (1, 17, 64, 72, 128, 256, 512)


class StepModel(Protocol):
    """The decoder with its KV cache. Its launches depend on shapes, never on values."""

    def forward(
        self,
        inputs: StepInputs,
        lora: LoraBatch | None = None,
        output_lora: LoraBatch | None = None,
        *,
        out: Tensor,
    ) -> Tensor:
        """Compute all rows, writing their KV, and return out [M, E].

        `out` gets the hidden states after the last norm: of all rows if it has as many, else of
        `inputs.output_rows`, whose adapters are in `output_lora`.
        """
        ...

    def logits(self, hidden: Tensor, head: HeadBatch | None = None) -> Tensor:
        """Compute logits: hidden [M, E] -> [M, V] in float32, which the caller may change; with
        the output layers of adapters if there is a `head`."""
        ...


class LoraPlanner(Protocol):
    """Makes work lists of a batch's adapters."""

    def max_words(self, num_rows: int) -> int:
        """Return the longest list of any batch of up to `num_rows` rows."""
        ...

    def plan(self, row_slots: Sequence[int]) -> Numbers:
        """Make a work list: row i has the adapter in `row_slots[i]`, 0 for none."""
        ...

    def batch(self, num_rows: int, words: Tensor) -> LoraBatch:
        """Make the batch of the plan that is in `words` when a kernel runs, of `num_rows` rows."""
        ...

    def head(self, row_slots: Sequence[int]) -> HeadBatch | None:
        """Return what these rows' adapters change of the output layer, None for nothing."""
        ...


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Upper bounds of any step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int

    @property
    def table_width(self) -> int:
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """The output of a step, valid until the next step."""

    hidden: Tensor  # [M, E] of the output rows
    inputs: StepInputs


class DeviceForward:
    def __init__(
        self,
        device: Device,
        model: StepModel,
        lora: LoraPlanner,
        limits: StepLimits,
        *,
        tile_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        uses_graphs: bool,
        plans_prefills: bool = False,
    ) -> None:
        """Allocate the buffers. `plans_prefills`: the model needs `prefill_pages`."""
        self._plans_prefills = plans_prefills
        self._model, self._lora, self._limits = model, lora, limits
        self._tile_tokens = tile_tokens
        sizes = graph_sizes(limits.max_num_seqs) if uses_graphs else ()
        self._shapes = {
            (size, has_lora): self._graph_shape(size, has_lora)
            for size in sizes
            for has_lora in (True, False)
        }
        largest = [*self._shapes.values(), self._largest_shape()]
        self._buffers = InputBuffers(
            device,
            max_samples=limits.max_num_seqs,
            max_rows=limits.max_num_batched_tokens,
            max_words=max(shape.num_words for shape in largest),
            block_size=limits.block_size,
        )
        self._views = {key: self._views_of(shape) for key, shape in self._shapes.items()}
        self._hidden = torch.zeros(
            limits.max_num_batched_tokens, hidden_size, dtype=dtype, device=device.torch_device
        )
        self._graphs = GraphRunner(device, sizes, self._fill_padding, self._decode)

    def capture_graphs(self, announcer: Announcer = SILENT) -> GraphFigures:
        """Record the graphs. Call once, before the first step."""
        with torch.inference_mode():
            self._graphs.capture(announcer)
        return self._graphs.figures

    def warm_up(self) -> Tensor:
        """Run eager steps without requests, so that their kernels are compiled before the first
        real one; return hidden states [1, E] without meaning."""
        most = self._limits.max_num_batched_tokens
        for num_rows in (n for n in WARM_UP_ROWS if n < most):
            self._warm_up_one(num_rows, num_decodes=1, num_tiles=1)
        # With this many requests attention does not split their keys, unlike above
        self._warm_up_one(most, num_decodes=self._limits.max_num_seqs, num_tiles=most)
        return self._hidden[:1]

    def _warm_up_one(self, num_rows: int, num_decodes: int, num_tiles: int) -> None:
        capacity = PositionsCapacity(num_decodes, 1, 1, num_tiles, self._tile_tokens)
        for has_lora in (True, False):
            words = self._lora_words(np.zeros(num_rows, np.int32)) if has_lora else _NO_WORDS
            output_words = self._lora_words(np.zeros(1, np.int32)) if has_lora else _NO_WORDS
            shape = StepShape(num_rows, 1, 0, capacity, words.size, output_words.size)
            self._buffers.fill(shape, (), StepNumbers((), (), {}, words, output_words))
            self._forward(self._views_of(shape), self._hidden[:1], has_lora)

    @property
    def sampled(self) -> Tensor:
        """Memory, int32 [max_num_seqs], where the next step reads this step's sampled tokens."""
        return self._buffers.sampled

    def hidden(
        self,
        requests: Sequence[ScheduledRequest],
        output_rows: list[int],
        sample_rows: list[int],
        sampled_before: Mapping[RequestKey, int],
    ) -> ForwardOutput:
        """Compute all rows and return the hidden states of `output_rows`. `sample_rows` are
        indexes into these; they are copied to the device with the other inputs."""
        is_decode = len(requests[-1].token_ids) == 1  # decodes come first
        size = self._graphs.size_for(len(requests)) if is_decode else None
        has_lora = any(r.adapter_slot for r in requests)
        if size is None:
            return self._eager(requests, output_rows, sample_rows, sampled_before, has_lora)
        words = self._lora_words(_row_slots(requests, size)) if has_lora else _NO_WORDS
        numbers = StepNumbers(output_rows, sample_rows, sampled_before, words, _NO_WORDS)
        self._buffers.fill_decodes(self._shapes[size, has_lora], requests, numbers)
        self._graphs.replay(size, has_lora)
        inputs = self._views[size, has_lora]
        hidden = self._hidden[: len(requests)]
        if output_rows != list(range(len(requests))):
            hidden = hidden.index_select(0, inputs.output_rows[: len(output_rows)])
        return ForwardOutput(hidden, inputs)

    def logits(self, hidden: Tensor, adapter_slots: Sequence[int]) -> Tensor:
        """Compute logits [M, V] of rows [M, E] with these adapters; -inf where an id is another
        adapter's alone."""
        return self._model.logits(hidden, self._lora.head(adapter_slots))

    # ==== eager steps ====

    def _eager(
        self,
        requests: Sequence[ScheduledRequest],
        output_rows: list[int],
        sample_rows: list[int],
        sampled_before: Mapping[RequestKey, int],
        has_lora: bool,
    ) -> ForwardOutput:
        num_rows = sum(len(r.token_ids) for r in requests)
        wanted = output_rows or [0]  # kernels cannot be launched for zero rows
        is_cut = len(wanted) < num_rows
        words = output_words = _NO_WORDS
        if has_lora:
            slots = _row_slots(requests, num_rows)
            words = self._lora_words(slots)
            output_words = self._lora_words(slots[wanted]) if is_cut else _NO_WORDS
        shape = StepShape(
            num_rows,
            len(wanted),
            len(sample_rows),
            exact_capacity(requests, self._tile_tokens),
            words.size,
            output_words.size,
        )
        numbers = StepNumbers(wanted, sample_rows, sampled_before, words, output_words)
        self._buffers.fill(shape, requests, numbers)
        inputs = self._views_of(shape)
        if self._plans_prefills and shape.positions.num_prefills:
            pages = prefill_pages(requests, self._limits.block_size)
            inputs = replace(inputs, attention=replace(inputs.attention, prefill_pages=pages))
        self._forward(inputs, self._hidden[: len(wanted)], has_lora)
        return ForwardOutput(self._hidden[: len(output_rows)], inputs)

    def _largest_shape(self) -> StepShape:
        rows, seqs = self._limits.max_num_batched_tokens, self._limits.max_num_seqs
        return StepShape(
            num_rows=rows,
            num_outputs=rows,
            num_samples=seqs,
            positions=self._capacity(seqs, num_tiles=rows),
            num_lora_words=self._lora.max_words(rows),
            num_output_lora_words=self._lora.max_words(rows),
        )

    # ==== graphs ====

    def _graph_shape(self, size: int, has_lora: bool) -> StepShape:
        words = self._lora.max_words(size) if has_lora else 0
        return StepShape(size, size, size, self._capacity(size), words)

    def _fill_padding(self, size: int, has_lora: bool) -> None:
        """Fill in padding rows, on which kernels can be compiled and captured."""
        words = self._lora_words(np.zeros(size, np.int32)) if has_lora else _NO_WORDS
        numbers = StepNumbers((), (), {}, words, _NO_WORDS)
        self._buffers.fill_decodes(self._shapes[size, has_lora], (), numbers)

    def _decode(self, size: int, has_lora: bool) -> None:
        """Run the work that a graph records."""
        self._forward(self._views[size, has_lora], self._hidden[:size], has_lora)

    # ==== both ====

    def _forward(self, inputs: StepInputs, out: Tensor, has_lora: bool) -> None:
        is_cut = len(out) < len(inputs.token_ids)
        self._buffers.resolve(inputs)
        lora = output_lora = None
        if has_lora:
            lora = self._lora.batch(len(inputs.token_ids), inputs.lora_words)
        if has_lora and is_cut:
            output_lora = self._lora.batch(len(inputs.output_rows), inputs.output_lora_words)
        self._model.forward(inputs, lora, output_lora, out=out)

    def _views_of(self, shape: StepShape) -> StepInputs:
        return self._buffers.views(shape, self._limits.max_model_len)

    def _capacity(self, num_decodes: int, num_tiles: int = 0) -> PositionsCapacity:
        return PositionsCapacity(
            num_decodes=num_decodes,
            num_prefills=0,
            table_width=self._limits.table_width,
            num_tiles=num_tiles,
            tile_tokens=self._tile_tokens,
        )

    def _lora_words(self, row_slots: Numbers) -> Numbers:
        return self._lora.plan(row_slots.tolist())


_NO_WORDS: Numbers = np.zeros(0, np.int32)


def _row_slots(requests: Sequence[ScheduledRequest], num_rows: int) -> Numbers:
    """List the adapter slots of the requests' rows, then 0 for the padding rows."""
    counts = [len(r.token_ids) for r in requests]
    slots = np.zeros(num_rows, np.int32)
    slots[: sum(counts)] = np.repeat([r.adapter_slot for r in requests], counts)
    row = 0
    for request, count in zip(requests, counts, strict=True):
        if request.num_base_rows:
            slots[row : row + request.num_base_rows] = 0
        row += count
    return slots
