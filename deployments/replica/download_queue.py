"""DownloadQueue: run downloads in a bounded number of threads, shared fairly between tenants.

A tenant may begin a download only while more threads are free than it has downloads under way. So a
tenant whose downloads hang takes at most half of what was free, and the next one finds the rest.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Download = Callable[[], Path]


class DownloadQueue:
    """Use it in one event loop. A future that it returns must be awaited through asyncio.shield."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "fetch-adapter")
        self._num_free = num_threads
        self._num_running: Counter[str] = Counter()  # by tenant
        self._waiting: dict[str, deque[tuple[Download, asyncio.Future[Path]]]] = {}

    def run(self, tenant: str, download: Download) -> asyncio.Future[Path]:
        """Run a download as soon as the tenant may begin one."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append((download, done))
        self._begin_due()
        return done

    def close(self) -> None:
        """Begin nothing more; threads that are at work are not waited for."""
        self._waiting.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin_due(self) -> None:
        while self._waiting:
            tenant = min(self._waiting, key=lambda each: self._num_running[each])
            if self._num_running[tenant] >= self._num_free:
                return
            download, done = self._waiting[tenant].popleft()
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            self._begin(tenant, download, done)

    def _begin(self, tenant: str, download: Download, done: asyncio.Future[Path]) -> None:
        self._num_free -= 1
        self._num_running[tenant] += 1
        running = asyncio.get_running_loop().run_in_executor(self._threads, download)
        running.add_done_callback(lambda ended: self._end(tenant, ended, done))

    def _end(self, tenant: str, ended: asyncio.Future[Path], done: asyncio.Future[Path]) -> None:
        self._num_free += 1
        self._num_running -= Counter([tenant])  # drops a tenant with none
        if ended.cancelled():
            done.cancel()
            return
        error = ended.exception()
        if not done.done():
            if error is None:
                done.set_result(ended.result())
            else:
                done.set_exception(error)
                done.exception()  # there may be nobody left who waits for it
        self._begin_due()
