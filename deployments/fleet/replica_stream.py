"""ReplicaStream: an ingress replica's stream to one engine replica, and the lease that keeps it.

Hands every frame to one callback, sends aborts as they come and renews the lease; `run` ends when
the stream does, or when the replica falls silent. Knows no requests but by their ids.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, cast

from deployments.fleet.protocol import Abort, Connection, Frame, Hello, Hints, Lease, StreamId
from deployments.fleet.timing import Timing
from deployments.policy.shared_service import ServiceReport
from engine.messages import EngineStats

MAX_REPORTS = 64  # of other replicas, kept for one; totals make up for those that are lost


class ReplicaStream:
    """If any replica will do, `replica_id` is empty until the Hello."""

    def __init__(
        self,
        connection: Connection,
        ingress_id: str,
        replica_id: str,
        epochs: Mapping[str, int],
        timing: Timing,
        on_frame: Callable[["ReplicaStream", Frame], None],
        on_lease: Callable[["ReplicaStream", Lease], None],
    ) -> None:
        self.replica_id = replica_id
        self.hello: Hello | None = None
        self.stats = EngineStats()
        self.num_held = 0  # requests of this ingress that it knew in its last lease
        self.is_draining = False
        self.trouble: str | None = None  # why its engine takes no requests
        self.has_settled = asyncio.Event()  # greeted, or over
        self._connection = connection
        self._ingress_id = ingress_id
        self._epochs = dict(epochs)
        self._timing = timing
        self._on_frame = on_frame
        self._on_lease = on_lease
        self._outbox: list[Abort] = []
        self._elsewhere: deque[ServiceReport] = deque(maxlen=MAX_REPORTS)
        self._has_outbox = asyncio.Event()
        self._renewal_waiters: list[asyncio.Future[None]] = []

    def abort(self, request_ids: Sequence[str]) -> None:
        self._outbox.extend(map(Abort, request_ids))
        self._has_outbox.set()

    def abort_choice(self, request_id: str, index: int) -> None:
        self._outbox.append(Abort(request_id, index))
        self._has_outbox.set()

    def tell(self, report: ServiceReport) -> None:
        """Pass on what another replica has reported, with the next call."""
        self._elsewhere.append(report)

    async def refresh(self, timeout_s: float) -> None:
        """Wait until `_talk` has renewed the lease, at most for `timeout_s`.

        Not renewed here, because a call in the context of an HTTP request is cancelled with it.
        """
        renewed = asyncio.get_running_loop().create_future()
        self._renewal_waiters.append(renewed)
        self._has_outbox.set()
        await asyncio.wait([renewed], timeout=timeout_s)

    async def run(self, on_hello: Callable[["ReplicaStream"], None]) -> None:
        """Attach, and read until the end. Raises what broke the stream."""
        hints = Hints(target=self.replica_id)
        stream = self._connection.attach(hints, self._ingress_id, self._epochs)
        try:
            async with asyncio.timeout(self._timing.silence_s):
                first = await anext(stream)
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
        """Send aborts as they come, all that wait at once, and renew the lease."""
        stream_id = StreamId(self._ingress_id, epoch)
        timing = self._timing
        renewed_s = timing.clock()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timing.renew_s):
                    await self._has_outbox.wait()
            self._has_outbox.clear()
            aborts, self._outbox = self._outbox, []
            waiters, self._renewal_waiters = self._renewal_waiters, []
            renew = bool(waiters) or timing.clock() - renewed_s >= timing.renew_s
            hints = Hints(target=self.replica_id)
            elsewhere = tuple(self._elsewhere)
            self._elsewhere.clear()
            async with asyncio.timeout(timing.silence_s):
                lease = await self._connection.control(hints, stream_id, aborts, renew, elsewhere)
            if lease is not None:
                renewed_s = timing.clock()
                self.stats, self.is_draining = lease.stats, lease.is_draining
                self.trouble = lease.trouble
                self.num_held = len(lease.live_request_ids)
                self._on_lease(self, lease)
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


async def _first_of(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends. Raises what it raised and leaves none running."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
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
