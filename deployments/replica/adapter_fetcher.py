"""AdapterFetcher: bring adapters to the local disk, and pin them while requests use them.

One fetch and one pin per digest, however many requests want it. Downloads run in threads; nothing
here waits for them.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapter_store.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    CacheFull,
    InvalidName,
    SourceUnavailable,
)
from adapter_store.names import AdapterRef
from engine.messages import ErrorKind, RequestError

MAX_FETCHES = 64  # adapters being fetched at once; each may be slow


class AdapterFiles(Protocol):
    """The part of `adapter_store.store.AdapterStore` that a replica uses."""

    def ensure_local(self, ref: AdapterRef) -> Path: ...
    def pin(self, digest: str) -> None: ...
    def unpin(self, digest: str) -> None: ...


@dataclass(eq=False, slots=True)
class _Fetch:
    folder: asyncio.Future[Path]
    num_users: int = 0


class AdapterFetcher:
    """`acquire` and `release` come in pairs; the pin goes with the last release."""

    def __init__(self, files: AdapterFiles) -> None:
        self._files = files
        self._live: dict[str, _Fetch] = {}
        self._used: dict[str, None] = {}  # digests that arrived, the latest last
        self._threads = ThreadPoolExecutor(MAX_FETCHES, "fetch-adapter")

    def acquire(self, ref: AdapterRef) -> asyncio.Future[Path]:
        """Future of the local folder. Shared: await it through asyncio.shield."""
        fetch = self._live.get(ref.digest)
        if fetch is None:
            loop = asyncio.get_running_loop()
            folder = loop.run_in_executor(self._threads, self._pin_and_fetch, ref)
            fetch = self._live[ref.digest] = _Fetch(folder)
            folder.add_done_callback(lambda done: self._note(ref.digest, done))
        fetch.num_users += 1
        return fetch.folder

    def release(self, ref: AdapterRef) -> None:
        fetch = self._live[ref.digest]
        fetch.num_users -= 1
        if fetch.num_users == 0:
            del self._live[ref.digest]
            fetch.folder.add_done_callback(lambda done: self._unpin(ref.digest, done))

    def recent(self, limit: int) -> list[str]:
        """List digests that arrived here, the latest first. Some may have been evicted since."""
        return list(reversed(self._used))[:limit]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _pin_and_fetch(self, ref: AdapterRef) -> Path:
        """Run in a thread. Leaves a pin if and only if it returns."""
        self._files.pin(ref.digest)
        try:
            return self._files.ensure_local(ref)
        except BaseException:
            self._files.unpin(ref.digest)
            raise

    def _note(self, digest: str, fetched: asyncio.Future[Path]) -> None:
        if _has_arrived(fetched):
            self._used.pop(digest, None)
            self._used[digest] = None

    def _unpin(self, digest: str, fetched: asyncio.Future[Path]) -> None:
        if _has_arrived(fetched):
            self._files.unpin(digest)


def _has_arrived(fetched: asyncio.Future[Path]) -> bool:
    return not fetched.cancelled() and fetched.exception() is None


def adapter_error(error: Exception) -> RequestError:
    """Say why a request ends when the adapter store refuses its adapter."""
    if isinstance(error, AdapterNotFound | InvalidName):
        return RequestError(ErrorKind.ADAPTER_NOT_FOUND, str(error))
    if isinstance(error, AdapterInvalid | AdapterTooLarge):
        return RequestError(ErrorKind.ADAPTER_INVALID, str(error))
    if isinstance(error, SourceUnavailable | CacheFull):
        return RequestError(
            ErrorKind.ADAPTER_UNAVAILABLE, f"The adapter cannot be fetched now: {error}"
        )
    return RequestError(ErrorKind.ENGINE_ERROR, f"The adapter could not be loaded: {error!r}")
