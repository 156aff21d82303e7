"""PlainOrigin: where an adapter lies that nobody has published, and in which state.

It stands for the content, which nobody has hashed: another state of a file is another adapter.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PLAIN_NAMESPACE = "plain"  # the namespace of such adapters, where there are any
UNVERSIONED = 0  # their version: what is there now


@dataclass(frozen=True, slots=True)
class PlainFile:
    name: str
    etag: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlainOrigin:
    address: str
    files: tuple[PlainFile, ...]  # those that are used, by name

    def digest(self, base: str) -> str:
        """Identify the adapter for a base, as long as its files are in this state."""
        parts = {"base": base, "plain": asdict(self)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def has_any(self, names: Sequence[str]) -> bool:
        """Check that there is a file of one of these names."""
        return any(file.name in names for file in self.files)


def parse_origin(data: Any) -> PlainOrigin:
    """Decode an origin from JSON. Raises KeyError, TypeError."""
    return PlainOrigin(data["address"], tuple(PlainFile(**file) for file in data["files"]))
