"""EngineLink: an ingress replica's side of its stream to one engine replica.

Keeps the stream attached, hands frames to the mailboxes of the requests they belong to, and
makes sure that every mailbox gets a last output: when the stream breaks, when the replica falls
silent, when it no longer knows a request. A mailbox's `submits` and the tokens that its reader
keeps are what another replica would need to continue it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

from deployments.errors import ApiError, unavailable
from deployments.transport import (
    Abort,
    Command,
    Connection,
    Frame,
    Hello,
    Lease,
    Submit,
)
from engine.messages import ENGINE_DIED, EngineStats, Item, RequestError, RequestOutput

RENEW_S = 2.0  # well below the replica's LEASE_S
SILENCE_S = 10.0  # a replica that does not answer for so long is given up
LOST_S = 5.0  # a request that the replica has not known for so long is lost
RETRY_S = 0.5  # between attempts to attach

logger = logging.getLogger(__name__)


class Mailbox:
    """The news of one HTTP request's generations, in order. One reader."""

    __slots__ = ("_items", "_waiter", "missing_since_s", "submits")

    def __init__(self, submits: Sequence[Submit]) -> None:
        self.submits = {submit.request.request_id: submit for submit in submits}
        self.missing_since_s: dict[str, float] = {}
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def next(self) -> list[Item]:
        """Everything new, at least one item."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items


class EngineLink:
    """Owns the stream and the map from request ids to mailboxes.

    `hello` is None while there is no stream; then `open` refuses with 503.
    """

    def __init__(
        self,
        connection: Connection,
        ingress_id: str,
        clock: Callable[[], float] = time.monotonic,
        renew_s: float = RENEW_S,
        silence_s: float = SILENCE_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self.hello: Hello | None = None
        self.stats = EngineStats()
        self._connection = connection
        self._ingress_id = ingress_id
        self._clock = clock
        self._renew_s = renew_s
        self._silence_s = silence_s
        self._retry_s = retry_s
        self._num_streams = 0
        self._stream_id = ""
        self._mailboxes: dict[str, Mailbox] = {}
        self._outbox: list[Command] = []
        self._has_outbox = asyncio.Event()
        self._renewal_waiters: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_attached())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def num_live(self) -> int:
        return len(self._mailboxes)

    # ---- for requests --------------------------------------------------------------------

    def open(self, submits: Sequence[Submit]) -> Mailbox:
        """Sends the submits; never blocks. The caller must `release` the mailbox."""
        if self.hello is None:
            raise self.unavailable()
        mailbox = Mailbox(submits)
        for request_id in mailbox.submits:
            self._mailboxes[request_id] = mailbox
        self._send(submits)
        return mailbox

    def finish(self, request_id: str) -> None:
        """The reader has seen the last output of every choice."""
        self._mailboxes.pop(request_id, None)

    def release(self, mailbox: Mailbox) -> None:
        """The reader is done. What has not finished is aborted."""
        unfinished = [r for r in mailbox.submits if self._mailboxes.pop(r, None) is not None]
        if unfinished:
            self._send([Abort(request_id) for request_id in unfinished])

    async def refresh_stats(self) -> EngineStats:
        """The replica's figures of now; the last known ones where it does not answer soon."""
        if self.hello is not None:
            # Not from here: what a request calls is cancelled with it.
            renewed = asyncio.get_running_loop().create_future()
            self._renewal_waiters.append(renewed)
            self._has_outbox.set()
            await asyncio.wait([renewed], timeout=1.0)
        return self.stats

    def unavailable(self) -> ApiError:
        return unavailable("The model is not ready: it is being loaded or restarted. Retry soon.")

    def _send(self, commands: Sequence[Command]) -> None:
        self._outbox.extend(commands)
        self._has_outbox.set()

    # ---- the stream ----------------------------------------------------------------------

    async def _keep_attached(self) -> None:
        while True:
            try:
                await self._session()
                reason = "the stream ended"
            except Exception as error:
                reason = repr(error)
            logger.warning("stream to the engine replica: %s; attaching again", reason)
            await asyncio.sleep(self._retry_s)

    async def _session(self) -> None:
        """One stream from attach to its end, however it ends."""
        self._num_streams += 1
        self._stream_id = f"{self._ingress_id}-{self._num_streams}"
        stream = self._connection.attach(self._stream_id)
        try:
            self.hello = cast(Hello, await anext(stream))
            await _first_of(self._read(stream), self._talk())
        finally:
            self.hello = None
            self._outbox.clear()
            self._fail_all("The engine replica was lost.")
            await _close(stream)

    async def _read(self, stream: AsyncIterator[Hello | Frame]) -> None:
        mailboxes = self._mailboxes
        async for frame in stream:
            for item in cast(Frame, frame):
                request_id = item[0] if type(item) is tuple else item.request_id  # type: ignore[union-attr]
                mailbox = mailboxes.get(request_id)
                if mailbox is not None:
                    mailbox.put(item)

    async def _talk(self) -> None:
        """Sends commands as they come, all that wait together, and renews the lease."""
        renewed_s = self._clock()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_outbox.wait(), self._renew_s)
            self._has_outbox.clear()
            commands, self._outbox = self._outbox, []
            waiters, self._renewal_waiters = self._renewal_waiters, []
            renew = bool(waiters) or self._clock() - renewed_s >= self._renew_s
            await asyncio.wait_for(self._exchange(commands, renew), self._silence_s)
            if renew:
                renewed_s = self._clock()
            for waiter in waiters:
                waiter.set_result(None)

    async def _exchange(self, commands: list[Command], renew: bool) -> None:
        lease = await self._connection.control(self._stream_id, commands, renew)
        if lease is not None:
            self.stats = lease.stats
            self._reconcile(lease, self._clock())

    def _reconcile(self, lease: Lease, now: float) -> None:
        """What one side has forgotten, the other lets go."""
        for request_id, mailbox in list(self._mailboxes.items()):
            missing = mailbox.missing_since_s
            if request_id in lease.live_request_ids:
                missing.pop(request_id, None)
            elif now - missing.setdefault(request_id, now) > LOST_S:  # not just on its way
                self._fail(request_id, mailbox, "The engine replica lost the request.")
        orphans = [r for r in sorted(lease.live_request_ids) if r not in self._mailboxes]
        if orphans:
            self._send([Abort(request_id) for request_id in orphans])

    def _fail_all(self, message: str) -> None:
        for request_id, mailbox in list(self._mailboxes.items()):
            self._fail(request_id, mailbox, message)

    def _fail(self, request_id: str, mailbox: Mailbox, message: str) -> None:
        del self._mailboxes[request_id]
        error = RequestError(ENGINE_DIED, message)
        for index in range(mailbox.submits[request_id].request.n):
            mailbox.put(RequestOutput(request_id, index, [], finish_reason="error", error=error))


async def _first_of(*coroutines: object) -> None:
    """Runs both until one ends; raises what it raised and leaves none running."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]  # type: ignore[arg-type]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(stream: AsyncIterator[Hello | Frame]) -> None:
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()
