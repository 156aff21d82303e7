"""EngineReplica: one adapter store and one engine behind `submit`, `attach` and `control`.

It has adapters fetched off the engine's path, splits each engine frame by ingress, and lets go of
the requests whose ingress is gone. Told to drain, it takes nothing new, finishes what it can and
hands the rest back. No text, no HTTP, no tenants' keys, no Ray; no torch: the engine is a process
of its own.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from adapter_store.names import AdapterRef
from deployments.fleet.protocol import (
    Abort,
    Frame,
    Hello,
    Lease,
    Receipt,
    StreamId,
    Submit,
    UnknownStream,
)
from deployments.policy.autoscaling import ReplicaLoad
from deployments.policy.routing import ReplicaFigures
from deployments.replica.adapter_fetcher import Fetches, Store, adapter_error
from engine.client import EngineUnavailable
from engine.messages import (
    AdapterFolder,
    EngineInfo,
    EngineStats,
    ErrorKind,
    GenerateRequest,
    Item,
    RequestError,
    RequestOutput,
)

LEASE_S = 8.0  # an ingress that says nothing for so long is gone
MAX_DISK_ADAPTERS = 256  # of those that are reported to routers

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """`engine.client.EngineClient`, or a deterministic stand-in."""

    stats: EngineStats
    failure: str | None  # why the process is not started again any more

    @property
    def info(self) -> EngineInfo: ...
    @property
    def is_ready(self) -> bool: ...
    async def start(self) -> EngineInfo: ...
    def submit(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    replica_id: str
    base_fingerprint: str
    max_num_seqs: int
    max_requests: int  # running and queued
    drain_s: float = 30.0  # for running requests to finish once the replica is being stopped


@dataclass(eq=False, slots=True)
class Stream:
    """One ingress. `items` is what it has not been sent yet."""

    id: StreamId
    renewed_s: float
    items: list[Item] = field(default_factory=list[Item])
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    is_open: bool = True
    is_attached: bool = False
    request_ids: dict[str, None] = field(default_factory=dict[str, None])


@dataclass(eq=False, slots=True)
class Route:
    """One live request. `adapter_ref` is set while this request keeps it pinned."""

    stream: Stream
    request: GenerateRequest
    num_open: int  # choices that have not finished
    adapter_ref: AdapterRef | None = None
    admission: asyncio.Task[None] | None = None


class EngineReplica:
    """Owns the routes: every accepted request ends with one last output per choice, or its
    ingress is gone. `make_engine` is given the callback for the engine's frames.
    """

    def __init__(
        self,
        make_engine: Callable[[Callable[[list[Item]], None]], Engine],
        store: Store,
        settings: ReplicaSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = make_engine(self.on_frame)
        self._settings = settings
        self._clock = clock
        self._streams: dict[str, Stream] = {}
        self._routes: dict[str, Route] = {}
        self._fetches = Fetches(store)
        self._num_received = 0
        self._draining_since_s: float | None = None
        self._caretaker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Waits until the model is loaded. Raises what the engine raises."""
        await self._engine.start()
        self._caretaker = asyncio.create_task(self._take_care())

    async def close(self) -> None:
        if self._caretaker is not None:
            self._caretaker.cancel()
        for stream in list(self._streams.values()):
            self._detach(stream)
        self._fetches.close()
        await self._engine.close()

    def check_health(self) -> None:
        """Raises when the engine's process is gone for good."""
        if self._engine.failure is not None:
            raise RuntimeError(self._engine.failure)

    # ---- to the ingress: frames ----------------------------------------------------------

    async def attach(
        self, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncIterator[Hello | Frame]:
        """A Hello, then a frame whenever there is news, until one side goes away or this replica
        is draining and has nothing left for that ingress."""
        settings = self._settings
        stream = self._stream(ingress_id, epochs.get(settings.replica_id, 0))
        if stream is None or stream.is_attached:
            raise UnknownStream(f"{ingress_id} has another stream to {settings.replica_id}")
        stream.is_attached = True
        stream.renewed_s = self._clock()
        try:
            engine = self._engine.info
            yield Hello(engine, settings.base_fingerprint, settings.replica_id, stream.id.epoch)
            while stream.is_open and not self._has_drained(stream):
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
            touched[stream.id.ingress_id] = stream
            if not is_plain and item.finish_reason is not None:
                self._finish_choice(request_id, route)
        for stream in touched.values():
            stream.wake.set()

    def _finish_choice(self, request_id: str, route: Route) -> None:
        route.num_open -= 1
        if route.num_open == 0:
            self._release(request_id, route)

    def _fail(self, request_id: str, error: RequestError) -> None:
        """The last output of every choice that has not had one."""
        n = self._routes[request_id].request.n
        self.on_frame(
            [
                RequestOutput(request_id, index, [], finish_reason="error", error=error)
                for index in range(n)
            ]
        )

    # ---- from the ingress ----------------------------------------------------------------

    def submit(self, ingress_id: str, epochs: Mapping[str, int], submit: Submit) -> Receipt:
        """Takes the request or says why not. To be asked twice for the same one is no error."""
        replica_id = self._settings.replica_id
        epoch = epochs.get(replica_id, 0)
        if submit.request.request_id in self._routes:
            return Receipt(replica_id, epoch)
        refusal = self._refusal()
        if refusal is None:
            stream = self._stream(ingress_id, epoch)
            if stream is not None:
                self._accept(stream, submit)
                return Receipt(replica_id, epoch)
            refusal = RequestError(
                ErrorKind.STALE_STREAM, f"{ingress_id} has opened a later stream"
            )
        return Receipt(replica_id, epoch, refusal)

    async def control(
        self, stream_id: StreamId, aborts: Sequence[Abort], renew: bool
    ) -> Lease | None:
        stream = self._streams.get(stream_id.ingress_id)
        if stream is None or stream.id != stream_id:
            raise UnknownStream(stream_id)
        stream.renewed_s = self._clock()
        for abort in aborts:
            route = self._routes.get(abort.request_id)
            if route is not None:
                self._drop(abort.request_id, route)
        if not renew and not self.is_draining:
            return None
        return Lease(frozenset(stream.request_ids), self._engine.stats, self.is_draining)

    def _refusal(self) -> RequestError | None:
        if self.is_draining:
            return RequestError(ErrorKind.DRAINING, "the replica is being stopped")
        if not self._engine.is_ready:
            reason = self._engine.failure or "the engine is being started again"
            return RequestError(ErrorKind.ENGINE_DIED, reason)
        limit = self._settings.max_requests
        if len(self._routes) >= limit:
            message = f"{limit} requests are running or queued, which is the limit."
            return RequestError(ErrorKind.OVERLOADED, message)
        return None

    def _accept(self, stream: Stream, submit: Submit) -> None:
        request = submit.request
        route = Route(stream, request, request.n)
        self._num_received += 1
        self._routes[request.request_id] = route
        stream.request_ids[request.request_id] = None
        if submit.adapter_ref is None:
            self._start(request)
        else:
            folder = self._fetches.acquire(submit.adapter_ref)
            route.adapter_ref = submit.adapter_ref
            route.admission = asyncio.create_task(
                self._start_with(folder, route, submit.adapter_ref)
            )

    async def _start_with(
        self, folder: asyncio.Future[Path], route: Route, ref: AdapterRef
    ) -> None:
        try:
            path = await asyncio.shield(folder)  # others may be waiting for it too
        except Exception as error:
            logger.warning("adapter %s of %s: %r", ref.name, ref.tenant, error)
            self._fail(route.request.request_id, adapter_error(error))
            return
        route.admission = None
        self._start(replace(route.request, adapter_folder=AdapterFolder(ref.digest, str(path))))

    def _start(self, request: GenerateRequest) -> None:
        try:
            self._engine.submit(request)
        except EngineUnavailable as error:
            self._fail(request.request_id, RequestError(ErrorKind.ENGINE_DIED, str(error)))

    def _drop(self, request_id: str, route: Route) -> None:
        """The ingress no longer wants it: nothing more is sent for it."""
        if route.admission is not None:
            route.admission.cancel()
        self._engine.abort(request_id)
        self._release(request_id, route)

    def _release(self, request_id: str, route: Route) -> None:
        del self._routes[request_id]
        del route.stream.request_ids[request_id]
        if route.adapter_ref is not None:
            self._fetches.release(route.adapter_ref)
        if self.is_draining:
            route.stream.wake.set()

    # ---- streams -------------------------------------------------------------------------

    def _stream(self, ingress_id: str, epoch: int) -> Stream | None:
        """That ingress' stream of that epoch, opened if need be; None if a later one is there."""
        stream = self._streams.get(ingress_id)
        if stream is not None and stream.id.epoch > epoch:
            return None
        if stream is not None and stream.id.epoch < epoch:
            self._detach(stream)  # given up by the ingress, unnoticed here so far
            stream = None
        if stream is None:
            stream = Stream(StreamId(ingress_id, epoch), self._clock())
            self._streams[ingress_id] = stream
        return stream

    def _detach(self, stream: Stream) -> None:
        stream.is_open = False
        stream.wake.set()
        if self._streams.get(stream.id.ingress_id) is stream:
            del self._streams[stream.id.ingress_id]
        for request_id in list(stream.request_ids):
            self._drop(request_id, self._routes[request_id])

    async def _take_care(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.take_care(self._clock())

    def take_care(self, now: float) -> None:
        """Reaps the requests of silent ingresses; ends a drain that has lasted long enough."""
        for stream in list(self._streams.values()):
            if now - stream.renewed_s > LEASE_S:
                logger.warning("ingress stream %s fell silent", stream.id)
                self._detach(stream)
        since_s = self._draining_since_s
        if since_s is not None and now - since_s > self._settings.drain_s:
            self._hand_back()

    # ---- the way out ---------------------------------------------------------------------

    @property
    def is_draining(self) -> bool:
        return self._draining_since_s is not None

    def drain(self) -> None:
        """From now on nothing new; streams end when their last request has. To be told twice is
        no error."""
        if self._draining_since_s is None:
            logger.warning("draining: %d requests are to finish", len(self._routes))
            self._draining_since_s = self._clock()
            for stream in self._streams.values():
                stream.wake.set()

    def _has_drained(self, stream: Stream) -> bool:
        return self.is_draining and not stream.request_ids and not stream.items

    def _hand_back(self) -> None:
        error = RequestError(ErrorKind.HANDED_BACK, "The replica was stopped.")
        for request_id, route in list(self._routes.items()):
            if route.admission is not None:
                route.admission.cancel()
            self._engine.abort(request_id)
            self._fail(request_id, error)

    # ---- figures -------------------------------------------------------------------------

    def figures(self) -> ReplicaFigures:
        """For routers."""
        stats = self._engine.stats
        return ReplicaFigures(
            num_received=self._num_received,
            queued_tokens=self._queued_tokens(),
            num_requests=self._num_open(),
            max_num_seqs=self._settings.max_num_seqs,
            kv_used=_kv_used(stats),
            device_adapters=frozenset(stats.resident_adapters),
            disk_adapters=frozenset(self._fetches.recent(MAX_DISK_ADAPTERS)),
        )

    def load(self) -> ReplicaLoad:
        """For the autoscaler."""
        return ReplicaLoad(
            self._queued_tokens(), _kv_used(self._engine.stats), float(self._num_open())
        )

    def _num_open(self) -> int:
        """Choices, for it is they that take a place in the batch."""
        return sum(route.num_open for route in self._routes.values())

    def _queued_tokens(self) -> int:
        """Prompt tokens to be computed: in the engine, and of those whose adapter is on its way."""
        waiting = [route for route in self._routes.values() if route.admission is not None]
        on_their_way = sum(len(route.request.prompt_token_ids) for route in waiting)
        return self._engine.stats.queued_tokens + on_their_way


def _kv_used(stats: EngineStats) -> float:
    return stats.num_blocks_used / stats.num_blocks_total if stats.num_blocks_total else 0.0
