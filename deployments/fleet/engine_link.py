"""EngineLink: an ingress replica's side of one Engine deployment, however many replicas it has.

Hands requests over, keeps one ReplicaLink to each replica that has taken one, and passes what
comes to the mailboxes. A request whose replica is lost goes on at another; every mailbox gets a
last output for every choice, whatever happens.

Which replica a request goes to is the router's decision; here is only which ones to avoid.
"""

import asyncio
import contextvars
import dataclasses
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from deployments.fleet.batch_queue import Mailbox
from deployments.fleet.failover import Journey, Leg
from deployments.fleet.protocol import Connection, Frame, Hello, Hints, Lease, Receipt, Submit
from deployments.fleet.replica_stream import Pace, ReplicaLink
from engine.messages import EngineStats, ErrorKind, Item, RequestError

# A request that has lost so many replicas may well be what kills them.
MAX_LOSSES = 4
ELSEWHERE = (
    ErrorKind.ENGINE_DIED,
    ErrorKind.HANDED_BACK,
)  # errors that another replica may not have

logger = logging.getLogger(__name__)


class ModelNotReady(Exception):
    """No replica of the model has been heard of for a while."""

    def __init__(self) -> None:
        super().__init__("The model is not ready: it is being loaded or restarted. Retry soon.")


class EngineLink:
    """Owns the legs: each is looking for a replica, or at exactly one, or over."""

    def __init__(self, connection: Connection, ingress_id: str, pace: Pace | None = None) -> None:
        self._connection = connection
        self._ingress_id = ingress_id
        self._pace = pace or Pace()
        self._clock = self._pace.clock
        self._legs: dict[str, Leg] = {}
        self._journeys: dict[Mailbox[Item], list[Journey]] = {}
        self._links: dict[str, ReplicaLink] = {}
        self._discovery: ReplicaLink | None = None
        self._epochs: dict[str, int] = {}
        self._suspects: dict[str, float] = {}
        self._hello: Hello | None = None
        self._alone_since_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._spawn(self._keep_known())

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def hello(self) -> Hello | None:
        """What any replica last said; None where there has been none for a while."""
        is_recent = self._links or self._clock() - self._alone_since_s < self._pace.hello_s
        return self._hello if is_recent else None

    @property
    def stats(self) -> EngineStats:
        """The last known figures of all replicas that this ingress has a stream to."""
        return _sum([link.stats for link in self._links.values()])

    @property
    def num_live(self) -> int:
        return len(self._legs)

    # ---- for requests --------------------------------------------------------------------

    def open(self, submits: Sequence[Submit]) -> Mailbox[Item]:
        """Never blocks. The caller must `release` the mailbox. Raises ModelNotReady."""
        if self.hello is None:
            raise ModelNotReady
        mailbox: Mailbox[Item] = Mailbox()
        journeys = [Journey(submit, mailbox.put) for submit in submits]
        self._journeys[mailbox] = journeys
        for journey in journeys:
            self._depart(journey.first_leg())
        return mailbox

    def release(self, mailbox: Mailbox[Item]) -> None:
        """The reader is done. What has not finished is aborted."""
        for journey in self._journeys.pop(mailbox):
            for leg in list(journey.legs.values()):
                del self._legs[leg.id]  # still looking for a replica: `_place` notices
                if leg.stay is not None:
                    leg.stay.abort([leg.id])

    async def refresh_stats(self) -> EngineStats:
        """The figures of now; the last known ones of whoever does not answer soon."""
        links = [link for link in self._links.values() if link.hello is not None]
        await asyncio.gather(*(link.refresh(timeout_s=1.0) for link in links))
        return self.stats

    # ---- finding a replica ---------------------------------------------------------------

    def _depart(self, leg: Leg) -> None:
        self._legs[leg.id] = leg
        self._spawn(self._place(leg))

    async def _place(self, leg: Leg) -> None:
        """Offers the leg until a replica takes it, patience ends or nobody wants it any more."""
        deadline_s = self._clock() + self._pace.patience_s
        retry_s = self._pace.retry_s
        reason = "no replica has answered"
        while leg.id in self._legs:
            receipt = await self._submit(leg)
            if receipt is not None and receipt.refusal is None:
                if await self._settle(leg, receipt):
                    return
            elif receipt is not None and receipt.refusal is not None:
                reason = receipt.refusal.message
                if self._is_final(leg, receipt):
                    self._end(leg, receipt.refusal)
                    return
            if leg.id not in self._legs:
                return
            if self._clock() >= deadline_s:
                self._end(
                    leg, RequestError(ErrorKind.ENGINE_DIED, f"The model is unavailable: {reason}.")
                )
                return
            if receipt is None or receipt.replica_id in leg.avoid:
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, self._pace.max_retry_s)
            else:
                leg.avoid += (receipt.replica_id,)
            if leg.id in self._legs:
                self._rename(leg)

    async def _submit(self, leg: Leg) -> Receipt | None:
        """None: nobody can know whether it was accepted."""
        request, adapter_ref = leg.request, leg.journey.adapter_ref
        hints = Hints(
            request_id=leg.id,
            num_prompt_tokens=len(request.prompt_token_ids) + len(request.output_token_ids),
            adapter_digest="" if adapter_ref is None else adapter_ref.digest,
            tenant=request.tenant,
            avoid=(*leg.avoid, *self._current_suspects()),
        )
        try:
            async with asyncio.timeout(self._pace.silence_s):
                return await self._connection.submit(
                    hints, self._ingress_id, self._epochs, leg.submit
                )
        except Exception as error:  # whatever Ray raises for a replica that dies or hangs
            logger.warning("submitting %s: %r", leg.id, error)
            return None

    async def _settle(self, leg: Leg, receipt: Receipt) -> bool:
        """The leg is at that replica, if it is still wanted and its stream still trusted."""
        replica_id = receipt.replica_id
        if self._discovery is not None and replica_id not in self._links:
            await self._discovery.has_settled.wait()  # perhaps to this very replica
        if leg.id not in self._legs:
            if replica_id in self._links:
                self._links[replica_id].abort([leg.id])
            return True
        if receipt.epoch != self._epochs.get(replica_id, 0):
            return False
        link = leg.stay = self._links.get(replica_id) or self._open_link(replica_id)
        early, leg.early = leg.early, []
        for source, item in early:
            if source is link:
                self._take(link, item)
        return True

    def _is_final(self, leg: Leg, receipt: Receipt) -> bool:
        """Too many requests at every replica: an answer, unless it has already begun."""
        assert receipt.refusal is not None
        is_second = receipt.replica_id in leg.avoid
        return receipt.refusal.kind == ErrorKind.OVERLOADED and is_second and leg.num_losses == 0

    def _rename(self, leg: Leg) -> None:
        del self._legs[leg.id]
        leg.journey.rename(leg)
        self._legs[leg.id] = leg

    def _end(self, leg: Leg, error: RequestError) -> None:
        del self._legs[leg.id]
        leg.journey.fail(leg, error)

    def _current_suspects(self) -> list[str]:
        now = self._clock()
        self._suspects = {r: until for r, until in self._suspects.items() if until > now}
        return list(self._suspects)

    # ---- what comes ----------------------------------------------------------------------

    def _on_frame(self, link: ReplicaLink, frame: Frame) -> None:
        legs = self._legs
        for item in frame:
            if type(item) is tuple:
                leg = legs.get(item[0])
                if leg is not None and leg.stay is link:
                    leg.journey.take(leg, item)
                    continue
            self._take(link, item)

    def _take(self, link: ReplicaLink, item: Item) -> None:
        is_plain = isinstance(item, tuple)
        leg = self._legs.get(item[0] if is_plain else item.request_id)
        if leg is None:
            return
        if leg.stay is not link:
            if leg.stay is None:  # its receipt is still on the way
                leg.early.append((link, item))
            return
        if not is_plain and item.error is not None and item.error.kind in ELSEWHERE:
            self._lose(leg, item.error.message, counts=item.error.kind != ErrorKind.HANDED_BACK)
            return
        leg.journey.take(leg, item)
        if leg.num_open == 0:
            del self._legs[leg.id]

    def _lose(self, leg: Leg, message: str, counts: bool = True) -> None:
        """Its replica is not going to finish it: others are, if it has not lost too many."""
        del self._legs[leg.id]
        num_losses = leg.num_losses + counts
        if num_losses >= MAX_LOSSES:
            leg.journey.fail(leg, RequestError(ErrorKind.ENGINE_DIED, message))
            return
        avoid = (*leg.avoid, leg.stay.replica_id)
        for rest in leg.journey.next_legs(leg, num_losses, avoid):
            self._depart(rest)

    def _on_lease(self, link: ReplicaLink, lease: Lease) -> None:
        """What one side has forgotten, the other lets go."""
        now = self._clock()
        for leg in [leg for leg in self._legs.values() if leg.stay is link]:
            if leg.id in lease.live_request_ids:
                leg.missing_since_s = None
            elif leg.missing_since_s is None:
                leg.missing_since_s = now  # perhaps its last news is just on its way
            elif now - leg.missing_since_s > self._pace.lost_s:
                self._lose(leg, "The engine replica lost the request.")
        orphans = [id_ for id_ in sorted(lease.live_request_ids) if self._is_orphan(id_, link)]
        if orphans:
            link.abort(orphans)

    def _is_orphan(self, request_id: str, link: ReplicaLink) -> bool:
        leg = self._legs.get(request_id)
        return leg is None or (leg.stay is not None and leg.stay is not link)

    # ---- replicas ------------------------------------------------------------------------

    async def _keep_known(self) -> None:
        """A stream to some replica at any time, so that it is known what there is."""
        while True:
            if not self._links and not self._legs:
                link = self._discovery = self._new_link("")
                await self._run(link)
            await asyncio.sleep(self._pace.max_retry_s / 2)

    def _open_link(self, replica_id: str) -> ReplicaLink:
        link = self._links[replica_id] = self._new_link(replica_id)
        self._spawn(self._run(link))
        return link

    def _new_link(self, replica_id: str) -> ReplicaLink:
        return ReplicaLink(
            self._connection,
            self._ingress_id,
            replica_id,
            self._epochs,
            self._pace,
            self._on_frame,
            self._on_lease,
        )

    async def _run(self, link: ReplicaLink) -> None:
        try:
            await link.run(self._on_hello)
            reason = "the stream ended"
        except Exception as error:  # whatever Ray raises for a replica that dies or hangs
            reason = repr(error)
        finally:
            self._on_over(link)
        if not link.is_draining:
            logger.warning("stream to engine replica %r: %s", link.replica_id or "any", reason)
        if not link.is_draining and link.replica_id:
            self._suspects[link.replica_id] = self._clock() + self._pace.suspect_s
        for leg in [leg for leg in self._legs.values() if leg.stay is link]:
            self._lose(leg, "The engine replica was lost.", counts=not link.is_draining)

    def _on_hello(self, link: ReplicaLink) -> None:
        self._hello = link.hello
        self._links[link.replica_id] = link
        self._suspects.pop(link.replica_id, None)
        if link is self._discovery:
            self._discovery = None

    def _on_over(self, link: ReplicaLink) -> None:
        if link is self._discovery:
            self._discovery = None
        if self._links.get(link.replica_id) is link:
            del self._links[link.replica_id]
            self._epochs[link.replica_id] = self._epochs.get(link.replica_id, 0) + 1
            self._alone_since_s = self._clock()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # Out of the context of the HTTP request that it was called from: it may outlive that one.
        task = asyncio.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _sum(all_stats: Sequence[EngineStats]) -> EngineStats:
    """Adapters that several replicas hold count once for each."""
    if not all_stats:
        return EngineStats()
    rows = [dataclasses.astuple(stats) for stats in all_stats]
    columns = zip(*rows, strict=True)
    return EngineStats(*(sum(column[1:], column[0]) for column in columns))
