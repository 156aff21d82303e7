"""DeviceAdapterBank: adapters on a CUDA device, and mixed batches over them by Triton kernels.

The bank writes the place of each adapter to tables; others decide the places and when bytes are
copied. Everything that a kernel reads has a fixed address, so that a captured graph serves any
adapters: a load, a move or an eviction only changes numbers in these tables. All writes are ordered
by the current stream.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.cuda.extent import UNIT_BYTES, AdapterExtent, move_bytes
from engine.backends.cuda.head import WIDTH_STEP, HeadBatch, head_batch, to_device
from engine.backends.cuda.places import HEAD, ModelPlaces
from engine.backends.cuda.site_table import SiteTable
from engine.backends.cuda.triton import launch, lora
from engine.backends.cuda.triton.lora import KindLaunch, LoraMemory
from engine.backends.cuda.triton.lora_work import Words, WorkShape, build_words, rounded_rows
from engine.backends.cuda.triton.own import OwnWeights

MOVE_BYTES = 4 * 2**20  # per copy, if an adapter is moved by less than its size


class DeviceAdapterBank:
    """Holds adapters in slots 1 to `max_slots`, with their bytes in `arena` uint8 [bytes]."""

    def __init__(
        self,
        arena: Tensor,
        places: ModelPlaces,
        dtype: torch.dtype,
        *,
        max_slots: int,
        max_rows: int,
        max_adapters: int | None = None,  # per batch; None: max_slots
        max_lora_rank: int = 256,  # per module
        num_processors: int | None = None,  # None: those of the device
    ) -> None:
        self.arena = arena
        self._places = places
        self._sites, self._table = tuple(places.sites), SiteTable(places, max_lora_rank)
        self._dtype, self._max_slots, self._max_rows = dtype, max_slots, max_rows
        self._max_adapters = min(max_adapters or max_slots, max_slots)
        self._num_processors = num_processors or launch.num_processors(arena.device)
        self._extents: dict[int, tuple[AdapterExtent, int]] = {}  # by slot, with its offset
        self._ranks = np.zeros((len(self._table.kinds), max_slots + 1), np.int32)
        self._affine = np.zeros(self._ranks.shape, np.bool_)
        self._owns = np.zeros(max_slots + 1, np.bool_)  # norms or an embedding
        self._last_plan: tuple[Words, Words] | None = None  # the rows' slots and their work list
        self._allocate([self._shape(rows) for rows in self.row_capacities])

    def _allocate(self, shapes: list[WorkShape]) -> None:
        device = self.arena.device
        shape = self._max_slots + 1, self._table.num_records, self._table.record_words
        table = torch.zeros(shape, dtype=torch.int32, device=device)
        self._memory = LoraMemory.of(self.arena, self._dtype, table)
        plane_words = max(shape.plane_words for shape in shapes)
        self._planes = torch.empty(2, plane_words, device=device)  # by parity of the site
        self._scratch = torch.empty(
            min(MOVE_BYTES, self.arena.numel()), dtype=torch.uint8, device=device
        )
        self._launches = {
            shape.max_rows: [
                KindLaunch.make(shape, kind, self._table.max_slices, self._dtype, device)
                for kind in range(len(shape.kinds))
            ]
            for shape in shapes
        }

    # ---- residency ----

    def place(self, slot: int, offset_bytes: int, extent: AdapterExtent) -> None:
        """Note that `slot`'s adapter lies at `arena[offset_bytes:]`, or will before it is used.

        Raises ValueError if the slot is taken, or the adapter does not fit the arena or the sites.
        """
        self._check_slot(slot, is_placed=False)
        self._check_place(offset_bytes, extent)
        if extent.dtype not in (self._dtype, None):
            raise ValueError(
                f"adapter {extent.digest}: factors are {extent.dtype}; "
                f"only {self._dtype} is allowed"
            )
        self._table.check(extent)
        _write(self._memory.table[slot], self._table.records(offset_bytes, extent))
        self._ranks[:, slot] = self._table.ranks(extent)
        self._affine[:, slot] = self._table.affine(extent)
        self._owns[slot] = bool(extent.norms) or extent.embedding is not None
        self._extents[slot] = extent, offset_bytes

    def move(self, slot: int, offset_bytes: int) -> None:
        """Move an adapter's bytes by any distance and note the place. Its plans stay valid."""
        self._check_slot(slot, is_placed=True)
        extent, source = self._extents[slot]
        self._check_place(offset_bytes, extent)
        move_bytes(self.arena, source, offset_bytes, extent.nbytes, self._scratch)
        units = np.array([offset_bytes // UNIT_BYTES], np.int32)
        _write(self._memory.table[slot, 0, :1], units)
        self._extents[slot] = extent, offset_bytes

    def evict(self, slot: int) -> None:
        """Free a slot. Writes nothing: steps that were launched with the adapter may still run."""
        self._extents.pop(slot, None)
        self._last_plan = None

    # ---- batches ----

    @property
    def row_capacities(self) -> tuple[int, ...]:
        """Row counts up to which batches share kernels; the last one holds `max_rows`."""
        first, last = rounded_rows(1), rounded_rows(self._max_rows)
        return tuple(first << i for i in range((last // first).bit_length()))

    def max_words(self, num_rows: int) -> int:
        """Upper bound on the work list of any batch of up to `num_rows` rows.

        Small batches may need more words, as their tiles are smaller.
        """
        sizes = {min(capacity, num_rows) for capacity in self.row_capacities}
        return max(self._shape(rows).max_words(rows) for rows in sizes)

    def plan(self, row_slots: Sequence[int]) -> Words:
        """Make the work list, on the host: row i has the adapter in `row_slots[i]`, 0 for none.

        Raises ValueError for too many rows or adapters, and for an empty slot.
        """
        slots = np.asarray(row_slots, np.int32)
        if self._last_plan is not None and np.array_equal(slots, self._last_plan[0]):
            return self._last_plan[1]  # a decode step with the same slots as the last one
        if slots.size > self._max_rows:
            raise ValueError(f"a batch of {slots.size} rows; at most {self._max_rows} are allowed")
        used = set(slots.tolist()) - {0}
        for slot in sorted(used):
            self._check_slot(slot, is_placed=True)
        if len(used) > self._max_adapters:
            raise ValueError(
                f"a batch with {len(used)} adapters; at most {self._max_adapters} are allowed"
            )
        shape = self._shape(slots.size)
        words = build_words(shape, slots, self._ranks, self._affine, self._owns)
        self._last_plan = slots.copy(), words
        return words

    def batch(self, num_rows: int, words: Tensor) -> "TritonLora":
        """Make a batch of the plan that is in `words`, on the device, when a kernel runs.

        The plan's rows must round up to the same value of `row_capacities` as `num_rows`. Zeros
        are a plan without adapters. Batches share the planes, so only one may run at a time.
        """
        launches = self._launches[self._shape(num_rows).max_rows]
        return TritonLora(self._table, launches, self._memory, words, self._planes)

    def head(self, row_slots: Sequence[int]) -> HeadBatch | None:
        """Return what the adapters of these rows change of their logits, None for nothing."""
        slots = np.asarray(row_slots, np.int32)
        used = [self._extents[slot][0] for slot in set(slots.tolist()) - {0}]
        if all(extent.head is None for extent in used):
            return None
        lora = None
        if any(HEAD in extent.sites for extent in used):
            lora = self.batch(slots.size, to_device(self.plan(row_slots), self.arena.device))
        return head_batch(slots, self._extents, self.arena, self._places.vocab_size, lora)

    def warm_up(self) -> None:
        """Compile every kernel that a batch may need, without changing any result."""
        num_words = self.max_words(self._max_rows)
        words = torch.zeros(num_words, dtype=torch.int32, device=self.arena.device)
        for rows in self.row_capacities:
            lora = self.batch(rows, words)
            for number, kind in enumerate(self._table.kinds):
                site = self._sites[self._table.kind_of.index(number)]
                x = self._memory.arena.new_zeros(1, kind.in_features)
                width = sum(kind.out_features)
                y = self._memory.arena.new_zeros(1, width)
                if (site.layer, site.site) == HEAD:
                    wide = -(-width // WIDTH_STEP) * WIDTH_STEP
                    lora.add(*HEAD, x, torch.zeros(1, wide, device=x.device)[:, :width])
                    y = y.float()
                lora.add(site.layer, site.site, x, y)

    def _shape(self, num_rows: int) -> WorkShape:
        return WorkShape(
            kinds=self._table.kinds,
            max_rows=rounded_rows(num_rows),
            max_adapters=self._max_adapters,
            max_lora_rank=self._table.max_lora_rank,
            num_processors=self._num_processors,
        )

    def _check_slot(self, slot: int, *, is_placed: bool) -> None:
        if not 1 <= slot <= self._max_slots:
            raise ValueError(f"adapter slot {slot}; only 1 to {self._max_slots} are allowed")
        if (slot in self._extents) != is_placed:
            raise ValueError(f"adapter slot {slot} holds {'no' if is_placed else 'an'} adapter")

    def _check_place(self, offset_bytes: int, extent: AdapterExtent) -> None:
        last = self.arena.numel() - extent.nbytes
        if offset_bytes % UNIT_BYTES or not 0 <= offset_bytes <= last:
            raise ValueError(
                f"adapter {extent.digest} at byte {offset_bytes}; only multiples of {UNIT_BYTES} "
                f"from 0 to {last} are allowed"
            )


class TritonLora:
    """A LoraBatch, also for graph capture: launches do not depend on the plan in the buffer."""

    def __init__(
        self,
        table: SiteTable,
        launches: list[KindLaunch],
        memory: LoraMemory,
        words: Tensor,
        planes: Tensor,
    ) -> None:
        self._table, self._launches = table, launches
        self._memory, self._words, self._planes = memory, words, planes.unbind()
        self.own_weights = None
        if table.norms_at:
            self.own_weights = OwnWeights(memory, words, table.norms_at, table.embedding_at)

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """Apply each row's adapter to y [N, out] in place, as SiteWeights says, for x [N, in]."""
        self.shrink(layer, site, x)
        self.expand(layer, site, y)

    def shrink(self, layer: int, site: str, x: Tensor) -> None:
        """Compute the first half, which needs no y and may run concurrently with the base layer.

        Two sites may be computed at once: neighbours in the decoder's order use separate planes.
        """
        number = self._table.number[layer, site]
        launch = self._launches[self._table.kind_of[number]]
        lora.shrink(launch, self._memory, self._words, self._planes[number % 2], number, x)

    def expand(self, layer: int, site: str, y: Tensor) -> None:
        """Compute the second half: y = y * scale + shift + the planes @ B."""
        number = self._table.number[layer, site]
        launch = self._launches[self._table.kind_of[number]]
        lora.expand(launch, self._memory, self._words, self._planes[number % 2], number, y)


def _write(buffer: Tensor, values: NDArray[np.int32]) -> None:
    """Copy values through memory that torch's allocator keeps until the stream has read it."""
    source = torch.from_numpy(values)
    buffer.copy_(source.pin_memory() if buffer.is_cuda else source, non_blocking=True)
