"""Tier: which adapters one replica has in a bounded memory, least recently used first to go."""

from collections import OrderedDict
from collections.abc import Callable, Iterator


class Tier:
    """Adapters and their sizes. Those in use are kept even above the bound."""

    def __init__(self, most_bytes: int, is_in_use: Callable[[str], bool]) -> None:
        self._most_bytes, self._is_in_use = most_bytes, is_in_use
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used_bytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def touch(self, digest: str) -> None:
        self._sizes.move_to_end(digest)

    def put(self, digest: str, nbytes: int) -> list[str]:
        """Add an adapter; return those that had to go."""
        self._sizes[digest] = nbytes
        self._used_bytes += nbytes
        gone: list[str] = []
        for other in list(self._sizes):
            if self._used_bytes <= self._most_bytes:
                break
            if other != digest and not self._is_in_use(other):
                self._used_bytes -= self._sizes.pop(other)
                gone.append(other)
        return gone
