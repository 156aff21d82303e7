"""AdapterCopies: copies adapters to the device, moves them there and evicts them.

The scheduler decides where an adapter lies in the arena; this carries it out. Copies run on a
second stream, concurrently with the steps. They begin after the last launched step, which may still
read what lay in their place, and what later takes their place waits for them; the host never does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.backends.cuda.extent import AdapterExtent, extent_nbytes, pack_extent
from engine.backends.cuda.streams import Device, Event
from engine.lora.weights import LoraWeights
from engine.scheduler.batch import AdapterLoad, BlockCopy, Move, ScheduledBatch

# A power of two, to which torch rounds pinned memory up: adapters of all sizes reuse the same
# pieces, and no single pinning call or copy is long enough to delay a step's own ones
PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in host memory, in the layout that it has on the device."""

    extent: AdapterExtent
    pieces: tuple[Tensor, ...]  # uint8, pinned, one after another

    @property
    def nbytes(self) -> int:
        return self.extent.nbytes


def pack_adapter(weights: LoraWeights, device: Device) -> PackedAdapter:
    """Pack an adapter; called in the host cache's threads. The weights themselves are not kept."""
    whole = torch.zeros(extent_nbytes(weights), dtype=torch.uint8)
    extent = pack_extent(weights, whole)
    parts = whole.split(PIECE_BYTES)
    return PackedAdapter(extent, tuple(device.pinned(len(part)).copy_(part) for part in parts))


def copy_packed(device: Device, packed: PackedAdapter, target: Tensor) -> None:
    """Copy to device memory, uint8 [nbytes], with `Device.copy` for each piece."""
    start = 0
    for piece in packed.pieces:
        device.copy(target[start : start + len(piece)], piece)
        start += len(piece)


class AdapterTable(Protocol):
    """Holds the place of each slot's adapter for kernels. Written on the main stream."""

    def place(self, slot: int, offset_bytes: int, extent: AdapterExtent) -> None:
        """Note the place of an adapter; its bytes must be there before it is used."""
        ...

    def move(self, slot: int, offset_bytes: int) -> None:
        """Move an adapter and its bytes."""
        ...

    def evict(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Load:
    digest: str
    event: Event
    source: PackedAdapter  # kept until it has been read, even if the host cache drops it


class AdapterCopies:
    """Carries out evictions, moves and loads of a batch, in this order."""

    def __init__(
        self,
        device: Device,
        arena: Tensor,
        block_bytes: int,
        table: AdapterTable,
        host_adapter: Callable[[str], PackedAdapter],
    ) -> None:
        self._device = device
        self._arena = arena  # uint8, the scheduler's memory
        num_blocks = arena.numel() // block_bytes
        self._blocks = arena[: num_blocks * block_bytes].view(num_blocks, block_bytes)
        self._table = table
        self._host_adapter = host_adapter
        self._loads: dict[int, _Load] = {}  # by slot

    def apply(self, batch: ScheduledBatch) -> None:
        for slot in batch.adapter_evictions:
            self._settle(slot)
            self._loads.pop(slot, None)
            self._table.evict(slot)
        for move in batch.moves:
            self._move(move)
        if batch.adapter_loads:
            self._load(batch.adapter_loads)

    def arrived(self) -> list[str]:
        """Return digests whose copies have ended since the last call; never waits."""
        ended = [slot for slot, load in self._loads.items() if load.event.is_done()]
        return [self._loads.pop(slot).digest for slot in ended]

    def _load(self, loads: Sequence[AdapterLoad]) -> None:
        """Start copies on the second stream. The main stream's table is written at once: it is read
        no earlier than the adapter."""
        sources = [self._host_adapter(load.digest) for load in loads]
        with self._device.side(self._device.record()):
            for load, packed in zip(loads, sources, strict=True):
                assert packed.nbytes == load.nbytes, "the scheduler was told another size"
                target = self._arena[load.offset_bytes : load.offset_bytes + load.nbytes]
                copy_packed(self._device, packed, target)
                self._loads[load.slot] = _Load(load.digest, self._device.record(), packed)
        for load, packed in zip(loads, sources, strict=True):
            self._table.place(load.slot, load.offset_bytes, packed.extent)

    def _move(self, move: Move) -> None:
        if isinstance(move, BlockCopy):
            self._blocks[move.destination].copy_(self._blocks[move.source])
            return
        self._settle(move.slot)
        self._table.move(move.slot, move.destination_bytes)

    def _settle(self, slot: int) -> None:
        """Make the main stream wait for a copy to this slot's memory that is under way."""
        load = self._loads.get(slot)
        if load is not None:
            self._device.main_waits(load.event)
