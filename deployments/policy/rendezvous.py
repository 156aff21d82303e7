"""Weighted rendezvous hashing: for each key an order of the replicas, the same for every caller.

Each replica has, for each key, a number that depends on the two names alone; the order is by these
numbers. A replica that comes or goes therefore takes or leaves its own share of the keys and moves
no other (Thaler and Ravishankar 1998). A replica of twice the weight comes first for twice as many
keys (Schindelhauer and Schomaker 2005: -weight / ln(u), u uniform in (0, 1)).
"""

import hashlib
import math
from collections.abc import Sequence

MAX_KEYS = 20_000  # whose orders are remembered
_MASK = 2**64 - 1


class Rendezvous:
    """Orders of one set of replicas, remembered. Not thread-safe."""

    def __init__(self, weights: Sequence[tuple[str, float]] = ()) -> None:
        self.set_replicas(weights)

    def set_replicas(self, weights: Sequence[tuple[str, float]]) -> None:
        """Set the replicas and their weights, each above 0. The order given is of no effect."""
        self._replicas = [
            (name, rendezvous_number(name), weight) for name, weight in sorted(weights)
        ]
        self._orders: dict[str, list[str]] = {}

    def order(self, key: str) -> list[str]:
        """Return all replicas, the first one first. The caller must not change the list."""
        found = self._orders.get(key)
        if found is None:
            if len(self._orders) >= MAX_KEYS:
                del self._orders[next(iter(self._orders))]
            found = self._orders[key] = self._compute(key)
        return found

    def _compute(self, key: str) -> list[str]:
        mixed = rendezvous_number(key)
        scored = [(_score(mixed ^ own, weight), name) for name, own, weight in self._replicas]
        return [name for _, name in sorted(scored)]


def rendezvous_number(text: str) -> int:
    """Return a number of 64 bits that is the same for the same text in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _score(value: int, weight: float) -> float:
    """Exponentially distributed, with the mean 1 / weight: the least one wins."""
    return -math.log((_mix(value) + 1) / 2**64) / weight


def _mix(value: int) -> int:
    """Spread every bit of a 64-bit number over all of them (the finalizer of SplitMix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
