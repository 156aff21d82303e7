"""Define a store of objects under string keys: the only durable state. Knows nothing of adapters.

The package relies on two guarantees: readers never see a partly written object, and if several
writers call `put_if_absent` for one key, exactly one succeeds.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 4 * 2**20
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # no leading dot: no ".." and no hidden file

OnBytes = Callable[[int], object]  # progress callback: bytes processed since the last call


def ignore_bytes(num_bytes: int) -> None:
    """Report no progress."""


def always_wanted() -> bool:
    """Never give up."""
    return True


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing describes it."""

    key: str
    nbytes: int
    modified_s: float  # seconds since 1970 at its last write, by the clock of `now_s`
    etag: str = ""  # another one for other content, as the store gives it; empty: it gives none


@dataclass(frozen=True, slots=True)
class Reading:
    """How an object is read into a file.

    `on_bytes` may be called from another thread. `is_wanted` is asked now and then; once it says no
    the reading ends with DownloadStopped.
    """

    on_bytes: OnBytes = ignore_bytes
    is_wanted: Callable[[], bool] = always_wanted
    etag: str = ""  # of the only state of the object that will do; empty: any


JUST_READ = Reading()


class ObjectStore(Protocol):
    """A store of objects under keys, which are segments joined by `/`.

    All methods may raise SourceUnavailable, and ValueError for a key that `check_key` refuses.
    """

    def get(self, key: str) -> bytes:
        """Read a whole object; ObjectNotFound if there is none."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Read bytes [start, start + length), fewer at the object's end; or ObjectNotFound."""
        ...

    def get_many(self, keys: Sequence[str]) -> Sequence[bytes]:
        """Read whole objects, in this order; concurrently where requests have a latency."""
        ...

    def get_file(self, key: str, path: Path, how: Reading = JUST_READ) -> None:
        """Write a whole object to a file, new or not.

        What was read of it is all of one state. Raises ObjectNotFound, ObjectChanged if there is
        another one by now, DownloadStopped, OSError if the file cannot be written; then the file
        may be there in part.
        """
        ...

    def size(self, key: str) -> int | None:
        """Return the bytes in an object; None if there is none."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless the key exists; return whether this call wrote it.

        Raises AccessDenied, which is a SourceUnavailable, where only reading is allowed.
        """
        ...

    def put_file(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        """Write or replace an object with a file's content; `sha256` is in hexadecimal.

        Raises StoreCorrupt, and writes nothing, if the content has another SHA-256.
        """
        ...

    def has_any(self, prefix: str) -> bool:
        """Check whether there is a key that begins with `prefix`, without listing them all."""
        ...

    def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
        """List the keys that begin with `prefix` and sort after `start_after`, sorted."""
        ...

    def describe(self, prefix: str) -> Sequence[StoredObject]:
        """List the objects whose keys begin with `prefix`, sorted by key."""
        ...

    def describe_folder(self, folder: str, most: int) -> Sequence[StoredObject]:
        """List the first objects directly in a folder, which is "" or ends in a slash, by key.

        What lies in folders below it costs nothing; at least `most` are listed if there are.
        """
        ...

    def folders(self, start_after: str, most: int) -> Sequence[str]:
        """List at most so many folders of the root, each with its slash, in the order of keys.

        Those that sort after `start_after`, whatever lies in them. None has a leading dot.
        """
        ...

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects, there or not; concurrently where requests have a latency.

        Raises AccessDenied where that is not allowed.
        """
        ...

    def now_s(self) -> float:
        """Return the time by the clock that the objects' times are taken from."""
        ...

    def check_writes(self) -> None:
        """Raise SourceUnavailable if `put_if_absent` does not keep its promise."""
        ...


def check_key(key: str) -> str:
    """Return the key; ValueError unless it is segments that cannot leave the root."""
    if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise ValueError(f"object key {key!r} must be segments of A-Z a-z 0-9 . _ - joined by /")
    return key
