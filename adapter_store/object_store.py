"""Store objects under string keys: the only durable state. Knows nothing of adapters.

The package relies on two guarantees: readers never see a partly written object, and if several
writers call `put_if_absent` for one key, exactly one succeeds.
"""

import errno
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from adapter_store.errors import AccessDenied, ObjectNotFound, SourceUnavailable, StoreCorrupt

CHUNK_BYTES = 4 * 2**20
MAX_DRAFT_AGE_S = 86_400  # longer than any write takes
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # no leading dot: no ".." and no hidden file

OnBytes = Callable[[int], object]  # progress callback: bytes processed since the last call


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

    def get_file(self, key: str, path: Path) -> None:
        """Write a whole object to a file, new or not.

        Raises ObjectNotFound, StoreCorrupt if the object changes meanwhile, OSError if the file
        cannot be written.
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


def check_key(key: str) -> str:
    """Return the key; ValueError unless it is segments that cannot leave the root."""
    if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise ValueError(f"object key {key!r} must be segments of A-Z a-z 0-9 . _ - joined by /")
    return key


class FileStore:
    """Stores objects as files below a folder, in one file system that has hard links.

    Content is first written to a draft and flushed to disk, then linked or renamed into place in
    one step of the file system, so processes that share the folder need no lock. Nothing is written
    before the first object is, so a folder that may only be read can be read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._drafts = root / ".drafts"
        found = next((path for path in (root, *root.parents) if path.exists()), root)
        if found.exists() and not found.is_dir():
            raise SourceUnavailable(f"store {root}: {found} is not a folder")
        with suppress(OSError):
            self._remove_old_drafts()

    def get(self, key: str) -> bytes:
        with _unavailable(key):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with _unavailable(key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def get_many(self, keys: Sequence[str]) -> Sequence[bytes]:
        return [self.get(key) for key in keys]

    def get_file(self, key: str, path: Path) -> None:
        with _unavailable(key):
            source = self._path(key).open("rb")
        with source, path.open("wb") as target:
            while chunk := _next_chunk(source, key):
                target.write(chunk)

    def size(self, key: str) -> int | None:
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise SourceUnavailable(f"cannot read {key}: {error}") from error

    def put(self, key: str, data: bytes) -> None:
        with _unavailable(key), self._draft([data]) as (draft, _):
            self._replace(draft, self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _unavailable(key), self._draft([data]) as (draft, _):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(draft, path)
            except FileExistsError:
                return False
            _flush_folder(path.parent)
            return True

    def put_file(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        with _unavailable(key), self._draft(_chunks(path, on_bytes)) as (draft, written):
            if written != sha256:
                raise StoreCorrupt(f"{path} changed while it was uploaded: its sha256 is {written}")
            self._replace(draft, self._path(key))

    def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
        with _unavailable(prefix):
            return sorted(key for key in self._keys(prefix) if key > start_after)

    def has_any(self, prefix: str) -> bool:
        with _unavailable(prefix):
            return any(True for _ in self._keys(prefix))

    def _keys(self, prefix: str) -> Generator[str, None, None]:
        parent = "".join(prefix.rpartition("/")[:2])
        if (self._root / parent).is_dir():  # else nothing has been put there yet
            yield from (key for key in self._walk(parent) if key.startswith(prefix))

    def _walk(self, parent: str) -> Generator[str, None, None]:
        """Yield all keys below a folder, which is "" or ends in a slash."""
        with os.scandir(self._root / parent) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from self._walk(f"{parent}{entry.name}/")
                else:
                    yield parent + entry.name

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _draft(
        self, chunks: "Sequence[bytes] | Generator[bytes, None, None]"
    ) -> Generator[tuple[Path, str], None, None]:
        """Write a flushed draft; yield its path and sha256; remove it unless it was moved."""
        draft = self._drafts / uuid.uuid4().hex
        digest = hashlib.sha256()
        self._drafts.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("xb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            yield draft, digest.hexdigest()
        finally:
            draft.unlink(missing_ok=True)

    def _remove_old_drafts(self) -> None:
        """Delete the drafts of writers that crashed."""
        for draft in self._drafts.iterdir() if self._drafts.is_dir() else ():
            with suppress(FileNotFoundError):  # another process removes them too
                if draft.stat().st_mtime < time.time() - MAX_DRAFT_AGE_S:
                    draft.unlink()

    def _replace(self, draft: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft, path)
        _flush_folder(path.parent)


@contextmanager
def _unavailable(what: str) -> Generator[None, None, None]:
    """Raise ObjectNotFound or SourceUnavailable for an error of the file system."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectNotFound(f"there is no object {what}") from error
    except OSError as error:
        is_denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        kind = AccessDenied if is_denied else SourceUnavailable
        raise kind(f"cannot use {what}: {error}") from error


def _next_chunk(file: BinaryIO, key: str) -> bytes:
    with _unavailable(key):
        return file.read(CHUNK_BYTES)


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a new name in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _chunks(path: Path, on_bytes: OnBytes) -> Generator[bytes, None, None]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            on_bytes(len(chunk))
