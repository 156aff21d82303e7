"""Keep objects in memory, under a clock that a test sets, with a hook before each request."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapter_store.errors import ObjectChanged, ObjectNotFound, StoreCorrupt
from adapter_store.object_store import JUST_READ, OnBytes, Reading, StoredObject, check_key

Hook = Callable[[str, str], object]  # called with the method and the key before each request


def no_hook(method: str, key: str) -> None:
    """Let the request pass."""


@dataclass
class Memory:
    """What all stores over it share."""

    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict[str, tuple[bytes, float]])
    now_s: float = 1000.0

    def copy(self) -> "Memory":
        return Memory(dict(self.objects), self.now_s)


class MemoryStore:
    """One process' view of the memory."""

    def __init__(self, memory: Memory, hook: Hook = no_hook) -> None:
        self.memory = memory
        self.hook = hook

    def get(self, key: str) -> bytes:
        self.hook("get", check_key(key))
        try:
            return self.memory.objects[key][0]
        except KeyError as error:
            raise ObjectNotFound(f"there is no object {key}") from error

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.get(key)[start : start + length]

    def get_many(self, keys: Sequence[str]) -> Sequence[bytes]:
        return [self.get(key) for key in keys]

    def get_file(self, key: str, path: Path, how: Reading = JUST_READ) -> None:
        data = self.get(key)
        if how.etag not in ("", _etag(data)):
            raise ObjectChanged(f"{key} changed")
        path.write_bytes(data)

    def size(self, key: str) -> int | None:
        self.hook("size", key)
        found = self.memory.objects.get(key)
        return None if found is None else len(found[0])

    def put(self, key: str, data: bytes) -> None:
        self.hook("put", check_key(key))
        self.memory.objects[key] = (data, self.memory.now_s)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.hook("put_if_absent", check_key(key))
        if key in self.memory.objects:
            return False
        self.memory.objects[key] = (data, self.memory.now_s)
        return True

    def put_file(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreCorrupt(f"{path} changed")
        self.put(key, data)

    def has_any(self, prefix: str) -> bool:
        return bool(self.list(prefix))

    def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
        self.hook("list", prefix)
        found = (key for key in self.memory.objects if key.startswith(prefix))
        return sorted(key for key in found if key > start_after)

    def describe(self, prefix: str) -> Sequence[StoredObject]:
        keys = self.list(prefix)
        entries = ((key, *self.memory.objects[key]) for key in keys)
        return [StoredObject(key, len(data), at_s, _etag(data)) for key, data, at_s in entries]

    def describe_folder(self, folder: str, most: int) -> Sequence[StoredObject]:
        return [each for each in self.describe(folder) if "/" not in each.key[len(folder) :]][:most]

    def folders(self, start_after: str, most: int) -> Sequence[str]:
        names = {key.partition("/")[0] + "/" for key in self.list("") if "/" in key}
        return sorted(name for name in names if name > start_after)[:most]

    def remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.hook("remove", check_key(key))
            self.memory.objects.pop(key, None)

    def now_s(self) -> float:
        self.hook("now_s", "")
        return self.memory.now_s

    def check_writes(self) -> None:
        self.hook("check_writes", "")


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
