"""Keep objects as files below a folder, behind the interface of `ObjectStore`."""

import errno
import hashlib
import os
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from stat import S_ISDIR
from typing import BinaryIO

from adapter_store.errors import (
    AccessDenied,
    DownloadStopped,
    ObjectChanged,
    ObjectNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.object_store import (
    CHUNK_BYTES,
    JUST_READ,
    OnBytes,
    Reading,
    StoredObject,
    check_key,
)

SETTLED_NS = 2 * 10**9  # since a folder's last change, for its listing to be kept
KEPT_NS = 30 * 10**9  # that it is kept at most, whatever a mounted file system's clock says
MAX_DRAFT_AGE_S = 86_400  # longer than any write takes
PLACE_ATTEMPTS = (
    20  # `remove` may take a folder away, as it is empty, just before a file gets there
)


@dataclass(frozen=True, slots=True)
class _Listing:
    """The keys of a folder behind one, as of its last change."""

    changed_ns: int
    listed_ns: int
    start_after: str
    keys: Sequence[str]

    def holds(self, changed_ns: int, start_after: str, now_ns: int) -> bool:
        is_fresh = 0 <= now_ns - self.listed_ns < KEPT_NS
        return is_fresh and changed_ns == self.changed_ns and start_after >= self.start_after


class FileStore:
    """Stores objects as files below a folder, in one file system that has hard links.

    Content is first written to a draft and flushed to disk, then linked or renamed into place in
    one step of the file system, so processes that share the folder need no lock. Nothing is written
    before the first object is, so a folder that may only be read can be read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._drafts = root / ".drafts"
        self._listings: dict[str, _Listing] = {}
        found = next((path for path in (root, *root.parents) if path.exists()), root)
        if found.exists() and not found.is_dir():
            raise SourceUnavailable(f"store {root}: {found} is not a folder")
        with suppress(OSError):
            self._remove_old_drafts()

    # ---- reading -------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        with _unavailable(key):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with _unavailable(key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def get_many(self, keys: Sequence[str]) -> Sequence[bytes]:
        return [self.get(key) for key in keys]

    def get_file(self, key: str, path: Path, how: Reading = JUST_READ) -> None:
        with _unavailable(key):
            source = self._path(key).open("rb")
        with source, path.open("wb") as target:
            etag = _etag(os.fstat(source.fileno()))
            while chunk := _next_chunk(source, key):
                if not how.is_wanted():
                    raise DownloadStopped(f"{key} is not wanted any more")
                target.write(chunk)
                how.on_bytes(len(chunk))
            if how.etag and not etag == _etag(os.fstat(source.fileno())) == how.etag:
                raise ObjectChanged(f"{key} changed while it was downloaded")

    def size(self, key: str) -> int | None:
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise SourceUnavailable(f"cannot read {key}: {error}") from error

    def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
        with _unavailable(prefix):
            if prefix.endswith("/") and start_after:
                return self._listed(prefix, start_after)
            return sorted(key for key in self._keys(prefix) if key > start_after)

    def _listed(self, folder: str, start_after: str) -> Sequence[str]:
        """List what follows in a folder, from memory while nothing has come or gone there.

        The log is listed each second, and its folder may hold all that was ever written.
        """
        changed_ns, now_ns = _changed_ns(self._root / folder), time.time_ns()
        known = self._listings.get(folder)
        if known is not None and known.holds(changed_ns, start_after, now_ns):
            return known.keys[bisect_right(known.keys, start_after) :]
        names = list(self._names_in(folder))
        is_flat = not any(name.endswith("/") for name in names)
        keys = [folder + name for name in names] if is_flat else self._keys(folder)
        found = sorted(key for key in keys if key > start_after)
        # Within a tick of its clock the file system may change a folder twice and show it once.
        if is_flat and changed_ns < now_ns - SETTLED_NS:
            self._listings[folder] = _Listing(changed_ns, now_ns, start_after, found)
        return found

    def has_any(self, prefix: str) -> bool:
        with _unavailable(prefix):
            return any(True for _ in self._keys(prefix))

    def describe(self, prefix: str) -> Sequence[StoredObject]:
        with _unavailable(prefix):
            found = [self._describe(key) for key in self.list(prefix)]
        return [each for each in found if each is not None]

    def describe_folder(self, folder: str, most: int) -> Sequence[StoredObject]:
        with _unavailable(folder):
            names = self._names_in(folder)
            keys = sorted(f"{folder}{name}" for name in names if not name.endswith("/"))
            found = (self._describe(key) for key in keys)
            return [each for each in found if each is not None]

    def folders(self, start_after: str, most: int) -> Sequence[str]:
        with _unavailable(""):
            names = (name for name in self._names_in("") if name.endswith("/"))
            return nsmallest(most, (name for name in names if name > start_after))

    # ---- writing -------------------------------------------------------------------------------

    def put(self, key: str, data: bytes) -> None:
        with _unavailable(key), self._draft([data]) as (draft, _):
            self._place(draft, self._path(key), os.replace)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _unavailable(key), self._draft([data]) as (draft, _):
            return self._place(draft, path, os.link)

    def put_file(self, key: str, path: Path, sha256: str, on_bytes: OnBytes) -> None:
        with _unavailable(key), self._draft(_chunks(path, on_bytes)) as (draft, written):
            if written != sha256:
                raise StoreCorrupt(f"{path} changed while it was uploaded: its sha256 is {written}")
            self._place(draft, self._path(key), os.replace)

    def remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            path = self._path(key)
            with _unavailable(key):
                path.unlink(missing_ok=True)
            if path.parent != self._root:
                with suppress(OSError):  # unless it is empty, the folder stays
                    path.parent.rmdir()

    def check_writes(self) -> None:
        """Return at once: a hard link is made or refused in one step."""

    def now_s(self) -> float:
        """Return the time of a new file: a mounted file system may go by another machine's clock.

        Where nothing can be written, nothing can be removed either, and this machine's clock does.
        """
        try:
            with self._draft([]) as (draft, _):
                return draft.stat().st_mtime
        except OSError:
            return time.time()

    # ---- inside --------------------------------------------------------------------------------

    def _keys(self, prefix: str) -> Generator[str, None, None]:
        parent = "".join(prefix.rpartition("/")[:2])
        if (self._root / parent).is_dir():  # else nothing has been put there yet
            yield from (key for key in self._walk(parent) if key.startswith(prefix))

    def _walk(self, parent: str) -> Generator[str, None, None]:
        """Yield all keys below a folder, which is "" or ends in a slash."""
        for name in self._names_in(parent):
            if name.endswith("/"):
                yield from self._walk(parent + name)
            else:
                yield parent + name

    def _names_in(self, parent: str) -> Generator[str, None, None]:
        """Yield what is in a folder; names of folders end in a slash."""
        try:
            entries = os.scandir(self._root / parent)
        except (FileNotFoundError, NotADirectoryError):  # perhaps it has just been removed
            return
        with entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield f"{entry.name}/" if entry.is_dir() else entry.name

    def _describe(self, key: str) -> StoredObject | None:
        """Describe a listed object; None if it has just been removed."""
        try:
            stat = (self._root / key).stat()
        except FileNotFoundError:
            return None
        return StoredObject(key, stat.st_size, stat.st_mtime, _etag(stat))

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

    def _place(self, draft: Path, path: Path, put: Callable[[Path, Path], object]) -> bool:
        """Give a draft its name by `put`; return False if that refuses because it is taken."""
        for attempt in range(1, PLACE_ATTEMPTS + 1):
            try:
                _make_folder(path.parent)
                put(draft, path)
                break
            except FileExistsError:
                return False
            except FileNotFoundError:
                if attempt == PLACE_ATTEMPTS:
                    raise
        with suppress(FileNotFoundError):  # removed again already
            _flush_folder(path.parent)
        return True


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


def _changed_ns(folder: Path) -> int:
    """Tell when a file came or went there, in ns since 1970; 0 if there is no folder."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _etag(stat: os.stat_result) -> str:
    """Tell a file's content from others by what every write and every other file changes."""
    return f"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"


def _next_chunk(file: BinaryIO, key: str) -> bytes:
    with _unavailable(key):
        return file.read(CHUNK_BYTES)


def _make_folder(folder: Path) -> None:
    """Make a folder unless it is there; FileNotFoundError if it was there and has just gone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # or another one has removed it, and perhaps made it again
        if not S_ISDIR(folder.stat().st_mode):
            raise SourceUnavailable(f"cannot write to {folder}: it is no folder") from error


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
