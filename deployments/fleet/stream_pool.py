"""StreamPool: an ingress' streams to the replicas of one Engine deployment.

There is one to each replica that has taken a request, and one to any replica while there is no
request, so that it is known what the deployment serves.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Protocol

from deployments.fleet.background_tasks import BackgroundTasks
from deployments.fleet.protocol import Connection, Frame, Hello, Hints, Lease
from deployments.fleet.replica_stream import ReplicaStream
from deployments.fleet.timing import Timing
from engine.messages import EngineStats

logger = logging.getLogger(__name__)


class StreamEvents(Protocol):
    """The owner of the requests."""

    def on_frame(self, stream: ReplicaStream, frame: Frame) -> None: ...
    def on_lease(self, stream: ReplicaStream, lease: Lease) -> None: ...
    def on_lost(self, stream: ReplicaStream) -> None: ...
    def on_hello(self) -> None: ...


class StreamPool:
    """Opens streams and forgets them. A replica's epoch ends with a stream that is given up."""

    def __init__(
        self,
        connection: Connection,
        ingress_id: str,
        events: StreamEvents,
        tasks: BackgroundTasks,
        timing: Timing,
    ) -> None:
        self.epochs: dict[str, int] = {}
        self._connection = connection
        self._ingress_id = ingress_id
        self._events = events
        self._tasks = tasks
        self._timing = timing
        self._streams: dict[str, ReplicaStream] = {}
        self._discovery: ReplicaStream | None = None
        self._suspects: dict[str, float] = {}
        self._hello: Hello | None = None
        self._knows_all = False  # there is no replica but those with a stream, and lost ones
        self._alone_since_s = 0.0

    # ---- what is known -------------------------------------------------------------------

    @property
    def hello(self) -> Hello | None:
        """The latest of any replica; None if there has been no replica for a while."""
        is_recent = (
            self._streams or self._timing.clock() - self._alone_since_s < self._timing.hello_s
        )
        return self._hello if is_recent else None

    @property
    def stats(self) -> EngineStats:
        """The last known figures of all replicas with a stream, added up."""
        return _sum([stream.stats for stream in self._streams.values()])

    @property
    def num_held(self) -> int:
        """Count the requests of this ingress that replicas knew in their last leases."""
        return sum(stream.num_held for stream in self._streams.values())

    @property
    def takes_requests(self) -> bool:
        """Tell whether there is a stream to a replica that is not being stopped."""
        return any(not stream.is_draining for stream in self.greeted())

    def greeted(self) -> list[ReplicaStream]:
        return [stream for stream in self._streams.values() if stream.hello is not None]

    @property
    def outage(self) -> str | None:
        """Why no replica takes requests; None while one does, or may."""
        if not self._knows_all or not self._are_all_down():
            return None
        troubles = [stream.trouble for stream in self._streams.values()]
        return "; ".join(dict.fromkeys(filter(None, troubles)))

    def _are_all_down(self) -> bool:
        """Tell whether all that are known have said so; one that is being stopped counts too."""
        streams = self._streams.values()
        down = [stream for stream in streams if stream.trouble is not None]
        others = [stream for stream in streams if stream.trouble is None]
        return bool(down) and all(stream.is_draining for stream in others)

    def suspects(self) -> list[str]:
        """Replicas that were lost a short time ago."""
        now = self._timing.clock()
        self._suspects = {r: until for r, until in self._suspects.items() if until > now}
        return list(self._suspects)

    # ---- for one replica -----------------------------------------------------------------

    async def until_known(self, replica_id: str) -> None:
        """Wait for the greeting of the stream to any replica: it may be this very one."""
        if self._discovery is not None and replica_id not in self._streams:
            await self._discovery.has_settled.wait()

    def find(self, replica_id: str, epoch: int) -> ReplicaStream | None:
        """The stream to a replica, opened if need be; None if another epoch has begun."""
        if epoch != self.epochs.get(replica_id, 0):
            return None
        return self._streams.get(replica_id) or self._open(replica_id)

    def abort(self, replica_id: str, request_id: str) -> None:
        if replica_id in self._streams:
            self._streams[replica_id].abort([request_id])

    # ---- opening and ending --------------------------------------------------------------

    async def look_for_others(self) -> None:
        """Find a replica that has no stream yet, if those that have one are all down."""
        if not self._are_all_down():
            self._knows_all = False
            return
        known = (*self._streams, *self.suspects())
        async with asyncio.timeout(self._timing.silence_s):
            replica_id = await self._connection.choose(Hints(avoid=known))
        self._knows_all = replica_id in known
        if not self._knows_all and replica_id not in self._streams:
            self._open(replica_id)

    async def discover(self) -> None:
        """Run a stream to any replica until it ends, unless there is a stream already."""
        if self._discovery is None and not self.takes_requests:
            stream = self._discovery = self._new_stream("")
            await self._run(stream)

    def _open(self, replica_id: str) -> ReplicaStream:
        stream = self._streams[replica_id] = self._new_stream(replica_id)
        self._tasks.start(self._run(stream))
        return stream

    def _new_stream(self, replica_id: str) -> ReplicaStream:
        return ReplicaStream(
            self._connection,
            self._ingress_id,
            replica_id,
            self.epochs,
            self._timing,
            self._events.on_frame,
            self._events.on_lease,
        )

    async def _run(self, stream: ReplicaStream) -> None:
        try:
            await stream.run(self._on_hello)
            reason = "the stream ended"
        except Exception as error:  # whatever Ray raises for a replica that dies or hangs
            reason = repr(error)
        finally:
            self._forget(stream)
        if not stream.is_draining:
            logger.warning("stream to engine replica %r: %s", stream.replica_id or "any", reason)
        if not stream.is_draining and stream.replica_id:
            self._suspects[stream.replica_id] = self._timing.clock() + self._timing.suspect_s
        self._events.on_lost(stream)

    def _on_hello(self, stream: ReplicaStream) -> None:
        self._hello = stream.hello
        self._streams[stream.replica_id] = stream
        self._suspects.pop(stream.replica_id, None)
        if stream is self._discovery:
            self._discovery = None
        self._events.on_hello()

    def _forget(self, stream: ReplicaStream) -> None:
        replica_id = stream.replica_id
        if stream is self._discovery:
            self._discovery = None
        if self._streams.get(replica_id) is stream:
            del self._streams[replica_id]
            self.epochs[replica_id] = self.epochs.get(replica_id, 0) + 1
            self._alone_since_s = self._timing.clock()


def _sum(all_stats: Sequence[EngineStats]) -> EngineStats:
    """Adapters that several replicas hold count once for each."""
    if not all_stats:
        return EngineStats()
    sums: dict[str, Any] = {}
    for field in fields(EngineStats):
        values = [getattr(stats, field.name) for stats in all_stats]
        sums[field.name] = sum(values[1:], values[0])  # from the first: some are tuples
    return EngineStats(**sums)
