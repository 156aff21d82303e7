"""Demand: each adapter's share of the latest requests."""

import heapq
import math

HALF_LIFE_S = 30.0
MAX_KEYS = 10_000  # beyond it those of least demand are forgotten
_MOST = 1e12  # of a weight, before all are scaled down


class Demand:
    """Requests by key, each of half the weight after every `half_life_s`. Not thread-safe.

    Later requests get more weight instead of earlier ones less, so that nothing is touched twice.
    """

    def __init__(self, half_life_s: float = HALF_LIFE_S, max_keys: int = MAX_KEYS) -> None:
        self._rate = math.log(2) / half_life_s
        self._max_keys = max_keys
        self._began_s: float | None = None
        self._weights: dict[str, float] = {}
        self._total = 0.0

    def add(self, key: str, now: float) -> None:
        if self._began_s is None:
            self._began_s = now
        weight = math.exp(min(self._rate * (now - self._began_s), 50.0))
        self._weights[key] = self._weights.get(key, 0.0) + weight
        self._total += weight
        if weight > _MOST:
            self._restart(weight, now)
        elif len(self._weights) > 2 * self._max_keys:
            self._prune()

    def share(self, key: str) -> float:
        """Return the key's part of all demand, 0 to 1."""
        return self._weights.get(key, 0.0) / self._total if self._total else 0.0

    def shares(self, most: int) -> list[tuple[str, float]]:
        """Return at most so many keys and their shares, those of most demand first."""
        top = heapq.nlargest(most, self._weights.items(), key=lambda item: item[1])
        return [(key, weight / self._total) for key, weight in top]

    def _restart(self, weight: float, now: float) -> None:
        self._began_s = now
        self._weights = {key: w / weight for key, w in self._weights.items() if w > 1e-6 * weight}
        self._total = sum(self._weights.values())

    def _prune(self) -> None:
        most = sorted(self._weights.items(), key=lambda item: item[1], reverse=True)
        self._weights = dict(most[: self._max_keys])
        self._total = sum(self._weights.values())
