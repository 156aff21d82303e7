"""EngineReplica: one adapter store and one engine behind `submit`, `attach` and `control`.

It takes requests, streams their outputs to the ingresses, and lets go of the requests whose ingress
is gone. Told to drain, it takes nothing new, finishes what it can and hands the rest back. No text,
no HTTP, no tenants' keys, no Ray; no torch: the engine is a process of its own.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.fleet.protocol import Abort, Frame, Hello, Lease, Receipt, StreamId, Submit
from deployments.policy.autoscaling import ReplicaLoad
from deployments.policy.backlog import Backlog, Overload, QueueLimits, overload
from deployments.policy.capacity import Capacity
from deployments.policy.queue_shares import FlowLoad, flow_wait_s, too_late, who_gives_way
from deployments.policy.replica_view import ReplicaFigures
from deployments.policy.shared_service import OthersService, OwnService, ServiceReport
from deployments.replica.adapter_fetcher import AdapterFetcher, AdapterFiles
from deployments.replica.engine_handle import EngineHandle
from deployments.replica.ingress_streams import IngressStream, IngressStreams
from deployments.replica.live_requests import LiveRequests
from deployments.replica.prewarmer import AskForAdapters, Prewarmer
from engine.messages import EngineStats, ErrorKind, FlowTokens, Item, RequestError
from engine.scheduler.classes import PriorityClass

CARE_PERIOD_S = 1.0
MAX_DISK_ADAPTERS = 256  # of those that are reported to routers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    replica_id: str
    base_fingerprint: str
    max_num_seqs: int
    limits: QueueLimits
    drain_s: float = 30.0  # for running requests to finish once the replica is being stopped
    prewarm_s: float = 5.0  # for adapters that will be asked for, beyond the model's load; 0: none


class EngineReplica:
    """`make_engine` is given the callback for the engine's frames."""

    def __init__(
        self,
        make_engine: Callable[[Callable[[list[Item]], None]], EngineHandle],
        adapters: AdapterFiles,
        settings: ReplicaSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._fetcher = AdapterFetcher(adapters)
        self._requests = LiveRequests(make_engine, self._fetcher)
        self._engine = self._requests.engine
        self._streams = IngressStreams(settings.replica_id, clock, self._on_detach)
        self._num_received = 0
        self._served, self._others = OwnService(settings.replica_id), OthersService()
        self._draining_since_s: float | None = None
        self._caretaker: asyncio.Task[None] | None = None
        self._prewarmer: Prewarmer | None = None

    async def start(self, ask: AskForAdapters | None = None) -> None:
        """Wait until the model is loaded. Raises what the engine raises.

        The adapters that `ask` answers with are loaded too, but waited for no longer than
        `prewarm_s` beyond the model.
        """
        settings = self._settings
        if ask is not None and settings.prewarm_s:
            self._prewarmer = Prewarmer(ask, self._requests, self._fetcher)
        await self._engine.start()
        self._caretaker = asyncio.create_task(self._take_care())
        if self._prewarmer is not None:
            await self._prewarmer.wait(settings.prewarm_s)

    async def close(self) -> None:
        if self._prewarmer is not None:
            self._prewarmer.close()
        if self._caretaker is not None:
            self._caretaker.cancel()
        self._streams.detach_all()
        self._fetcher.close()
        await self._engine.close()

    def check_health(self) -> None:
        """Raise if the engine's process is gone for good."""
        if self._engine.failure is not None:
            raise RuntimeError(self._engine.failure)

    def set_limits(self, limits: QueueLimits) -> None:
        """Change who may join the queue from now on."""
        self._settings = replace(self._settings, limits=limits)

    # ---- what an ingress calls -----------------------------------------------------------

    def submit(self, ingress_id: str, epochs: Mapping[str, int], submit: Submit) -> Receipt:
        """Accept the request or say why not. To submit the same one twice is no error."""
        replica_id = self._settings.replica_id
        epoch = epochs.get(replica_id, 0)
        if submit.request.request_id in self._requests.by_id:
            return Receipt(replica_id, epoch)
        refusal = self._refusal(submit)
        if refusal is None:
            stream = self._streams.open(ingress_id, epoch)
            if stream is not None:
                self._num_received += 1
                self._requests.accept(stream, submit)
                return Receipt(replica_id, epoch)
            refusal = RequestError(
                ErrorKind.STALE_STREAM, f"{ingress_id} has opened a later stream"
            )
        return Receipt(replica_id, epoch, refusal)

    def _refusal(self, submit: Submit) -> RequestError | None:
        if self.is_draining:
            return RequestError(ErrorKind.DRAINING, "the replica is being stopped")
        outage = self._engine.outage
        if outage is not None:
            return RequestError(ErrorKind.ENGINE_DIED, outage)
        limits, num_choices = self._settings.limits, submit.request.n
        is_allowed = limits.surely_allow(self._requests.num_open, num_choices)
        if is_allowed and submit.timeout_s is None:
            return None
        found = self._overload(submit)
        if found is None:
            return None
        return RequestError(ErrorKind.OVERLOADED, found.message, found.retry_after_s)

    def _overload(self, submit: Submit) -> Overload | None:
        """Say why a request may not wait here. Others give way to one of a smaller share."""
        request, limits, requests = submit.request, self._settings.limits, self._requests
        capacity, backlog, flow = self._capacity(), self._backlog(), requests.flow_of(request)
        wait_s = flow_wait_s(capacity, backlog, flow, requests.flows)
        if submit.timeout_s is not None and not request.output_token_ids:
            found = too_late(self._ttft_s(submit, capacity, wait_s), submit.timeout_s)
            if found is not None:
                return found
        found = overload(capacity, backlog, limits, request.n, wait_s)
        excess = requests.num_open + request.n - limits.max_open
        if found is None or excess <= 0:
            return found
        return None if self._make_room(flow, request.n, excess, found) else found

    def _make_room(self, flow: FlowLoad, num_more: int, excess: int, why: Overload) -> bool:
        """End requests that wait, of those who have more than their share of a full queue."""
        givers = who_gives_way(flow, num_more, self._requests.flows)
        if sum(map(self._requests.num_waiting_of, givers)) < excess:
            return False
        for giver in givers:
            if excess > 0:
                error = RequestError(ErrorKind.OVERLOADED, why.message, why.retry_after_s)
                excess -= self._requests.shed(giver, excess, error)
        return True

    def _ttft_s(self, submit: Submit, capacity: Capacity, wait_s: float) -> float:
        """Predict when the first token comes: after the queue, or its adapter if that is later."""
        ref, load_s = submit.adapter_ref, 0.0
        if ref is not None and ref.digest not in self._engine.stats.adapters_in_memory:
            load_s = self._fetcher.expected_s(ref.digest)
        return max(wait_s, load_s) + capacity.prompt_s(len(submit.request.prompt_token_ids))

    async def attach(
        self, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncGenerator[Hello | Frame, None]:
        """Stream a Hello, then a frame whenever there are outputs.

        Ends when one side goes away, or once this replica is draining and has nothing left for
        that ingress. Raises UnknownStream.
        """
        settings = self._settings
        stream = self._streams.attach(ingress_id, epochs.get(settings.replica_id, 0))
        try:
            engine = self._engine.info
            yield Hello(engine, settings.base_fingerprint, settings.replica_id, stream.id.epoch)
            while stream.is_open and not self._has_drained(stream):
                await stream.outbox.wait()
                frame = stream.outbox.take(len(stream.request_ids))
                if frame:
                    yield frame
        finally:
            self._streams.detach(stream)

    async def control(
        self,
        stream_id: StreamId,
        aborts: Sequence[Abort],
        renew: bool,
        elsewhere: Sequence[ServiceReport] = (),
    ) -> Lease | None:
        """Renew the lease of a stream and abort requests. Raises UnknownStream."""
        stream = self._streams.renew(stream_id)
        self._requests.drop(abort.request_id for abort in aborts if abort.index is None)
        for abort in aborts:
            if abort.index is not None:
                self._engine.abort(abort.request_id, abort.index)
        news = self._others.take(elsewhere, self._clock()) if elsewhere else None
        if news:
            self._engine.count_elsewhere([(t, PriorityClass(c), n) for t, c, n in news])
        if not renew and not self.is_draining:
            return None
        ids = frozenset(stream.request_ids)
        served = self._served.take_report()
        return Lease(ids, self._engine.stats, self.is_draining, self._engine.trouble, served)

    def note_served(self, served: Sequence[FlowTokens]) -> None:
        """Note what the engine has charged tenants with, for the other replicas."""
        self._served.add(served)

    # ---- leases and the way out ----------------------------------------------------------

    async def _take_care(self) -> None:
        while True:
            await asyncio.sleep(CARE_PERIOD_S)
            self.take_care(self._clock())

    def take_care(self, now_s: float) -> None:
        """Reap the requests of silent ingresses; end a drain that has lasted long enough."""
        self._streams.detach_silent(now_s)
        since_s = self._draining_since_s
        if since_s is not None and now_s - since_s > self._settings.drain_s:
            error = RequestError(ErrorKind.HANDED_BACK, "The replica was stopped.")
            self._requests.fail_all(error)

    def _on_detach(self, stream: IngressStream) -> None:
        self._requests.drop(stream.request_ids)

    @property
    def is_draining(self) -> bool:
        return self._draining_since_s is not None

    def drain(self) -> None:
        """Take nothing new; streams end with their last request. To call it twice is no error."""
        if self._draining_since_s is None:
            logger.warning("draining: %d requests are to finish", len(self._requests.by_id))
            self._draining_since_s = self._clock()
            self._streams.wake_all()

    def _has_drained(self, stream: IngressStream) -> bool:
        return self.is_draining and not stream.request_ids and not stream.outbox

    # ---- figures -------------------------------------------------------------------------

    def figures(self) -> ReplicaFigures:
        """Report to routers."""
        stats = self._engine.stats
        return ReplicaFigures(
            num_received=self._num_received,
            queued_tokens=self._queued_tokens(),
            num_requests=self._requests.num_open,
            max_num_seqs=self._settings.max_num_seqs,
            kv_used=_kv_used(stats),
            device_adapters=frozenset(stats.adapters_in_memory),
            disk_adapters=frozenset(self._fetcher.recent(MAX_DISK_ADAPTERS)),
            tokens_per_s=stats.tokens_per_s,
            disk_load_s=self._fetcher.disk_load_s,
            remote_load_s=self._fetcher.remote_load_s,
            crowding_s=stats.row_s * self._requests.meter.mean_answer,
        )

    def load(self) -> ReplicaLoad:
        """Report to the autoscaler: once in a second, as rates are since the last report."""
        stats, arrivals = self._engine.stats, self._requests.meter.read(self._clock())
        return ReplicaLoad(
            queued_tokens=self._queued_tokens(),
            kv_used=_kv_used(stats),
            num_requests=self._requests.num_open,
            adapters_used=stats.adapters_used,
            prompt_tokens_per_s=arrivals.prompt_tokens_per_s,
            output_tokens_per_s=arrivals.output_tokens_per_s,
            wait_s=arrivals.wait_s,
            capacity=self._capacity(),
        )

    def _capacity(self) -> Capacity:
        stats = self._engine.stats
        return Capacity(self._settings.max_num_seqs, stats.tokens_per_s, stats.step_s, stats.row_s)

    def _backlog(self) -> Backlog:
        stats = self._engine.stats
        return Backlog(
            num_open=self._requests.num_open,
            num_running=stats.num_running,
            queued_tokens=self._queued_tokens(),
            kv_used=_kv_used(stats),
            mean_answer=self._requests.meter.mean_answer,
        )

    def _queued_tokens(self) -> int:
        """Count the prompt tokens to be computed, in the engine and before it."""
        return self._engine.stats.queued_tokens + self._requests.num_waiting_tokens


def _kv_used(stats: EngineStats) -> float:
    return stats.num_blocks_used / stats.num_blocks_total if stats.num_blocks_total else 0.0
