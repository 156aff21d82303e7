"""HostCache: decodes adapters into host memory, in the order of the queue and within a bound.

Its own threads read and decode adapters, never the step loop, which only polls. Those of waiting
requests are loaded in the order in which they were first wanted, as many as the bound allows; the
rest wait undecoded. A copy of an adapter that stays on the device for a while goes first; one that
no request wants is kept only while there is room, and that of least worth goes
(`scheduler.popularity`).
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.messages import AdapterFolder
from engine.scheduler.popularity import HALF_LIFE_REQUESTS, Popularity

LOADER_THREADS = 2


class OnDevice(Protocol):
    """What the device has, as `scheduler.adapter_slots` knows it."""

    def is_loaded(self, digest: str) -> bool: ...
    def stays(self, digest: str) -> bool: ...


class HostAdapter(Protocol):
    """An adapter in host memory, in the form that the device's runner accepts."""

    @property
    def nbytes(self) -> int:
        """Size in bytes, in host memory and on the device."""
        ...


@dataclass(slots=True)
class _Entry:
    """One adapter. Without a future, it waits to be loaded, or was dropped while in use."""

    adapter_folder: AdapterFolder
    wanted: int = 0
    future: "Future[HostAdapter] | None" = None
    nbytes: int | None = None  # expected size, until a load is reported; None: not known yet


@dataclass(frozen=True, slots=True)
class Loaded:
    """One finished load: either weights, or the error that prevented it."""

    digest: str
    weights: HostAdapter | None
    error: Exception | None


class HostCache:
    """Loads, keeps and drops adapters.

    `want` and `release` are counted; `advance` starts loads; `poll` reports each load once; `get`
    needs a finished load. `max_bytes` is exceeded only by a single adapter that is larger, and by
    the bytes that decoded adapters take beyond the size of their files.
    """

    def __init__(
        self,
        max_bytes: int,
        load: Callable[[AdapterFolder], HostAdapter],
        wake: Callable[[], None] = lambda: None,
        expected_bytes: Callable[[AdapterFolder], int] | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self._load = load
        self._wake = wake
        self._expected_bytes = expected_bytes or _file_bytes
        self._entries: dict[str, _Entry] = {}
        self._queue: OrderedDict[str, None] = OrderedDict()  # wanted and not loaded
        self._popularity, self._num_wanted = Popularity(HALF_LIFE_REQUESTS), 0
        self._on_device: dict[str, None] = {}  # wanted and not loaded, but on the device
        self._loading: dict[str, None] = {}
        self._loaded: OrderedDict[str, None] = OrderedDict()  # least recently wanted first
        self._used_bytes = 0
        self._pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="adapter-load")

    # ==== requests ====

    def want(self, adapter_folder: AdapterFolder) -> None:
        """Queue the adapter to be loaded, and keep it until `release`."""
        digest = adapter_folder.digest
        entry = self._entries.get(digest)
        if entry is None:
            entry = self._entries[digest] = _Entry(adapter_folder)
            self._queue[digest] = None
        entry.wanted += 1
        self._num_wanted += 1
        self._popularity.use(digest, self._num_wanted)
        if digest in self._loaded:
            self._loaded.move_to_end(digest)

    def release(self, digest: str) -> list[str]:
        """Undo one `want`. Returns the digests dropped to stay within the bound."""
        entry = self._entries.get(digest)
        if entry is None:
            return []
        entry.wanted -= 1
        assert entry.wanted >= 0, f"adapter {digest} was released more often than wanted"
        if not entry.wanted and entry.future is None:
            self._forget(digest)
        return self._drop(0, lambda _: False)

    def discard(self, digest: str) -> list[str]:
        """Drop a loaded adapter that no request wants, so that its files are read again."""
        entry = self._entries.get(digest)
        if digest not in self._loaded or entry is None or entry.wanted:
            return []
        del self._loaded[digest], self._entries[digest]
        self._used_bytes -= entry.nbytes or 0
        return [digest]

    # ==== loads ====

    @property
    def is_settled(self) -> bool:
        """Whether `poll` and `advance` have nothing to do until another adapter is wanted."""
        return not (self._loading or self._queue or self._on_device)

    def advance(self, device: OnDevice) -> list[str]:
        """Start the loads that are due. Returns the digests dropped to make room for them."""
        dropped: list[str] = []
        for digest in [d for d in self._on_device if not device.is_loaded(d)]:
            del self._on_device[digest]
            self._queue[digest] = None
            self._queue.move_to_end(digest, last=False)  # it was at the front before
        while self._queue and len(self._loading) < LOADER_THREADS:
            digest = next(iter(self._queue))
            if device.is_loaded(digest):
                self._on_device[digest] = None
            elif self._make_room(self._expect(digest), device, dropped):
                self._start(digest)
            else:
                break
            del self._queue[digest]
        return dropped

    def poll(self) -> list[Loaded]:
        """Return the loads that ended since the last call. Failed ones may be wanted again."""
        ended: list[Loaded] = []
        for digest in list(self._loading):
            entry = self._entries[digest]
            if entry.future is None or not entry.future.done():
                continue
            del self._loading[digest]
            self._used_bytes -= entry.nbytes or 0
            error = entry.future.exception()
            if error is None:
                ended.append(self._take(digest, entry, entry.future.result()))
            elif isinstance(error, Exception):
                del self._entries[digest]
                ended.append(Loaded(digest, None, error))
            else:
                raise error
        return ended

    def _take(self, digest: str, entry: _Entry, weights: HostAdapter) -> Loaded:
        entry.nbytes = weights.nbytes
        self._used_bytes += weights.nbytes
        self._loaded[digest] = None
        return Loaded(digest, weights, None)

    def get(self, digest: str) -> Any:
        """Return the loaded adapter; its load must have finished."""
        future = self._entries[digest].future
        assert future is not None, f"adapter {digest} is not loaded"
        return future.result()

    @property
    def used_bytes(self) -> int:
        """Bytes of loaded adapters, plus the expected bytes of loads in progress."""
        return self._used_bytes

    @property
    def num_queued(self) -> int:
        """Number of adapters that wait undecoded."""
        return len(self._queue)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ==== room ====

    def _start(self, digest: str) -> None:
        entry = self._entries[digest]
        entry.future = self._pool.submit(self._load, entry.adapter_folder)
        entry.future.add_done_callback(lambda _: self._wake())
        self._loading[digest] = None
        self._used_bytes += entry.nbytes or 0

    def _expect(self, digest: str) -> int:
        entry = self._entries[digest]
        if entry.nbytes is None:
            entry.nbytes = self._expected_bytes(entry.adapter_folder)
        return entry.nbytes

    def _make_room(self, nbytes: int, device: OnDevice, dropped: list[str]) -> bool:
        """Drop adapters that are not needed until a load fits; a single one may have any size."""
        gone = self._drop(nbytes, device.stays)
        self._on_device |= {digest: None for digest in gone if digest in self._entries}
        dropped += gone
        is_alone = not self._loaded and not self._loading
        return is_alone or self._used_bytes + nbytes <= self.max_bytes

    def _drop(self, nbytes: int, stays: Callable[[str], bool]) -> list[str]:
        """Drop adapters that stay on the device, or that no request wants, until there is room."""
        dropped: list[str] = []
        if self._used_bytes + nbytes <= self.max_bytes:
            return dropped
        for digest in self._popularity.as_they_go(self._loaded, stays):
            entry = self._entries[digest]
            if entry.wanted and not stays(digest):
                continue
            del self._loaded[digest]
            self._used_bytes -= entry.nbytes or 0
            entry.future = None
            if not entry.wanted:
                del self._entries[digest]
            dropped.append(digest)
            if self._used_bytes + nbytes <= self.max_bytes:
                break
        return dropped

    def _forget(self, digest: str) -> None:
        del self._entries[digest]
        self._queue.pop(digest, None)
        self._on_device.pop(digest, None)


def _file_bytes(adapter_folder: AdapterFolder) -> int:
    """Estimate the size by that of the file; loading it reports any errors of the file."""
    try:
        return os.stat(Path(adapter_folder.path) / "adapter_model.safetensors").st_size
    except OSError:
        return 0
