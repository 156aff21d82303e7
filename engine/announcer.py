"""Announcer: say beforehand what may take long, to people as bars and to a callback as words."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

# Seconds without another word: for compilers, which say nothing while they work.
COMPILE_PATIENCE_S = 1800.0

# What comes now, and how many seconds it may take without another word; None: as usual.
Announce = Callable[[str, float | None], None]


def _to_nobody(work: str, patience_s: float | None) -> None:
    pass


class Announcer:
    """Belongs to one thread. Without arguments it is silent."""

    def __init__(self, announce: Announce = _to_nobody, *, shows_bars: bool = False) -> None:
        self._announce = announce
        self._shows_bars = shows_bars

    def announce(self, work: str, patience_s: float | None = None) -> None:
        self._announce(work, patience_s)

    def through(
        self, items: Sequence[T], work: str, unit: str, patience_s: float | None = None
    ) -> Iterator[T]:
        """Yield the items, and announce each one before it."""
        bar = tqdm(items, work, unit=unit, disable=not self._shows_bars)
        for number, item in enumerate(bar, 1):
            self.announce(f"{work}, {unit} {number} of {len(items)}", patience_s)
            yield item


SILENT = Announcer()
