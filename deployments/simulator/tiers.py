"""Tier: which adapters one replica has in a bounded memory, and which of them go first."""

from collections.abc import Callable

from engine.scheduler.popularity import HALF_LIFE_REQUESTS, Popularity


class Tier:
    """Adapters and their sizes. Those that stay in faster memory go first, even if they are in use;
    other ones in use are kept even above the bound, and of the rest that of least worth goes
    first."""

    def __init__(
        self,
        most_bytes: int,
        is_in_use: Callable[[str], bool],
        stays: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._most_bytes, self._is_in_use, self._stays = most_bytes, is_in_use, stays
        self._sizes: dict[str, int] = {}
        self._digests: frozenset[str] | None = None
        self._popularity, self._num_used = Popularity(HALF_LIFE_REQUESTS), 0
        self._used_bytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    @property
    def digests(self) -> frozenset[str]:
        """All that are there; the same set while nothing changes."""
        if self._digests is None:
            self._digests = frozenset(self._sizes)
        return self._digests

    def touch(self, digest: str) -> None:
        """Count a use, also of an adapter that is on its way."""
        self._num_used += 1
        self._popularity.use(digest, self._num_used)

    def put(self, digest: str, nbytes: int) -> list[str]:
        """Add an adapter; return those that had to go."""
        self._sizes[digest] = nbytes
        self._digests = None
        self._used_bytes += nbytes
        gone: list[str] = []
        if self._used_bytes <= self._most_bytes:
            return gone
        for other in self._popularity.as_they_go(self._sizes, self._stays):
            if other != digest and (not self._is_in_use(other) or self._stays(other)):
                self._used_bytes -= self._sizes.pop(other)
                gone.append(other)
                if self._used_bytes <= self._most_bytes:
                    break
        return gone
