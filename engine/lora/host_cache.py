"""HostCache: keeps decoded adapters in host memory, bounded in bytes; evicts by last use.

Reads and decodes in its own threads, never in the step loop, which only polls. An adapter is kept
while it is wanted, even above the bound; idle ones fill the rest.
"""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from engine.messages import AdapterFolder

LOADER_THREADS = 2


class HostAdapter(Protocol):
    """An adapter in host memory, in the form that the device's runner accepts."""

    @property
    def nbytes(self) -> int:
        """Size in bytes, in host memory and on the device."""
        ...


@dataclass(slots=True)
class _Entry:
    future: "Future[HostAdapter]"
    wanted: int = 0
    reported: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """One finished load: either weights, or the error that prevented it."""

    digest: str
    weights: HostAdapter | None
    error: Exception | None


class HostCache:
    """Loads, keeps and drops adapters.

    `want` and `release` are counted; `poll` reports each load once; `get` needs a finished load.
    """

    def __init__(
        self,
        max_bytes: int,
        load: Callable[[AdapterFolder], HostAdapter],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.max_bytes = max_bytes
        self._load = load
        self._wake = wake
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="adapter-load")

    def want(self, adapter_folder: AdapterFolder) -> None:
        """Keep the adapter until `release`; starts loading it if needed."""
        digest = adapter_folder.digest
        entry = self._entries.get(digest)
        if entry is None:
            future = self._pool.submit(self._load, adapter_folder)
            entry = self._entries[digest] = _Entry(future)
            future.add_done_callback(lambda _: self._wake())
        entry.wanted += 1
        self._entries.move_to_end(digest)

    def release(self, digest: str) -> list[str]:
        """Undo one `want`. Returns the digests dropped to stay within the bound."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.wanted -= 1
            assert entry.wanted >= 0, f"adapter {digest} was released more often than wanted"
        return self._drop_idle()

    def poll(self) -> list[Loaded]:
        """Return the loads that ended since the last call. Failed ones may be retried."""
        ended: list[Loaded] = []
        for digest, entry in list(self._entries.items()):
            if entry.reported or not entry.future.done():
                continue
            error = entry.future.exception()
            if error is None:
                entry.reported = True
                ended.append(Loaded(digest, entry.future.result(), None))
            elif isinstance(error, Exception):
                del self._entries[digest]
                ended.append(Loaded(digest, None, error))
            else:
                raise error
        return ended

    def get(self, digest: str) -> Any:
        """Return the loaded adapter; its load must have finished."""
        return self._entries[digest].future.result()

    @property
    def used_bytes(self) -> int:
        return sum(self._nbytes(e) for e in self._entries.values())

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _drop_idle(self) -> list[str]:
        excess = self.used_bytes - self.max_bytes
        dropped: list[str] = []
        for digest, entry in list(self._entries.items()):
            if excess <= 0:
                break
            if not entry.wanted and entry.reported:
                excess -= self._nbytes(entry)
                del self._entries[digest]
                dropped.append(digest)
        return dropped

    def _nbytes(self, entry: _Entry) -> int:
        return entry.future.result().nbytes if entry.reported else 0
