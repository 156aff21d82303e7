"""Extents: places adapters in the arena, each in one piece, from its high end down.

Arithmetic only: `MemoryBudget` decides which adapters are placed, evicted and moved.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

EXTENT_ALIGNMENT = 256  # bytes; offsets and sizes are multiples of it


def extent_size(nbytes: int) -> int:
    """Bytes that an adapter takes in the arena: `nbytes`, rounded up to the alignment."""
    return max(-(-nbytes // EXTENT_ALIGNMENT), 1) * EXTENT_ALIGNMENT


class Extent(NamedTuple):
    """Bytes [start, end) of the arena."""

    start: int
    end: int
    digest: str

    @property
    def size(self) -> int:
        return self.end - self.start


class Shift(NamedTuple):
    """Moves an extent to a place that is disjoint from the old one."""

    digest: str
    source: int
    destination: int


class Extents:
    """Disjoint pieces of [0, top), the aligned part of the arena. All are above `bottom`.

    There may be thousands and planning tries many arrangements, so extents and gaps are sorted.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.top = memory_bytes // EXTENT_ALIGNMENT * EXTENT_ALIGNMENT
        self.used_bytes = 0
        self._by_digest: dict[str, Extent] = {}
        self._ordered: list[Extent] = []  # by their starts
        # (size, -end) of the gaps above the lowest extent: tightest first, of equals the highest
        self._gaps: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._by_digest)

    @property
    def bottom(self) -> int:
        return self._ordered[0].start if self._ordered else self.memory_bytes

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._by_digest)

    @property
    def is_packed(self) -> bool:
        """Whether the lowest extent fits into no gap."""
        return not self._ordered or self.gap_for(self._ordered[0].size) is None

    def offset(self, digest: str) -> int:
        return self._by_digest[digest].start

    def size(self, digest: str) -> int:
        return self._by_digest[digest].size

    def without(self, digests: Iterable[str]) -> "Extents":
        """Return a copy without these extents."""
        gone, copy = dict.fromkeys(digests), Extents(self.memory_bytes)
        if 2 * len(gone) > len(self._by_digest):  # those that stay are fewer
            for extent in self._by_digest.values():
                if extent.digest not in gone:
                    copy._add(extent)
            return copy
        copy.used_bytes, copy._by_digest = self.used_bytes, self._by_digest.copy()
        copy._ordered, copy._gaps = self._ordered.copy(), self._gaps.copy()
        for digest in gone:
            copy._remove(copy._by_digest[digest])
        return copy

    def gap_for(self, size: int) -> int | None:
        """Offset of an extent of this size at the high end of the tightest gap; None: no gap."""
        place = bisect_left(self._gaps, (size,))
        return -self._gaps[place][1] - size if place < len(self._gaps) else None

    def place(self, digest: str, size: int) -> int:
        """Place an extent in a gap, else below all others, at a negative offset if need be."""
        start = self.gap_for(size)
        if start is None:
            start = min(self.bottom, self.top) - size
        self._add(Extent(start, start + size, digest))
        return start

    def raise_bottom(self, target: int, is_movable: Callable[[str], bool]) -> list[Shift]:
        """Move the lowest extents up into gaps until `bottom` reaches `target` or no gap fits.

        Terminates, because every move raises an extent.
        """
        shifts: list[Shift] = []
        while self.bottom < min(target, self.top):
            lowest = self._ordered[0]
            start = self.gap_for(lowest.size)
            if start is None or not is_movable(lowest.digest):
                break
            self._remove(lowest)
            self._add(Extent(start, start + lowest.size, lowest.digest))
            shifts.append(Shift(lowest.digest, lowest.start, start))
        return shifts

    def check_integrity(self) -> None:
        """Raise AssertionError unless all are aligned, disjoint and inside the arena."""
        ordered = sorted(self._by_digest.values())
        for extent in ordered:
            assert 0 <= extent.start < extent.end <= self.top, f"{extent} is outside the arena"
            assert extent.start % EXTENT_ALIGNMENT == extent.end % EXTENT_ALIGNMENT == 0
        for lower, upper in pairwise(ordered):
            assert lower.end <= upper.start, f"{lower} and {upper} overlap"
        ends = [*(extent.start for extent in ordered[1:]), self.top]
        gaps = [(end - e.end, -end) for e, end in zip(ordered, ends, strict=False) if e.end < end]
        assert self._ordered == ordered and self._gaps == sorted(gaps)
        assert self.used_bytes == sum(extent.size for extent in ordered)

    def _add(self, extent: Extent) -> None:
        place = bisect_left(self._ordered, extent)
        before, after = self._around(place, place)
        if before is not None:
            self._close(before, after)
            self._open(before, extent.start)
        self._open(extent.end, after)
        self._ordered.insert(place, extent)
        self._by_digest[extent.digest] = extent
        self.used_bytes += extent.size

    def _remove(self, extent: Extent) -> None:
        place = bisect_left(self._ordered, extent)
        before, after = self._around(place, place + 1)
        self._close(extent.end, after)
        if before is not None:
            self._close(before, extent.start)
            self._open(before, after)
        del self._ordered[place], self._by_digest[extent.digest]
        self.used_bytes -= extent.size

    def _around(self, first: int, last: int) -> tuple[int | None, int]:
        """End of the extent before index `first` (None if first) and start of index `last`."""
        before = self._ordered[first - 1].end if first else None
        return before, self._ordered[last].start if last < len(self._ordered) else self.top

    def _open(self, start: int, end: int) -> None:
        if start < end:
            insort(self._gaps, (end - start, -end))

    def _close(self, start: int, end: int) -> None:
        if start < end:
            del self._gaps[bisect_left(self._gaps, (end - start, -end))]
