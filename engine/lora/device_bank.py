"""DeviceAdapterBank: adapters on a CUDA device, and the mixed batch over them by Triton kernels.

The bank writes where each adapter lies; who may lie where is decided elsewhere, and so is when its
bytes are copied. Everything that a kernel reads has a fixed address, so that a captured graph
serves any adapters: what a load, a move or an eviction changes are numbers in these tables. All
writes are ordered by the current stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.triton import lora
from engine.kernels.triton.lora import KindLaunch, LoraMemory
from engine.kernels.triton.lora_work import (
    SiteKind,
    Words,
    WorkShape,
    build_words,
    rounded_rows,
)
from engine.lora.extent import UNIT_BYTES, Extent, SiteExtent, move_bytes
from engine.lora.weights import Site
from engine.model.layers import LoraSite

WORDS = "lora_words"  # name of a plan's only array, and of its buffer
MOVE_BYTES = 4 * 2**20  # of an adapter that is moved by less than its size, at a time


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """A batch's work lists on the host: no longer than `DeviceAdapterBank.max_words` says."""

    num_rows: int
    words: Words

    @property
    def arrays(self) -> list[tuple[str, Words]]:
        """What has to be in `DeviceAdapterBank.buffers`, by name; the rest of a buffer is free."""
        return [(WORDS, self.words)]


class DeviceAdapterBank:
    """Adapters by slot, 1 to `max_slots`, in `arena` uint8 [bytes]: at most one per slot."""

    def __init__(
        self,
        arena: Tensor,
        sites: Sequence[LoraSite],
        dtype: torch.dtype,
        *,
        max_slots: int,
        max_rows: int,
        max_adapters: int | None = None,  # of one batch
        max_lora_rank: int = 256,  # of one module
        num_processors: int | None = None,  # None: those of the device
    ) -> None:
        device = arena.device
        self._sites = tuple(sites)
        kinds = [_kind(site) for site in sites]
        self._kinds = tuple(dict.fromkeys(kinds))
        self._kind_of = [self._kinds.index(kind) for kind in kinds]
        self._number = {(site.layer, site.site): i for i, site in enumerate(sites)}
        self._max_slices = max(len(kind.out_features) for kind in self._kinds)
        self._max_slots, self._max_rows = max_slots, max_rows
        self._max_adapters = min(max_adapters or max_slots, max_slots)
        self._max_lora_rank = max_lora_rank
        self._num_processors = num_processors or _num_processors(device)
        self._extents: dict[int, tuple[Extent, int]] = {}  # by slot, with its offset
        self._last_plan: tuple[Words, LoraPlan] | None = None
        self._ranks = np.zeros((len(self._kinds), max_slots + 1), np.int32)

        self.arena = arena
        whole = arena.numel() // UNIT_BYTES * UNIT_BYTES
        record = lora.record_words(self._max_slices)
        shape = (max_slots + 1, 1 + len(self._sites), record)
        self._memory = LoraMemory(
            arena[:whole].view(dtype), torch.zeros(shape, dtype=torch.int32, device=device)
        )
        shapes = [self._shape(rows) for rows in self.row_capacities]
        plane_words = max(shape.plane_words for shape in shapes)
        self._planes = torch.empty(2, plane_words, device=device)  # by parity of the site
        num_words = max(self.max_words(min(s.max_rows, max_rows)) for s in shapes)
        self.buffers = {WORDS: torch.zeros(num_words, dtype=torch.int32, device=device)}
        self._scratch = torch.empty(
            min(MOVE_BYTES, arena.numel()), dtype=torch.uint8, device=device
        )
        self._launches = {
            s.max_rows: [
                KindLaunch.make(s, i, self._max_slices, dtype, device)
                for i in range(len(self._kinds))
            ]
            for s in shapes
        }

    # ---- residency ----

    def place(self, slot: int, offset_bytes: int, extent: Extent) -> None:
        """The adapter in `slot` lies at `arena[offset_bytes:]`, or will before it is used."""
        self._check_slot(slot, is_placed=False)
        self._check_place(offset_bytes, extent)
        records = self._records(offset_bytes, extent)
        self._write(self._memory.table[slot], records)
        self._extents[slot] = extent, offset_bytes
        self._last_plan = None
        self._ranks[:, slot] = 0
        for key, site in extent.sites.items():
            kind = self._kind_of[self._number[key]]
            self._ranks[kind, slot] = max(self._ranks[kind, slot], site.lora_rank)

    def move(self, slot: int, offset_bytes: int) -> None:
        """Moves its bytes, by any distance, and its place."""
        self._check_slot(slot, is_placed=True)
        extent, source = self._extents[slot]
        self._check_place(offset_bytes, extent)
        move_bytes(self.arena, source, offset_bytes, extent.nbytes, self._scratch)
        units = np.array([offset_bytes // UNIT_BYTES], np.int32)
        self._write(self._memory.table[slot, 0, :1], units)
        self._extents[slot] = extent, offset_bytes

    def evict(self, slot: int) -> None:
        """Batches that were planned with it may still run."""
        self._extents.pop(slot, None)
        self._last_plan = None

    # ---- batches ----

    @property
    def row_capacities(self) -> tuple[int, ...]:
        """Batches of up to so many rows share their kernels; the last holds `max_rows`."""
        first, last = rounded_rows(1), rounded_rows(self._max_rows)
        return tuple(first << i for i in range((last // first).bit_length()))

    def max_words(self, num_rows: int) -> int:
        """Longest `LoraPlan.words` of a batch of this many rows."""
        return self._shape(num_rows).max_words(num_rows)

    def plan(self, row_slots: Sequence[int]) -> LoraPlan:
        """Row i of the batch has the adapter in `row_slots[i]`, 0 for none.

        Good until an adapter in it is evicted; a move does not matter. Raises ValueError for too
        many rows or adapters and for an empty slot.
        """
        slots = np.asarray(row_slots, np.int32)
        if self._last_plan is not None and np.array_equal(slots, self._last_plan[0]):
            return self._last_plan[1]  # a decode step like the one before
        if len(slots) > self._max_rows:
            raise ValueError(f"a batch of {len(slots)} rows; at most {self._max_rows} are allowed")
        used = set(slots.tolist()) - {0}
        for slot in sorted(used):
            self._check_slot(slot, is_placed=True)
        if len(used) > self._max_adapters:
            raise ValueError(
                f"a batch with {len(used)} adapters; at most {self._max_adapters} are allowed"
            )
        plan = LoraPlan(len(slots), build_words(self._shape(len(slots)), slots, self._ranks))
        self._last_plan = slots.copy(), plan
        return plan

    def batch(self, num_rows: int, words: Tensor | None = None) -> "TritonLora":
        """The adapters of whatever plan of up to `num_rows` rows is in `words`, the bank's own
        buffer by default. A plan must be of the same row capacity."""
        shape = self._shape(num_rows)
        return TritonLora(
            self._number,
            self._kind_of,
            self._launches[shape.max_rows],
            self._memory,
            self.buffers[WORDS] if words is None else words,
            self._planes,
        )

    def upload(self, plan: LoraPlan) -> "TritonLora":
        """Copies the plan into the bank's buffer, after what the stream still does with it."""
        self._write(self.buffers[WORDS][: plan.words.size], plan.words)
        return self.batch(plan.num_rows)

    def warm_up(self) -> None:
        """Compiles every kernel that a batch may need. Overwrites the bank's own plan."""
        for rows in self.row_capacities:
            self.buffers[WORDS].zero_()
            batch = self.batch(min(rows, self._max_rows))
            for kind_index, kind in enumerate(self._kinds):
                site = self._sites[self._kind_of.index(kind_index)]
                x, y = (
                    torch.empty(1, width, dtype=self._memory.arena.dtype, device=self.arena.device)
                    for width in (kind.in_features, sum(kind.out_features))
                )
                batch.add(site.layer, site.site, x, y)

    # ---- tables ----

    def _shape(self, num_rows: int) -> WorkShape:
        return WorkShape(
            self._kinds,
            rounded_rows(num_rows),
            self._max_adapters,
            self._max_lora_rank,
            self._num_processors,
        )

    def _records(self, offset_bytes: int, extent: Extent) -> NDArray[np.int32]:
        """A slot's rows of the table, as `engine.kernels.triton.lora` reads them."""
        records = np.zeros(self._memory.table.shape[1:], np.int32)
        records[0, 0] = offset_bytes // UNIT_BYTES
        for key, site in extent.sites.items():
            number = self._number[key]
            widths = self._kinds[self._kind_of[number]].out_features
            records[1 + number] = _record(site, widths, self._max_slices)
        return records

    def _write(self, buffer: Tensor, values: NDArray[np.int32]) -> None:
        """Through memory that the allocator keeps until the stream has read it."""
        source = torch.from_numpy(values)
        if buffer.is_cuda:
            source = source.pin_memory()
        buffer.copy_(source, non_blocking=True)

    def _check_slot(self, slot: int, *, is_placed: bool) -> None:
        if not 1 <= slot <= self._max_slots:
            raise ValueError(f"adapter slot {slot}; only 1 to {self._max_slots} are allowed")
        if (slot in self._extents) != is_placed:
            raise ValueError(f"adapter slot {slot} holds {'no' if is_placed else 'an'} adapter")

    def _check_place(self, offset_bytes: int, extent: Extent) -> None:
        last = self.arena.numel() - extent.nbytes
        if offset_bytes % UNIT_BYTES or not 0 <= offset_bytes <= last:
            raise ValueError(
                f"adapter {extent.digest} at byte {offset_bytes}; only multiples of {UNIT_BYTES} "
                f"from 0 to {last} are allowed"
            )
        if extent.dtype != self._memory.arena.dtype:
            raise ValueError(
                f"adapter {extent.digest}: factors are {extent.dtype}; "
                f"only {self._memory.arena.dtype} is allowed"
            )
        for key, site in extent.sites.items():
            self._check_site(key, site, extent.digest)

    def _check_site(self, key: Site, site: SiteExtent, digest: str) -> None:
        if key not in self._number:
            raise ValueError(f"adapter {digest}: {key} is no site of this model")
        kind = self._kinds[self._kind_of[self._number[key]]]
        if site.in_features != kind.in_features:
            raise ValueError(
                f"adapter {digest}: {key} has {site.in_features} inputs, not {kind.in_features}"
            )
        columns = accumulate(kind.out_features, initial=0)
        unknown = {(part.out0, part.out1) for part in site.slices} - set(pairwise(columns))
        if unknown:
            raise ValueError(
                f"adapter {digest}: {key} has slices of {kind.out_features} outputs, "
                f"and no columns {min(unknown)}"
            )
        rank = max(part.r1 - part.r0 for part in site.slices)
        if rank > self._max_lora_rank:
            raise ValueError(
                f"adapter {digest}: lora_rank {rank} at {key}; "
                f"at most {self._max_lora_rank} is allowed"
            )


class TritonLora:
    """A LoraBatch, also for graph capture: the same launches whatever plan is in the buffer."""

    def __init__(
        self,
        number: dict[Site, int],
        kind_of: list[int],
        launches: list[KindLaunch],
        memory: LoraMemory,
        words: Tensor,
        planes: Tensor,
    ) -> None:
        self._number, self._kind_of, self._launches = number, kind_of, launches
        self._memory, self._words, self._planes = memory, words, planes

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """y [N, out] += x [N, in] @ A^T @ (scaling * B), in place, by each row's adapter."""
        self.shrink(layer, site, x)
        self.expand(layer, site, y)

    def shrink(self, layer: int, site: str, x: Tensor) -> None:
        """The first half, which needs no y and may run beside the base's multiplication.

        Two sites may be under way: neighbours in the decoder's order have planes of their own.
        """
        number = self._number[layer, site]
        launch = self._launches[self._kind_of[number]]
        lora.shrink(launch, self._memory, self._words, self._planes[number % 2], number, x)

    def expand(self, layer: int, site: str, y: Tensor) -> None:
        """The second half: y += the planes @ B."""
        number = self._number[layer, site]
        launch = self._launches[self._kind_of[number]]
        lora.expand(launch, self._memory, self._words, self._planes[number % 2], number, y)


def _kind(site: LoraSite) -> SiteKind:
    return SiteKind(site.in_features, tuple(part.out_features for part in site.slices))


def _record(site: SiteExtent, widths: tuple[int, ...], max_slices: int) -> list[int]:
    """Units to A and to each slice's B, then 0 and the end of each slice's ranks."""
    parts = {part.out0: part for part in site.slices}
    units, ends = [0] * max_slices, [0]
    for i, out0 in enumerate(accumulate(widths[:-1], initial=0)):
        part = parts.get(out0)
        units[i] = part.b_bytes // UNIT_BYTES if part else 0
        ends.append(part.r1 if part else ends[-1])
    assert ends == sorted(ends) and ends[-1] == site.lora_rank, "slices are out of order"
    ends += [ends[-1]] * (max_slices - len(widths))
    return [site.a_bytes // UNIT_BYTES, *units, *ends]


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
