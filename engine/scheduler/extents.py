"""Extents: where adapters lie in the arena, each in one piece, hanging from its high end.

Arithmetic alone: who is there, who goes and who moves is `MemoryBudget`'s decision.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

EXTENT_ALIGNMENT = 256  # bytes; offsets and sizes are multiples of it


def extent_size(nbytes: int) -> int:
    """What an adapter takes of the arena."""
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
    """An extent's move to a place that is disjoint from where it was."""

    digest: str
    source: int
    destination: int


class Extents:
    """Disjoint pieces of [0, top), the aligned part of the arena. Below `bottom` there is none."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.top = memory_bytes // EXTENT_ALIGNMENT * EXTENT_ALIGNMENT
        self._by_digest: dict[str, Extent] = {}

    @property
    def bottom(self) -> int:
        return min((e.start for e in self._by_digest.values()), default=self.memory_bytes)

    @property
    def used_bytes(self) -> int:
        return sum(e.size for e in self._by_digest.values())

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._by_digest)

    @property
    def is_packed(self) -> bool:
        """Whether no gap takes the lowest extent."""
        lowest = min(self._by_digest.values(), default=None)
        return lowest is None or self.gap_for(lowest.size) is None

    def offset(self, digest: str) -> int:
        return self._by_digest[digest].start

    def size(self, digest: str) -> int:
        return self._by_digest[digest].size

    def without(self, digests: Iterable[str]) -> "Extents":
        """A copy that lacks these."""
        copy = Extents(self.memory_bytes)
        copy._by_digest = self._by_digest.copy()
        for digest in digests:
            del copy._by_digest[digest]
        return copy

    def gap_for(self, size: int) -> int | None:
        """Where an extent of this size ends up against the high end of the tightest gap."""
        gaps = [(end - start, -end) for start, end in self._gaps() if end - start >= size]
        return -min(gaps)[1] - size if gaps else None

    def place(self, digest: str, size: int) -> int:
        """Into a gap, else below all others: at a negative offset where that has no room."""
        start = self.gap_for(size)
        if start is None:
            start = min(self.bottom, self.top) - size
        self._by_digest[digest] = Extent(start, start + size, digest)
        return start

    def raise_bottom(self, target: int, is_movable: Callable[[str], bool]) -> list[Shift]:
        """Move lowest extents up into gaps until `bottom` is at `target`, or as near as they go.

        Ends because every move takes an extent up.
        """
        shifts: list[Shift] = []
        while self.bottom < min(target, self.top):
            lowest = min(self._by_digest.values())
            start = self.gap_for(lowest.size)
            if start is None or not is_movable(lowest.digest):
                break
            self._by_digest[lowest.digest] = Extent(start, start + lowest.size, lowest.digest)
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

    def _gaps(self) -> list[tuple[int, int]]:
        """Free pieces [start, end) above the lowest extent."""
        ordered = sorted(self._by_digest.values())
        ends = [*(extent.start for extent in ordered[1:]), self.top]
        starts = (extent.end for extent in ordered)
        return [(s, e) for s, e in zip(starts, ends, strict=False) if s < e]
