"""AdapterFetcher: bring adapters to the local disk, and pin them while requests use them.

One fetch and one pin per digest, however many requests want it. Adapters on the disk are looked up
in threads of their own, so they never wait for downloads.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from adapter_store.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    CacheFull,
    DownloadStopped,
    InvalidName,
    SourceUnavailable,
)
from adapter_store.names import AdapterRef
from deployments.replica.download_queue import DownloadQueue
from engine.messages import ErrorKind, RequestError

MAX_LOOKUPS = 8  # adapters on the disk being verified at once
MAX_DOWNLOADS = 64  # at once; each may be slow
SMOOTHING = 8  # loads over which a mean forgets
LINGER_S = 5.0  # that a download goes on for a client that may come back
DOWNLOAD_TIMEOUT_S = 300.0  # from request to arrival; one that is late goes on without waiters


class AdapterFiles(Protocol):
    """The part of `adapter_store.store.AdapterStore` that a replica uses."""

    def find_local(self, ref: AdapterRef, /) -> Path | None: ...
    def ensure_local(self, ref: AdapterRef, is_wanted: Callable[[], bool], /) -> Path: ...
    def distrust(self, digest: str, /) -> None: ...
    def pin(self, digest: str, /) -> None: ...
    def unpin(self, digest: str, /) -> None: ...


@dataclass(eq=False, slots=True)
class _Fetch:
    folder: asyncio.Future[Path]
    num_users: int = 0


@dataclass(eq=False, slots=True)
class _Wanted:
    is_wanted: bool = True

    def __call__(self) -> bool:
        return self.is_wanted


@dataclass(eq=False, slots=True)
class _Download:
    """One that is under way or waits for a thread, in which `wanted` is asked."""

    arrived: asyncio.Future[Path]
    wanted: _Wanted


class AdapterFetcher:
    """`acquire` and `release` come in pairs; the pin goes with the last release."""

    def __init__(self, files: AdapterFiles) -> None:
        self._files = files
        self._live: dict[str, _Fetch] = {}
        self._used: dict[str, None] = {}  # digests that arrived, the latest last
        self._lookups = ThreadPoolExecutor(MAX_LOOKUPS, "find-adapter")
        self._queue = DownloadQueue(MAX_DOWNLOADS)
        self._downloads: dict[str, _Download] = {}
        self.disk_load_s = 0.0  # smoothed time to look an adapter up; 0: not measured
        self.remote_load_s = 0.0  # the same of a download

    def acquire(self, ref: AdapterRef, tenant: str = "") -> asyncio.Future[Path]:
        """Future of the local folder. Shared: await it through asyncio.shield.

        A download counts as one of the tenant that asked for it first.
        """
        fetch = self._live.get(ref.digest)
        if fetch is None:
            fetch = self._live[ref.digest] = _Fetch(self._begin(ref, tenant))
        fetch.num_users += 1
        return fetch.folder

    def release(self, ref: AdapterRef) -> None:
        fetch = self._live[ref.digest]
        fetch.num_users -= 1
        if fetch.num_users == 0:
            del self._live[ref.digest]
            self._unpin_after(fetch.folder, ref.digest)
            if not fetch.folder.done():
                asyncio.get_running_loop().call_later(LINGER_S, self._give_up, ref.digest)

    def repair(self, ref: AdapterRef, tenant: str = "") -> None:
        """Verify an adapter that could not be read, and fetch it again if it is damaged.

        Those who acquire it from now on wait for that.
        """
        self._files.distrust(ref.digest)
        fetch = self._live.get(ref.digest)
        if fetch is not None and _has_arrived(fetch.folder):
            found, fetch.folder = fetch.folder, self._begin(ref, tenant)
            fetch.folder.add_done_callback(lambda _: self._unpin_after(found, ref.digest))

    def expected_s(self, digest: str) -> float:
        """Tell how long an adapter takes to be here, by the latest ones; 0 if not measured."""
        return self.disk_load_s if digest in self._used else self.remote_load_s

    def recent(self, limit: int) -> list[str]:
        """List digests that arrived here, the latest first. Some may have been evicted since."""
        return list(reversed(self._used))[:limit]

    def close(self) -> None:
        self._lookups.shutdown(wait=False, cancel_futures=True)
        self._queue.close()
        for fetch in self._live.values():
            fetch.folder.cancel()

    def _begin(self, ref: AdapterRef, tenant: str) -> asyncio.Future[Path]:
        folder = asyncio.get_running_loop().create_task(self._pin_and_fetch(ref, tenant))
        folder.add_done_callback(lambda done: self._note(ref.digest, done))
        return folder

    async def _pin_and_fetch(self, ref: AdapterRef, tenant: str) -> Path:
        """Leave a pin if and only if this returns."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        found = await loop.run_in_executor(self._lookups, self._pin_and_find, ref)
        if found is not None:
            self.disk_load_s = _smoothed(self.disk_load_s, loop.time() - began_s)
            return found
        if ref.digest not in self._live:  # all that wanted it have gone meanwhile
            self._files.unpin(ref.digest)
            raise DownloadStopped(f"{ref.digest} is not wanted any more")
        download = self._download(ref, tenant)
        try:
            async with asyncio.timeout(DOWNLOAD_TIMEOUT_S):
                folder = await asyncio.shield(download)
            self.remote_load_s = _smoothed(self.remote_load_s, loop.time() - began_s)
            return folder
        except TimeoutError:
            self._unpin_after(download, ref.digest, even_if_failed=True)
            raise SourceUnavailable(
                f"{ref.digest} has not come in {DOWNLOAD_TIMEOUT_S} s"
            ) from None
        except BaseException:
            self._unpin_after(download, ref.digest, even_if_failed=True)
            raise

    def _pin_and_find(self, ref: AdapterRef) -> Path | None:
        """Run in a thread. Leave a pin unless this raises."""
        self._files.pin(ref.digest)
        try:
            return self._files.find_local(ref)
        except BaseException:
            self._files.unpin(ref.digest)
            raise

    def _download(self, ref: AdapterRef, tenant: str) -> asyncio.Future[Path]:
        """Share the download of a digest with those that gave it up."""
        found = self._downloads.get(ref.digest)
        if found is None:
            wanted = _Wanted()
            arrived = self._queue.run(tenant, partial(self._files.ensure_local, ref, wanted))
            found = self._downloads[ref.digest] = _Download(arrived, wanted)
            arrived.add_done_callback(lambda _: self._forget(ref.digest, wanted))
        return found.arrived

    def _give_up(self, digest: str) -> None:
        """Stop a download for which nobody waits. Those who want it from now on begin anew."""
        download = self._downloads.get(digest)
        if download is not None and digest not in self._live:
            download.wanted.is_wanted = False
            self._forget(digest, download.wanted)

    def _forget(self, digest: str, wanted: _Wanted) -> None:
        download = self._downloads.get(digest)
        if download is not None and download.wanted is wanted:
            del self._downloads[digest]

    def _note(self, digest: str, fetched: asyncio.Future[Path]) -> None:
        if _has_arrived(fetched):
            self._used.pop(digest, None)
            self._used[digest] = None

    def _unpin_after(
        self, fetched: asyncio.Future[Path], digest: str, even_if_failed: bool = False
    ) -> None:
        """Unpin once a fetch has ended, now if it has; one that fails has left no pin."""

        def unpin(ended: asyncio.Future[Path]) -> None:
            if even_if_failed or _has_arrived(ended):
                self._files.unpin(digest)

        if fetched.done():
            unpin(fetched)
        else:
            fetched.add_done_callback(unpin)


def _smoothed(mean_s: float, latest_s: float) -> float:
    return latest_s if mean_s == 0.0 else mean_s + (latest_s - mean_s) / SMOOTHING


def _has_arrived(fetched: asyncio.Future[Path]) -> bool:
    return fetched.done() and not fetched.cancelled() and fetched.exception() is None


def adapter_error(error: Exception) -> RequestError:
    """Say why a request ends when the adapter store refuses its adapter.

    Clients see the message, so it tells nothing of the store or of this machine.
    """
    if isinstance(error, AdapterNotFound | InvalidName):
        return RequestError(ErrorKind.ADAPTER_NOT_FOUND, str(error))
    if isinstance(error, AdapterInvalid | AdapterTooLarge):
        return RequestError(ErrorKind.ADAPTER_INVALID, str(error))
    if isinstance(error, CacheFull):
        text = "The adapter cannot be fetched now: the replica's disk cache is full. Retry soon."
        return RequestError(ErrorKind.ADAPTER_UNAVAILABLE, text)
    if isinstance(error, SourceUnavailable | OSError):  # OSError: this machine's own disk
        text = "The adapter cannot be fetched now. Retry soon."
        return RequestError(ErrorKind.ADAPTER_UNAVAILABLE, text)
    return RequestError(ErrorKind.ENGINE_ERROR, "The adapter could not be loaded.")
