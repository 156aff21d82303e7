"""Keep verified adapters on local disk, a folder per digest, within a bound in bytes.

The least recently used adapter is evicted first. The folders are the whole state: a visible folder
is complete, and its modification time is its last use. So a restart loses nothing, and several
processes may share the cache.

    <root>/<digest>/                    a verified adapter
    <root>/.partial/<digest>.<nbytes>/  a download, with the bytes reserved for it
    <root>/.partial/trash.<id>/         being deleted
    <root>/.locks/<digest>.pin          shared lock while pinned, exclusive while evicted
    <root>/.locks/<digest>.fetch        exclusive lock of the one process that downloads it
    <root>/.locks/room                  exclusive lock while room is made and reserved

A folder is trusted while the sizes and times of its files are those at which they were hashed.
Knows no names and no object store: the caller's `fetch` writes one file of an adapter.
"""

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapter_store.errors import AdapterTooLarge, CacheFull, StoreCorrupt
from adapter_store.file_lock import FileLock, exclusive_lock
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    AdapterManifest,
    is_digest,
    parse_manifest,
)
from adapter_store.safetensors_file import hash_file

_log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]  # inode, size and time of change, of each file
Fetch = Callable[[str, Path], object]  # called with a file's name and where to write it
Reserve = Callable[[int], Path]  # called with a size; gives the draft its final place
Fill = Callable[[Path, Reserve], None]  # called with a draft of a folder, to put all files there


class Building(Protocol):
    """A folder that is still to be made."""

    @property
    def nbytes(self) -> int: ...
    def write(self, folder: Path) -> None: ...


@dataclass(slots=True)
class _Pin:
    count: int
    lock: FileLock


class DiskCache:
    """A cache of adapter folders of at most `max_bytes`. Thread-safe.

    A folder that is not pinned may be evicted at any time: callers must pin before `ensure`.
    """

    def __init__(
        self, root: Path, max_bytes: int, clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1")
        self._root = root
        self._max_bytes = max_bytes
        self._clock_ns = clock_ns
        self._partial = root / ".partial"
        self._locks = root / ".locks"
        self._room = self._locks / "room"
        self._pin_lock = threading.Lock()  # guards _pins; never taken while a file lock is held
        self._pins: dict[str, _Pin] = {}
        self._lock = threading.Lock()  # guards the two below; never held over I/O
        self._verified: dict[str, Stamp] = {}  # of the files that this process has hashed
        self._opening: dict[str, threading.Lock] = {}
        self._partial.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(exist_ok=True)
        self._remove_leftovers()
        with exclusive_lock(self._room):
            self._evict_for(0)

    # ---- pins ----------------------------------------------------------------------------------

    def pin(self, digest: str) -> None:
        """Forbid eviction until as many calls of `unpin`, even before the adapter is on disk."""
        _check_digest(digest)
        with self._pin_lock:
            if digest in self._pins:
                self._pins[digest].count += 1
                return
            lock = FileLock.acquire(self._locks / f"{digest}.pin", shared=True)
            assert lock is not None
            self._pins[digest] = _Pin(1, lock)

    def unpin(self, digest: str) -> None:
        """Undo one `pin`; ValueError if there is none."""
        with self._pin_lock:
            if digest not in self._pins:
                raise ValueError(f"{digest} is not pinned")
            pin = self._pins[digest]
            pin.count -= 1
            if not pin.count:
                del self._pins[digest]
                pin.lock.release()

    @contextmanager
    def pinned(self, digest: str) -> Generator[None, None, None]:
        """Forbid eviction for the length of the block."""
        self.pin(digest)
        try:
            yield
        finally:
            self.unpin(digest)

    # ---- content -------------------------------------------------------------------------------

    def ensure(self, digest: str, fetch: Fetch) -> Path:
        """Return the adapter's folder; concurrent callers share one download.

        Hashes the files at their first use in a process and when they have changed, and fetches
        them again if they are damaged. Raises AdapterTooLarge, CacheFull, StoreCorrupt, or what
        `fetch` raises; then the adapter is not on disk, although others may have been evicted for
        it.
        """
        return self._ensure(digest, lambda draft, reserve: _fetch(digest, fetch, draft, reserve))

    def ensure_built(self, digest: str, building: Building) -> Path:
        """Return the adapter's folder, which is built on this machine if it is not there.

        The building writes the manifest, too. Raises what `ensure` raises.
        """
        return self._ensure(digest, lambda _, reserve: building.write(reserve(building.nbytes)))

    def _ensure(self, digest: str, fill: Fill) -> Path:
        folder = self._folder(digest)
        if self._is_verified(digest, folder):
            return folder
        with self._opening_lock(digest):
            if not self._is_verified(digest, folder):
                self._open(digest, folder, fill)
        return folder

    def find(self, digest: str) -> Path | None:
        """Return the adapter's folder if it is on disk and intact; download nothing."""
        folder = self._folder(digest)
        if self._is_verified(digest, folder):
            return folder
        if not folder.is_dir():
            return None
        with self._opening_lock(digest):
            is_intact = self._is_verified(digest, folder) or self._verify(digest, folder) is None
        return folder if is_intact and self._touch(folder) else None

    def distrust(self, digest: str) -> None:
        """Hash the files again at their next use, because a reader has found them damaged."""
        with self._lock:
            self._verified.pop(_check_digest(digest), None)

    def contains(self, digest: str) -> bool:
        """Check whether the adapter's folder is on disk."""
        return self._folder(digest).is_dir()

    def digests(self) -> list[str]:
        """List the adapters on disk, the least recently used first."""
        used = [(_used_ns(self._root / name), name) for name in os.listdir(self._root)]
        return [name for used_ns, name in sorted(used) if is_digest(name) and used_ns]

    def evict(self, digest: str) -> bool:
        """Remove an adapter; return False instead if it is absent, or pinned by any process."""
        folder = self._folder(digest)
        lock = FileLock.acquire(self._locks / f"{digest}.pin", wait=False)
        if lock is None:
            return False
        try:
            trash = self._discard(folder)
        finally:
            lock.release()
        if trash is None:
            return False
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def check_integrity(self) -> None:
        """Assert the invariants, which hold while no operation is in progress."""
        used = 0
        for digest in self.digests():
            folder = self._root / digest
            manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes(), digest)
            names = sorted(path.name for path in folder.iterdir())
            assert names == sorted([*manifest.files, MANIFEST_NAME]), f"{digest} holds {names}"
            used += _size(folder)
        assert used <= self._max_bytes, f"{used} bytes used of {self._max_bytes}"
        assert not list(self._partial.iterdir()), "a download was left over"
        assert all(pin.count > 0 for pin in self._pins.values()), "a pin with no holder"
        held = sorted(path.name for path in self._locks.iterdir())
        assert set(held) >= {f"{digest}.pin" for digest in self._pins}, "a pin without its lock"

    # ---- download ------------------------------------------------------------------------------

    def _open(self, digest: str, folder: Path, fill: Fill) -> None:
        with exclusive_lock(self._locks / f"{digest}.fetch"):
            if folder.is_dir():
                problem = self._verify(digest, folder)
                if problem is None and self._touch(folder):
                    return
                _log.warning(
                    "adapter %s is damaged on disk, fetching it again: %s", digest, problem
                )
                if trash := self._discard(folder):
                    shutil.rmtree(trash, ignore_errors=True)
            self._make(digest, folder, fill)

    def _make(self, digest: str, folder: Path, fill: Fill) -> None:
        for leftover in self._partial.glob(
            f"{digest}.*"
        ):  # left by a crash: this process holds the lock now
            shutil.rmtree(leftover)
        draft = self._partial / f"{digest}.0"
        draft.mkdir()

        def reserve(nbytes: int) -> Path:
            nonlocal draft
            draft = self._reserve(digest, draft, nbytes)
            return draft

        try:
            fill(draft, reserve)
            if problem := self._verify(digest, draft):
                raise StoreCorrupt(f"the download of {digest} is damaged: {problem}")
            self._touch(draft)
            with exclusive_lock(self._room):  # others must not count it twice, or not at all
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _reserve(self, digest: str, draft: Path, nbytes: int) -> Path:
        """Make room for `nbytes`, and rename the draft so that its name reserves them."""
        if nbytes > self._max_bytes:
            raise AdapterTooLarge(
                f"adapter {digest} has {nbytes} bytes, the disk cache holds {self._max_bytes}"
            )
        with exclusive_lock(self._room):
            free = self._evict_for(nbytes)
            if free < nbytes:
                raise CacheFull(
                    f"no room for the {nbytes} bytes of adapter {digest}: of {self._max_bytes}, "
                    f"{self._max_bytes - free} are pinned or being downloaded"
                )
            return draft.rename(self._partial / f"{digest}.{nbytes}")

    def _evict_for(self, nbytes: int) -> int:
        """Evict the least recently used until `nbytes` are free; return how many bytes are."""
        sizes = {digest: _size(self._root / digest) for digest in self.digests()}
        reserved = [path.name.split(".") for path in self._partial.iterdir()]
        free = self._max_bytes - sum(sizes.values())
        free -= sum(int(size) for owner, size in reserved if owner != "trash")
        for digest, size in sizes.items():
            if free >= nbytes:
                break
            if self.evict(digest):
                free += size
        return free

    # ---- trust ---------------------------------------------------------------------------------

    def _is_verified(self, digest: str, folder: Path) -> bool:
        """Record a use of a folder whose files are as they were when they were hashed."""
        known = self._verified.get(digest)
        return known is not None and known == _stamp(folder) and self._touch(folder)

    def _verify(self, digest: str, folder: Path) -> str | None:
        """Hash a folder's files, and trust them if they are intact; else describe the damage."""
        stamp = _stamp(folder)  # taken first, so that a later change counts as one
        problem = _damage(folder, digest)
        if problem is None and stamp is not None:
            with self._lock:
                self._verified[digest] = stamp
        return problem

    # ---- folders -------------------------------------------------------------------------------

    def _folder(self, digest: str) -> Path:
        return self._root / _check_digest(digest)

    def _touch(self, folder: Path) -> bool:
        """Record a use; return False if the folder does not exist."""
        now_ns = self._clock_ns()
        try:
            os.utime(folder, ns=(now_ns, now_ns))
        except FileNotFoundError:
            return False
        return True

    def _discard(self, folder: Path) -> Path | None:
        """Move a folder out of sight in one step; return its new path, or None if it was absent."""
        trash = self._partial / f"trash.{uuid.uuid4().hex}"
        try:
            return folder.rename(trash)
        except FileNotFoundError:
            return None

    @contextmanager
    def _opening_lock(self, digest: str) -> Generator[None, None, None]:
        with self._lock:
            lock = self._opening.setdefault(digest, threading.Lock())
        with lock:
            yield
        # The entry stays: another thread may already hold a reference to it, and it is small.

    def _remove_leftovers(self) -> None:
        """Delete what crashed processes left, and nothing that a live process works on."""
        for path in list(self._partial.iterdir()):
            digest = path.name.split(".")[0]
            lock = FileLock.acquire(self._locks / f"{digest}.fetch", wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                lock.release()
        for path in list(self._locks.iterdir()):
            lock = FileLock.acquire(path, wait=False)
            if lock is not None:
                lock.release()


def _fetch(digest: str, fetch: Fetch, draft: Path, reserve: Reserve) -> None:
    """Fetch the manifest, and all that it lists once there is room for it."""
    fetch(MANIFEST_NAME, draft / MANIFEST_NAME)
    raw = (draft / MANIFEST_NAME).read_bytes()
    manifest = parse_manifest(raw, digest)
    draft = reserve(manifest.nbytes + len(raw))
    for name in manifest.files:
        fetch(name, draft / name)


def _check_digest(digest: str) -> str:
    if not is_digest(digest):
        raise ValueError(f"{digest!r} is not a digest: 64 hexadecimal digits")
    return digest


def _used_ns(folder: Path) -> int:
    """Return when a folder was last used, in ns since 1970; 0 if it has just disappeared."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(folder: Path) -> int:
    """Add up the bytes in a folder; 0 if it has just disappeared."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:
        return 0


def _stamp(folder: Path) -> Stamp | None:
    """Identify the present state of a folder's files, without reading them."""
    try:
        stats = [(folder / n).stat() for n in (MANIFEST_NAME, CONFIG_NAME, WEIGHTS_NAME)]
    except OSError:
        return None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _damage(folder: Path, digest: str) -> str | None:
    """Describe the first damage to a folder's files; None if they are intact."""
    try:
        manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes(), digest)
        return next((p for name in manifest.files if (p := _damaged(folder, manifest, name))), None)
    except (OSError, StoreCorrupt) as error:
        return str(error)


def _damaged(folder: Path, manifest: AdapterManifest, name: str) -> str | None:
    expected = manifest.files[name]
    nbytes, sha256 = (folder / name).stat().st_size, hash_file(folder / name, lambda _: None)
    if (nbytes, sha256) == (expected.nbytes, expected.sha256):
        return None
    return (
        f"{name} has {nbytes} bytes and sha256 {sha256}, not {expected.nbytes}, {expected.sha256}"
    )
