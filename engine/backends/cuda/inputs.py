"""Copies a step's numbers to the device: one packed copy from pinned memory to fixed places.

Every shape of step has its own layout in one buffer, so the views of a captured shape are always
the same memory. Tokens that the previous step sampled stay on the device, just in front of the
packed numbers, and a row's source is the index of its input token in all of these.

    [ sampled tokens of the last step   | this step's known tokens | sources | positions | ... ]
                                        ^ the copy begins here
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.cuda.packed_copies import ALIGNMENT, WORD_BYTES, PinnedRing, places
from engine.backends.cuda.positions import DevicePositions, PositionsCapacity, write_positions
from engine.backends.cuda.streams import Device
from engine.backends.rows import row_numbers
from engine.scheduler.batch import PENDING, ScheduledRequest

NO_SLOT = -1  # slot of a padding row: its keys and values are not stored

Numbers = NDArray[np.int32]
RequestKey = tuple[str, int, int]  # request_id, choice, life


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes that a step's layout has room for. All steps of one graph have the same shape."""

    num_rows: int
    num_outputs: int
    num_samples: int
    positions: PositionsCapacity
    num_lora_words: int = 0  # 0: no row has an adapter
    num_output_lora_words: int = 0
    num_words: int = field(init=False, compare=False)  # total copied

    def __post_init__(self) -> None:
        _, num_words = places([_size(shape) for shape in self.shapes().values()])
        object.__setattr__(self, "num_words", num_words)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all copied arrays, in their order in memory."""
        return {
            "known_tokens": (self.num_rows,),
            "sources": (self.num_rows,),
            "positions": (self.num_rows,),
            "slot_mapping": (self.num_rows,),
            "output_rows": (self.num_outputs,),
            "sample_rows": (self.num_samples,),
            **self.positions.shapes(),
            "lora_words": (self.num_lora_words,),
            "output_lora_words": (self.num_output_lora_words,),
        }


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views of the device's buffers, int32. Padding rows: token 0, position 0, slot NO_SLOT."""

    token_ids: Tensor  # [N], once `resolve` has run
    sources: Tensor  # [N]: index in the buffer of each row's token
    positions: Tensor  # [N]
    slot_mapping: Tensor  # [N]: block * block_size + offset
    output_rows: Tensor  # [M]: rows whose hidden states are needed
    sample_rows: Tensor  # [S]: output rows whose logits are sampled from
    attention: DevicePositions
    lora_words: Tensor  # the adapters of all rows
    output_lora_words: Tensor  # the adapters of the output rows


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """The numbers that, with the requests, make up a step's inputs."""

    output_rows: Sequence[int]
    sample_rows: Sequence[int]
    sampled_before: Mapping[RequestKey, int]  # indexes into the last step's sampled tokens
    lora_words: Numbers
    output_lora_words: Numbers


class InputBuffers:
    """Fixed device memory for the inputs of any step up to a size."""

    def __init__(
        self, device: Device, *, max_samples: int, max_rows: int, max_words: int, block_size: int
    ) -> None:
        self._device = device
        self._block_size = block_size
        self._max_words = max_words
        self._start = -(-max_samples // ALIGNMENT) * ALIGNMENT  # where the copied numbers start
        self._words = torch.zeros(
            self._start + max_words, dtype=torch.int32, device=device.torch_device
        )
        self._token_ids = torch.zeros(max_rows, dtype=torch.int32, device=device.torch_device)
        self._ring = PinnedRing(device)
        self._pinned: dict[int, _Pinned] = {}  # by turn of the ring
        self.sampled = self._words[:max_samples]

    def views(self, shape: StepShape, max_context_len: int) -> StepInputs:
        """Return the inputs of this shape, in the same memory for every call."""
        self._check(shape)
        parts: dict[str, Any] = _cut(self._words[self._start :], shape)
        capacity = shape.positions
        return StepInputs(
            token_ids=self._token_ids[: shape.num_rows],
            **{name: parts[name] for name in _OWN_PARTS},
            attention=DevicePositions(
                **{name: parts[name] for name in capacity.shapes()},
                num_decodes=capacity.num_decodes,
                tile_tokens=capacity.tile_tokens,
                max_context_len=max_context_len,
            ),
        )

    def resolve(self, inputs: StepInputs) -> None:
        """Fill `token_ids`, on the device; part of a captured graph."""
        torch.index_select(self._words, 0, inputs.sources, out=inputs.token_ids)

    def fill(
        self, shape: StepShape, requests: Sequence[ScheduledRequest], numbers: StepNumbers
    ) -> None:
        """Copy these requests' numbers to the memory that `views` of this shape returns."""
        self._check(shape)
        pinned = self._take()
        parts = {name: part.numpy() for name, part in _cut(pinned.words, shape).items()}
        token_ids, positions, slots = row_numbers(requests, self._block_size)
        self._write_tokens(parts, requests, token_ids, numbers.sampled_before)
        _write(parts["positions"], positions, 0)
        _write(parts["slot_mapping"], slots, NO_SLOT)
        write_positions(parts, requests, shape.positions)
        pinned.tables = None
        self._send(parts, pinned, shape, numbers)

    def fill_decodes(
        self, shape: StepShape, requests: Sequence[ScheduledRequest], numbers: StepNumbers
    ) -> None:
        """`fill` for one token each, faster for a shape that recurs: what the pinned memory holds
        from the last time is not written again."""
        pinned, size = self._take(), self._block_size
        if shape not in pinned.parts:
            self._check(shape)
            cut = _cut(pinned.words, shape)
            pinned.parts[shape] = {name: part.numpy() for name, part in cut.items()}
        parts = pinned.parts[shape]
        token_ids = [r.token_ids[0] for r in requests]
        self._write_tokens(parts, requests, token_ids, numbers.sampled_before)
        starts = np.array([r.start for r in requests], np.int32)
        blocks = np.array([r.block_table[r.start // size] for r in requests], np.int32)
        _write(parts["positions"], starts, 0)
        _write(parts["slot_mapping"], blocks * size + starts % size, NO_SLOT)
        _write(parts["context_lens"], starts + 1, 0)
        parts["cu_seqlens_q"][:] = np.arange(shape.num_rows + 1)
        pinned.write_tables(shape, [r.block_table for r in requests])
        self._send(parts, pinned, shape, numbers)

    def _take(self) -> "_Pinned":
        buffer = self._ring.take(self._max_words * WORD_BYTES)
        if self._ring.turn not in self._pinned:
            self._pinned[self._ring.turn] = _Pinned(buffer.view(torch.int32))
        return self._pinned[self._ring.turn]

    def _send(
        self,
        parts: dict[str, Numbers],
        pinned: "_Pinned",
        shape: StepShape,
        numbers: StepNumbers,
    ) -> None:
        _write(parts["output_rows"], numbers.output_rows, 0)
        _write(parts["sample_rows"], numbers.sample_rows, 0)
        _write(parts["lora_words"], numbers.lora_words, 0)
        _write(parts["output_lora_words"], numbers.output_lora_words, 0)
        count = shape.num_words
        self._device.copy(self._words[self._start : self._start + count], pinned.words[:count])
        self._ring.sent()

    def _write_tokens(
        self,
        parts: dict[str, Numbers],
        requests: Sequence[ScheduledRequest],
        token_ids: list[int],
        sampled_before: Mapping[RequestKey, int],
    ) -> None:
        sources = parts["sources"]
        sources[:] = np.arange(self._start, self._start + len(sources))
        _write(parts["known_tokens"], token_ids, 0)
        if PENDING in token_ids:
            np.maximum(parts["known_tokens"], 0, out=parts["known_tokens"])
            self._point_at_sampled(sources, requests, sampled_before)

    def _point_at_sampled(
        self,
        sources: Numbers,
        requests: Sequence[ScheduledRequest],
        sampled_before: Mapping[RequestKey, int],
    ) -> None:
        """If the step before failed, its token is missing; the row's result is discarded anyway."""
        row = -1
        for request in requests:
            row += len(request.token_ids)
            if request.token_ids[-1] == PENDING:
                sources[row] = sampled_before.get(request_key(request), sources[row])

    def _check(self, shape: StepShape) -> None:
        if shape.num_rows > len(self._token_ids) or shape.num_words > self._max_words:
            raise ValueError(
                f"a step of {shape.num_rows} rows and {shape.num_words} words: there is room for "
                f"{len(self._token_ids)} and {self._max_words}"
            )


class _Pinned:
    """One of the pinned buffers, with its known content."""

    def __init__(self, words: Tensor) -> None:
        self.words = words
        self.parts: dict[StepShape, dict[str, Numbers]] = {}
        self.tables: tuple[StepShape, list[tuple[int, ...]]] | None = None

    def write_tables(self, shape: StepShape, tables: list[tuple[int, ...]]) -> None:
        """Write the tables that changed: few do from step to step."""
        known = self.tables[1] if self.tables and self.tables[0] == shape else []
        rows = self.parts[shape]["block_tables"]
        for i, table in enumerate(tables):
            if i >= len(known) or known[i] != table:
                rows[i, : len(table)] = np.frombuffer(array("i", table), np.int32)
        self.tables = shape, tables + known[len(tables) :]


def _write(part: Numbers, values: Sequence[int] | Numbers, padding: int) -> None:
    part[: len(values)] = values
    part[len(values) :] = padding


def request_key(request: ScheduledRequest) -> RequestKey:
    return request.request_id, request.choice, request.life


_OWN_PARTS = (
    "sources",
    "positions",
    "slot_mapping",
    "output_rows",
    "sample_rows",
    "lora_words",
    "output_lora_words",
)


def _cut(words: Tensor, shape: StepShape) -> dict[str, Tensor]:
    shapes = shape.shapes()
    starts, _ = places([_size(s) for s in shapes.values()])
    return {
        name: words[start : start + _size(part)].view(part)
        for (name, part), start in zip(shapes.items(), starts, strict=True)
    }


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
