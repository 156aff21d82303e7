"""ReplicaLink: an ingress replica's stream to one engine replica, and the lease that keeps it.

Hands every frame to one callback, sends aborts as they come and renews the lease; `run` ends when
the stream does, or when the replica falls silent. What becomes of the requests is `link`'s
business.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from deployments.fleet.protocol import Abort, Connection, Frame, Hello, Hints, Lease, StreamId
from engine.messages import EngineStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long an ingress waits for what, in seconds."""

    renew_s: float = 2.0  # well below the replica's LEASE_S
    silence_s: float = 10.0  # a replica that does not answer for so long is given up
    lost_s: float = 5.0  # a request that its replica has not known for so long is lost
    retry_s: float = 0.05  # before the second attempt to place a request; then twice as long
    max_retry_s: float = 1.0
    patience_s: float = 30.0  # for a replica that takes the request
    suspect_s: float = 30.0  # a replica that was lost is the last choice for so long
    hello_s: float = 10.0  # without a stream for so long, the model counts as not ready
    clock: Callable[[], float] = time.monotonic


class ReplicaLink:
    """`replica_id` is empty until the Hello where any replica would do."""

    def __init__(
        self,
        connection: Connection,
        ingress_id: str,
        replica_id: str,
        epochs: Mapping[str, int],
        pace: Pace,
        on_frame: Callable[["ReplicaLink", Frame], None],
        on_lease: Callable[["ReplicaLink", Lease], None],
    ) -> None:
        self.replica_id = replica_id
        self.hello: Hello | None = None
        self.stats = EngineStats()
        self.is_draining = False
        self.has_settled = asyncio.Event()  # greeted, or over
        self._connection = connection
        self._ingress_id = ingress_id
        self._epochs = dict(epochs)
        self._pace = pace
        self._on_frame = on_frame
        self._on_lease = on_lease
        self._outbox: list[Abort] = []
        self._has_outbox = asyncio.Event()
        self._renewal_waiters: list[asyncio.Future[None]] = []

    def abort(self, request_ids: Sequence[str]) -> None:
        self._outbox.extend(map(Abort, request_ids))
        self._has_outbox.set()

    async def refresh(self, timeout_s: float) -> None:
        """Waits for a renewal from now on, unless the replica does not answer soon."""
        # Not from here: what a request calls is cancelled with it.
        renewed = asyncio.get_running_loop().create_future()
        self._renewal_waiters.append(renewed)
        self._has_outbox.set()
        await asyncio.wait([renewed], timeout=timeout_s)

    async def run(self, on_hello: Callable[["ReplicaLink"], None]) -> None:
        """One stream from attach to its end. Raises what broke it."""
        hints = Hints(target=self.replica_id)
        stream = self._connection.attach(hints, self._ingress_id, self._epochs)
        try:
            first = await asyncio.wait_for(anext(stream), self._pace.silence_s)
            self.hello = cast(Hello, first)
            self.replica_id = self.hello.replica_id
            on_hello(self)
            self.has_settled.set()
            await _first_of(self._read(stream), self._talk(self.hello.epoch))
        finally:
            self.hello = None
            self.has_settled.set()
            await _close(stream)

    async def _read(self, stream: AsyncIterator[Hello | Frame]) -> None:
        async for frame in stream:
            self._on_frame(self, cast(Frame, frame))

    async def _talk(self, epoch: int) -> None:
        """Sends aborts as they come, all that wait together, and renews the lease."""
        stream_id = StreamId(self._ingress_id, epoch)
        pace = self._pace
        renewed_s = pace.clock()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_outbox.wait(), pace.renew_s)
            self._has_outbox.clear()
            aborts, self._outbox = self._outbox, []
            waiters, self._renewal_waiters = self._renewal_waiters, []
            renew = bool(waiters) or pace.clock() - renewed_s >= pace.renew_s
            hints = Hints(target=self.replica_id)
            lease = await asyncio.wait_for(
                self._connection.control(hints, stream_id, aborts, renew), pace.silence_s
            )
            if lease is not None:
                renewed_s = pace.clock()
                self.stats, self.is_draining = lease.stats, lease.is_draining
                self._on_lease(self, lease)
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


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
