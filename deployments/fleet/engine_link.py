"""EngineLink: an ingress replica's side of one Engine deployment, however many replicas it has.

Hands requests over, and passes what comes back to the readers' queues. A request whose replica is
lost goes on at another; every queue gets a last output for every choice, whatever happens.

    open -> ResumableRequest -> Attempt -> Placement -> a replica's stream (StreamPool)
    queue <- ResumableRequest <- Attempt <-------------- on_frame
"""

import asyncio
import logging
import uuid
from collections.abc import Collection, Sequence

from adapter_store.names import AdapterRef
from deployments.fleet.background_tasks import BackgroundTasks
from deployments.fleet.batch_queue import BatchQueue
from deployments.fleet.engine_totals import EngineTotals
from deployments.fleet.failover import Attempt, ResumableRequest
from deployments.fleet.held_requests import HeldRequests, ModelNotReady
from deployments.fleet.leases import forgotten_attempts, orphans
from deployments.fleet.placement import Placement
from deployments.fleet.protocol import Connection, Frame, Hello, Lease, Submit
from deployments.fleet.replica_stream import ReplicaStream
from deployments.fleet.stream_pool import StreamPool
from deployments.fleet.timing import Timing
from deployments.fleet.wanted_adapters import WantedAdapters
from engine.messages import (
    EngineStats,
    ErrorKind,
    GenerateRequest,
    Item,
    RequestError,
    RequestOutput,
)
from engine.scheduler.request import SamplingParams

# After this many lost replicas in a row, none of which brought a token, the request itself is the
# likely cause: it fails. So does one that has lost far more than accidents explain.
MAX_FRUITLESS = 4
MAX_LOSSES = 10
# Errors that another replica, or another try, may not have.
ELSEWHERE = (ErrorKind.ENGINE_DIED, ErrorKind.HANDED_BACK, ErrorKind.ADAPTER_DAMAGED)


NEVER_HEARD = "no engine replica has been heard of for a while"

logger = logging.getLogger(__name__)


class EngineLink:
    """Owns the live attempts: each is looking for a replica, or at exactly one.

    Where the deployment may be at zero replicas, requests are held until there is one, at most
    `max_held` of them, for `timing.hold_s`; without a request none is asked for.
    """

    def __init__(
        self,
        connection: Connection,
        ingress_id: str,
        timing: Timing | None = None,
        max_held: int | None = None,
    ) -> None:
        self._timing = timing or Timing()
        self.held: HeldRequests | None = None
        if max_held is not None:
            self.held = HeldRequests(self._timing.hold_s, max_held, self._timing.clock)
        self._attempts: dict[str, Attempt] = {}
        self._requests: dict[BatchQueue[Item], list[ResumableRequest]] = {}
        self._totals = EngineTotals()
        self._wanted = WantedAdapters(self._timing.clock)
        self._tasks = BackgroundTasks()
        self._streams = StreamPool(connection, ingress_id, self, self._tasks, self._timing)
        self._placement = Placement(
            connection, ingress_id, self._streams, self._attempts, self._timing
        )

    def start(self) -> None:
        self._tasks.start(self._keep_known())
        self._tasks.start(self._keep_looking())

    async def close(self) -> None:
        await self._tasks.close()

    @property
    def hello(self) -> Hello | None:
        """What any replica last said; None if there has been none for a while."""
        return self._streams.hello

    @property
    def outage(self) -> str | None:
        """Why no request can be answered now, in words for clients; None if one may be."""
        if self.hello is not None:
            return self._streams.outage
        return NEVER_HEARD if self.held is None or self.held.is_late else None

    @property
    def is_asleep(self) -> bool:
        """Tell whether there is no replica, and the next request will start one."""
        return self.held is not None and self.hello is None and not self.held.is_late

    @property
    def stats(self) -> EngineStats:
        """The last known figures of all replicas with a stream; totals of all there have been."""
        return self._totals.put_into(self._streams.stats)

    @property
    def num_live(self) -> int:
        """Count the requests that are looking for a replica, or are at one."""
        return len(self._attempts)

    @property
    def num_held(self) -> int:
        """Count the requests of this ingress that replicas knew in their last leases."""
        return self._streams.num_held

    def adapters_for(self, newcomer: str) -> list[AdapterRef]:
        """List what a replica that starts will be asked for, the most wanted first."""
        streams = self._streams.greeted()
        room = max((len(stream.stats.resident_adapters) for stream in streams), default=0)
        ids = [stream.replica_id for stream in streams]
        return self._wanted.of_newcomer(newcomer, ids, self.num_live, room)

    def holders(self, digests: Collection[str]) -> list[str]:
        """List the replicas that have one of these adapters in memory, as they last said."""
        return [
            stream.replica_id
            for stream in self._streams.greeted()
            if not stream.is_draining
            and not set(digests).isdisjoint(stream.stats.adapters_in_memory)
        ]

    async def warm(self, ref: AdapterRef, replica_id: str) -> RequestError | None:
        """Have one replica load and prove an adapter, by a request of one token.

        Returns the error with which that ended. Raises ModelNotReady.
        """
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        request_id = f"flip-{uuid.uuid4().hex}"
        request = GenerateRequest(request_id, [0], sampling, tenant=ref.tenant)
        queue = self.open([Submit(request, ref)], target=replica_id)
        try:
            while True:
                for item in await queue.next_batch():
                    if isinstance(item, RequestOutput) and item.finish_reason is not None:
                        return item.error
        finally:
            self.release(queue)

    async def refresh_stats(self) -> EngineStats:
        """Ask all replicas for their figures. The last known ones count for those that are slow."""
        streams = self._streams.greeted()
        await asyncio.gather(*(stream.refresh(timeout_s=1.0) for stream in streams))
        return self.stats

    # ---- for requests --------------------------------------------------------------------

    async def ready(self) -> float:
        """Wait for a replica if there may be none; return for how long. Raises ModelNotReady."""
        if self.held is None or self._streams.takes_requests:
            return 0.0
        self._tasks.start(self._streams.discover())
        return await self.held.wait()

    def open(self, submits: Sequence[Submit], target: str = "") -> BatchQueue[Item]:
        """Hand requests over without waiting. The caller must `release` the queue.

        With a `target`, this replica gets them first. Raises ModelNotReady.
        """
        if self.hello is None and self.held is None:
            raise ModelNotReady
        queue: BatchQueue[Item] = BatchQueue()
        now_s = self._timing.clock()
        requests = [ResumableRequest(submit, queue.put, now_s) for submit in submits]
        for submit in submits:
            if submit.adapter_ref is not None and not target:
                self._wanted.add(submit.adapter_ref)
        self._requests[queue] = requests
        for request in requests:
            attempt = request.first_attempt()
            attempt.target = target
            self._begin(attempt)
        return queue

    def release(self, queue: BatchQueue[Item]) -> None:
        """Abort what has not finished: the reader is done."""
        for request in self._requests.pop(queue):
            for attempt in list(request.attempts.values()):
                self._forget(attempt)  # one that is being placed ends by that
                if attempt.replica is not None:
                    attempt.replica.abort([attempt.id])

    def end_choice(self, queue: BatchQueue[Item], request_number: int, index: int) -> None:
        """Abort a choice that its reader needs no longer, of one of the requests of `open`."""
        ended = self._requests[queue][request_number].end(index)
        if ended is None:
            return
        attempt, choice = ended
        if choice is None:
            self._forget(attempt)
        if attempt.replica is None:
            return
        if choice is None:
            attempt.replica.abort([attempt.id])
        else:
            attempt.replica.abort_choice(attempt.id, choice)

    # ---- attempts ------------------------------------------------------------------------

    def _begin(self, attempt: Attempt) -> None:
        self._attempts[attempt.id] = attempt
        self._tasks.start(self._place(attempt))

    async def _place(self, attempt: Attempt) -> None:
        error = await self._placement.place(attempt)
        if error is not None:
            self._forget(attempt)
            attempt.origin.fail(attempt, error)
            return
        early, attempt.early = attempt.early, []
        for stream, item in early:
            self.on_frame(stream, [item])

    def _lose(
        self,
        attempt: Attempt,
        message: str,
        counts: bool = True,
        kind: ErrorKind = ErrorKind.ENGINE_DIED,
    ) -> None:
        """Go on elsewhere with an attempt that its replica will not finish; after too many tries
        it ends with an error of this kind."""
        assert attempt.replica is not None, "lost before it was placed"
        self._forget(attempt)
        num_losses, num_fruitless = attempt.losses(counts)
        if num_fruitless >= MAX_FRUITLESS or num_losses >= MAX_LOSSES:
            attempt.origin.fail(attempt, RequestError(kind, message))
            return
        avoid = (*attempt.avoid, attempt.replica.replica_id)
        for rest in attempt.origin.next_attempts(attempt, counts, avoid):
            self._begin(rest)

    # ---- what the streams bring ----------------------------------------------------------

    def on_frame(self, stream: ReplicaStream, frame: Frame) -> None:
        attempts = self._attempts
        for item in frame:
            if not isinstance(item, tuple):
                self._on_output(stream, item)
                continue
            request_id, _, _ = item
            attempt = attempts.get(request_id)
            if attempt is not None:
                if attempt.replica is stream:
                    attempt.origin.take_tokens(attempt, item)
                elif attempt.replica is None:  # its receipt is still on the way
                    attempt.early.append((stream, item))

    def _on_output(self, stream: ReplicaStream, output: RequestOutput) -> None:
        attempt = self._attempts.get(output.request_id)
        if attempt is None:
            return
        if attempt.replica is None:
            attempt.early.append((stream, output))
        elif attempt.replica is stream:
            self._take_output(attempt, output)

    def _take_output(self, attempt: Attempt, output: RequestOutput) -> None:
        error = output.error
        if error is not None and _goes_on_after(error, attempt):
            kind = error.kind if error.kind == ErrorKind.OVERLOADED else ErrorKind.ENGINE_DIED
            self._lose(attempt, error.message, error.kind != ErrorKind.HANDED_BACK, kind)
            return
        attempt.origin.take_output(attempt, output)
        if attempt.num_open == 0:
            self._forget(attempt)

    def _forget(self, attempt: Attempt) -> None:
        del self._attempts[attempt.id]
        self._placement.note_end(attempt)

    def on_lease(self, stream: ReplicaStream, lease: Lease) -> None:
        self._totals.report(stream.replica_id, lease.stats)
        if lease.served is not None:
            for other in self._streams.greeted():
                if other is not stream:
                    other.tell(lease.served)
        now_s, lost_s = self._timing.clock(), self._timing.lost_s
        for attempt in forgotten_attempts(self._attempts, stream, lease, now_s, lost_s):
            self._lose(attempt, "The engine replica lost the request.")
        orphaned = orphans(self._attempts, stream, lease)
        if orphaned:
            stream.abort(orphaned)

    def on_lost(self, stream: ReplicaStream) -> None:
        for attempt in [each for each in self._attempts.values() if each.replica is stream]:
            self._lose(attempt, "The engine replica was lost.", counts=not stream.is_draining)

    def on_hello(self) -> None:
        if self.held is not None:
            self.held.note_replica()

    async def _keep_known(self) -> None:
        """Keep a stream to some replica at any time, so that it is known what there is.

        To look for one starts one, so it is done only on request where there may be none.
        """
        while True:
            if not self._attempts and (self.held is None or self.held.is_waking):
                await self._streams.discover()
            await asyncio.sleep(self._timing.max_retry_s / 2)

    async def _keep_looking(self) -> None:
        """Keep it known whether there is any replica that takes requests."""
        while True:
            try:
                await self._streams.look_for_others()
            except Exception as error:  # whatever Ray raises while there is no replica
                logger.warning("looking for other engine replicas: %r", error)
            await asyncio.sleep(self._timing.max_retry_s / 2)


def _goes_on_after(error: RequestError, attempt: Attempt) -> bool:
    """Whether another try is due. A choice without a token may have to give way in a full queue,
    where the replica does not know that others of its request have begun."""
    is_shed = error.kind == ErrorKind.OVERLOADED and attempt.origin.has_begun
    return is_shed or error.kind in ELSEWHERE
