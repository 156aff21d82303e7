"""Popularity: which adapters have been used often lately, so that they outlive those used once.

Each use counts one, and half of that after every `half_life`, in whatever unit the times are (LRFU;
Lee et al. 2001). What an adapter counts now is the same as a single use at a later time, which
does not change by waiting: its `worth`. Things are therefore evicted in the order of a time, just
as by the last use; an adapter that was used once has the time of that use.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import exp2, log2

HALF_LIFE_STEPS = 2**15  # on the device: some minutes of steady work
HALF_LIFE_REQUESTS = 2**13  # in host memory
MAX_KNOWN = 4096  # adapters, those in memory included; beyond it the least worthy are forgotten


class Popularity:
    """Counts uses; times must not decrease. What has been evicted is remembered, within a bound."""

    def __init__(self, half_life: int, max_known: int = MAX_KNOWN) -> None:
        self._half_life = half_life
        self._max_known = max_known
        self._worths: OrderedDict[str, float] = OrderedDict()  # the latest used last

    def use(self, key: str, now: int) -> None:
        known, half_life = self._worths, self._half_life
        before = known.pop(key, None)
        count = 1.0 if before is None else 1.0 + exp2(max((before - now) / half_life, -60.0))
        known[key] = now + half_life * log2(count)
        if len(known) > self._max_known:
            known.popitem(last=False)

    def worth(self, key: str) -> int:
        """Return the time of a single use that would count as much; 0 if it was never used."""
        return int(self._worths.get(key, 0.0))

    def as_they_go(self, digests: Iterable[str], stays: Callable[[str], bool]) -> list[str]:
        """Return adapters of host memory in the order in which they may go.

        First those that stay on the device, of which copies are in vain, the most worthy first: it
        is the last to leave the device. Then the others, that of least worth first.
        """
        ranked = [(stays(digest), self.worth(digest), digest) for digest in digests]
        copies = sorted([each for each in ranked if each[0]], key=lambda each: -each[1])
        others = sorted([each for each in ranked if not each[0]], key=lambda each: each[1])
        return [digest for _, _, digest in (*copies, *others)]
