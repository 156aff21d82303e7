"""FakeArena: models a device's arena as cells of CELL bytes that store labels of their content.

Performs the memory changes of a step in the batch's order, and asserts that moves and loads find
the expected content. A wrong plan shows as a cell with another label.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.scheduler.batch import AdapterLoad, AdapterMove, BlockCopy, Move

CELL = 128  # bytes


@dataclass(frozen=True)
class Garbage:
    """Label of memory that a failed step should have written."""


@dataclass
class AdapterExtent:
    digest: str
    offset_bytes: int
    nbytes: int
    label: object  # content of its cells

    def range(self, offset_bytes: int | None = None) -> range:
        start = (self.offset_bytes if offset_bytes is None else offset_bytes) // CELL
        return range(start, start + -(-self.nbytes // CELL))


class FakeArena:
    def __init__(
        self, memory_bytes: int, block_bytes: int, *, loads_are_immediate: bool = True
    ) -> None:
        assert block_bytes % CELL == 0
        self.cells: list[object] = [None] * (memory_bytes // CELL)
        self.extents: dict[int, AdapterExtent] = {}
        self.arriving: list[AdapterLoad] = []
        self.num_moved = {BlockCopy: 0, AdapterMove: 0}
        self._loads_are_immediate = loads_are_immediate
        self._block_cells = block_bytes // CELL

    def change(
        self,
        evictions: Iterable[int],
        moves: Iterable[Move],
        loads: Iterable[AdapterLoad],
        *,
        is_lost: bool = False,
    ) -> None:
        """Perform changes; with `is_lost`, all memory that they should write becomes garbage."""
        for slot in evictions:
            gone = self.extents.pop(slot)
            self.arriving = [load for load in self.arriving if load.digest != gone.digest]
        for move in moves:
            self.num_moved[type(move)] += 1
            if isinstance(move, BlockCopy):
                self._copy_block(move, is_lost)
            else:
                self._move_extent(move, is_lost)
        for load in loads:
            self._load(load, is_lost)

    def arrive(self, index: int = 0) -> str:
        """Complete a copy that has been in progress since its step; return its digest."""
        load = self.arriving.pop(index)
        extent = self.extents[load.slot]
        self._expect(extent)
        self._paint(extent, load.digest)
        return load.digest

    def adapter(self, slot: int) -> str | Garbage:
        """Return the adapter in a slot; all of it must have arrived, or be garbage."""
        if slot == 0:
            return ""
        extent = self.extents[slot]
        self._expect(extent)
        if isinstance(extent.label, Garbage):
            return extent.label
        assert extent.label == extent.digest, f"{extent} is used before it has arrived"
        return extent.digest

    def read(self, block: int, offset: int) -> object:
        return self.cells[block * self._block_cells + offset]

    def write(self, block: int, offset: int, value: object) -> None:
        self.cells[block * self._block_cells + offset] = value

    def check(self) -> None:
        """Assert that no extent has been overwritten."""
        for extent in self.extents.values():
            self._expect(extent)

    def _copy_block(self, copy: BlockCopy, is_lost: bool) -> None:
        size = self._block_cells
        source, destination = copy.source * size, copy.destination * size
        content = self.cells[source : source + size]
        self.cells[destination : destination + size] = [Garbage()] * size if is_lost else content

    def _move_extent(self, move: AdapterMove, is_lost: bool) -> None:
        extent = self.extents[move.slot]
        assert extent.nbytes == move.nbytes
        assert extent.label in (extent.digest, Garbage()), f"{extent} moves before it has arrived"
        assert not set(extent.range()) & set(extent.range(move.destination_bytes)), "overlaps"
        self._expect(extent)
        extent.offset_bytes = move.destination_bytes
        self._paint(extent, Garbage() if is_lost else extent.label)

    def _load(self, load: AdapterLoad, is_lost: bool) -> None:
        assert load.slot > 0 and load.slot not in self.extents, "loaded over a resident adapter"
        extent = AdapterExtent(load.digest, load.offset_bytes, load.nbytes, None)
        self.extents[load.slot] = extent
        if is_lost:
            self._paint(extent, Garbage())
        elif self._loads_are_immediate:
            self._paint(extent, load.digest)
        else:
            self._paint(extent, ("arriving", load.digest))
            self.arriving.append(load)

    def _paint(self, extent: AdapterExtent, label: object) -> None:
        extent.label = label
        for i in extent.range():
            self.cells[i] = label

    def _expect(self, extent: AdapterExtent) -> None:
        held = {self.cells[i] for i in extent.range()}
        assert held == {extent.label}, f"{extent} holds {held}"
