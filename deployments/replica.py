"""EngineReplica: one adapter store and one engine behind `attach` and `control`.

It fetches adapters off the engine's path, pins them while a request uses them, splits each
engine frame by ingress, and lets go of the requests whose ingress is gone. No text, no HTTP, no
tenants' keys; no torch: the engine is a process of its own.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from adapter_store.names import AdapterRef
from deployments.errors import OVERLOADED, adapter_error
from deployments.transport import (
    Abort,
    Command,
    Frame,
    Hello,
    Lease,
    Submit,
    UnknownStream,
)
from engine.client import EngineUnavailable
from engine.messages import (
    ENGINE_DIED,
    AdapterFolder,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Item,
    RequestError,
    RequestOutput,
)

LEASE_S = 8.0  # an ingress that says nothing for so long is gone
MAX_FETCHES = 64  # adapters being fetched at once; each may be slow

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """`engine.client.EngineClient`, or a deterministic stand-in."""

    stats: EngineStats
    failure: str | None  # why the process is not started again any more

    @property
    def info(self) -> EngineInfo: ...
    async def start(self) -> EngineInfo: ...
    def submit(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    async def close(self) -> None: ...


class Store(Protocol):
    """The part of `adapter_store.store.AdapterStore` that a replica uses."""

    def ensure_local(self, ref: AdapterRef) -> Path: ...
    def pin(self, digest: str) -> None: ...
    def unpin(self, digest: str) -> None: ...


@dataclass(eq=False, slots=True)
class Stream:
    """One ingress. `items` is what it has not been sent yet."""

    stream_id: str
    renewed_s: float
    items: list[Item] = field(default_factory=list[Item])
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    is_open: bool = True
    request_ids: dict[str, None] = field(default_factory=dict[str, None])


@dataclass(eq=False, slots=True)
class Route:
    """One live request. `adapter` is set while this request keeps it pinned."""

    stream: Stream
    request: GenerateRequest
    num_open: int  # choices that have not finished
    adapter: AdapterRef | None = None
    admission: asyncio.Task[None] | None = None


@dataclass(eq=False, slots=True)
class Fetch:
    """An adapter on its way to the local disk, or there, and how many requests hold it."""

    folder: asyncio.Future[Path]
    num_users: int = 0


class EngineReplica:
    """Owns the routes: every accepted request ends with one last output per choice, or its
    ingress is gone. `make_engine` is given the callback for the engine's frames.
    """

    def __init__(
        self,
        make_engine: Callable[[Callable[[list[Item]], None]], Engine],
        store: Store,
        base_fingerprint: str,
        max_requests: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = make_engine(self.on_frame)
        self._store = store
        self._base_fingerprint = base_fingerprint
        self._max_requests = max_requests
        self._clock = clock
        self._streams: dict[str, Stream] = {}
        self._routes: dict[str, Route] = {}
        self._fetches: dict[str, Fetch] = {}
        self._fetchers = ThreadPoolExecutor(MAX_FETCHES, "fetch-adapter")
        self._reaper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Waits until the model is loaded. Raises what the engine raises."""
        await self._engine.start()
        self._reaper = asyncio.create_task(self._reap())

    async def close(self) -> None:
        if self._reaper is not None:
            self._reaper.cancel()
        for stream in list(self._streams.values()):
            self._detach(stream)
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        await self._engine.close()

    def check_health(self) -> None:
        """Raises when the engine's process is gone for good."""
        if self._engine.failure is not None:
            raise RuntimeError(self._engine.failure)

    # ---- to the ingress: frames ----------------------------------------------------------

    async def attach(self, stream_id: str) -> AsyncIterator[Hello | Frame]:
        """A Hello, then a frame whenever there is news, until one side goes away."""
        stream = Stream(stream_id, self._clock())
        self._streams[stream_id] = stream
        try:
            yield Hello(self._engine.info, self._base_fingerprint)
            while stream.is_open:
                await stream.wake.wait()
                stream.wake.clear()
                if stream.items:
                    frame, stream.items = stream.items, []
                    yield frame
        finally:
            self._detach(stream)

    def on_frame(self, items: list[Item]) -> None:
        """Called by the engine once per step: hands each item to its ingress."""
        touched: dict[str, Stream] = {}
        for item in items:
            is_plain = isinstance(item, tuple)
            request_id = item[0] if is_plain else item.request_id
            route = self._routes.get(request_id)
            if route is None:
                continue  # aborted while this was on its way
            stream = route.stream
            stream.items.append(item)
            touched[stream.stream_id] = stream
            if not is_plain and item.finish_reason is not None:
                self._finish_choice(request_id, route)
        for stream in touched.values():
            stream.wake.set()

    def _finish_choice(self, request_id: str, route: Route) -> None:
        route.num_open -= 1
        if route.num_open == 0:
            self._release(request_id, route)

    def _fail(self, request_id: str, error: RequestError) -> None:
        """The last output of every choice of a request that never reached the engine."""
        n = self._routes[request_id].request.n
        self.on_frame(
            [
                RequestOutput(request_id, index, [], finish_reason="error", error=error)
                for index in range(n)
            ]
        )

    # ---- from the ingress: commands ------------------------------------------------------

    async def control(
        self, stream_id: str, commands: Sequence[Command], renew: bool
    ) -> Lease | None:
        stream = self._streams.get(stream_id)
        if stream is None:
            raise UnknownStream(stream_id)
        stream.renewed_s = self._clock()
        for command in commands:
            if isinstance(command, Submit):
                self._submit(stream, command)
            else:
                self._abort(command)
        if not renew:
            return None
        return Lease(frozenset(stream.request_ids), self._engine.stats)

    def _submit(self, stream: Stream, submit: Submit) -> None:
        request = submit.request
        route = Route(stream, request, request.n)
        self._routes[request.request_id] = route
        stream.request_ids[request.request_id] = None
        if len(self._routes) > self._max_requests:
            message = f"{self._max_requests} requests are running or queued, which is the limit."
            self._fail(request.request_id, RequestError(OVERLOADED, message))
        elif submit.adapter is None:
            self._start(request)
        else:
            folder = self._acquire_adapter(submit.adapter)
            route.adapter = submit.adapter
            route.admission = asyncio.create_task(self._start_with(folder, route, submit.adapter))

    def _start(self, request: GenerateRequest) -> None:
        try:
            self._engine.submit(request)
        except EngineUnavailable as error:
            self._fail(request.request_id, RequestError(ENGINE_DIED, str(error)))

    def _abort(self, command: Abort) -> None:
        route = self._routes.get(command.request_id)
        if route is not None:
            self._drop(command.request_id, route)

    def _drop(self, request_id: str, route: Route) -> None:
        """The ingress no longer wants it: nothing more is sent for it."""
        if route.admission is not None:
            route.admission.cancel()
        self._engine.abort(request_id)
        self._release(request_id, route)

    def _release(self, request_id: str, route: Route) -> None:
        del self._routes[request_id]
        del route.stream.request_ids[request_id]
        if route.adapter is not None:
            self._release_adapter(route.adapter)

    # ---- adapters ------------------------------------------------------------------------

    async def _start_with(
        self, folder: asyncio.Future[Path], route: Route, ref: AdapterRef
    ) -> None:
        try:
            path = await asyncio.shield(folder)  # others may be waiting for it too
        except Exception as error:
            logger.warning("adapter %s of %s: %r", ref.name, ref.tenant, error)
            self._fail(route.request.request_id, adapter_error(error))
            return
        self._start(replace(route.request, adapter=AdapterFolder(ref.digest, str(path))))

    def _acquire_adapter(self, ref: AdapterRef) -> asyncio.Future[Path]:
        """One fetch and one pin per digest, however many requests want it."""
        fetch = self._fetches.get(ref.digest)
        if fetch is None:
            loop = asyncio.get_running_loop()
            folder = loop.run_in_executor(self._fetchers, self._pin_and_fetch, ref)
            fetch = self._fetches[ref.digest] = Fetch(folder)
        fetch.num_users += 1
        return fetch.folder

    def _release_adapter(self, ref: AdapterRef) -> None:
        fetch = self._fetches[ref.digest]
        fetch.num_users -= 1
        if fetch.num_users == 0:
            del self._fetches[ref.digest]
            fetch.folder.add_done_callback(lambda done: self._unpin(ref.digest, done))

    def _pin_and_fetch(self, ref: AdapterRef) -> Path:
        """In a thread. Leaves a pin if and only if it returns."""
        self._store.pin(ref.digest)
        try:
            return self._store.ensure_local(ref)
        except BaseException:
            self._store.unpin(ref.digest)
            raise

    def _unpin(self, digest: str, fetched: asyncio.Future[Path]) -> None:
        if not fetched.cancelled() and fetched.exception() is None:
            self._store.unpin(digest)

    # ---- ingress replicas that went away -------------------------------------------------

    def _detach(self, stream: Stream) -> None:
        stream.is_open = False
        stream.wake.set()
        self._streams.pop(stream.stream_id, None)
        for request_id in list(stream.request_ids):
            self._drop(request_id, self._routes[request_id])

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self.reap(self._clock())

    def reap(self, now: float) -> None:
        for stream in list(self._streams.values()):
            if now - stream.renewed_s > LEASE_S:
                logger.warning("ingress stream %s fell silent", stream.stream_id)
                self._detach(stream)
