"""Engine replicas in the test's own process, and an ingress' connection to them.

The router is reduced to an order of preference; every fault that a network, a process or a stop
can bring is brought by the test, when it says so.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from deployments.fleet.protocol import (
    Abort,
    Frame,
    Hello,
    Hints,
    Lease,
    Receipt,
    StreamId,
    Submit,
    UnknownStream,
)
from deployments.policy.shared_service import ServiceReport
from deployments.replica.replica import EngineReplica

OnSubmit = Callable[[str, Submit], None]


class LocalFleet:
    """A transport.Connection. `on_submit` and `on_accepted` may raise in the middle of a submit."""

    def __init__(self, replicas: Mapping[str, EngineReplica]) -> None:
        self.replicas = dict(replicas)
        self.leaving: set[str] = set()
        self.submitted: list[tuple[str, Submit]] = []
        self.hints: list[Hints] = []
        self.hang = False
        self.on_submit: OnSubmit = lambda replica_id, submit: None
        self.on_accepted: OnSubmit = lambda replica_id, submit: None
        self.lose: Callable[[Abort], bool] = lambda abort: False
        self._broken: dict[str, asyncio.Event] = {}

    def break_streams(self, replica_id: str) -> None:
        """As a network does; the replica itself lives on."""
        self._broken.pop(replica_id, asyncio.Event()).set()

    def kill(self, replica_id: str) -> EngineReplica:
        """As the router sees it: gone, and its streams broken."""
        replica = self.replicas.pop(replica_id)
        self.break_streams(replica_id)
        return replica

    async def submit(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int], submit: Submit
    ) -> Receipt:
        await self._pause()
        replica_id = self._choose(hints)
        self.hints.append(hints)
        self.submitted.append((replica_id, submit))
        self.on_submit(replica_id, submit)
        receipt = self.replicas[replica_id].submit(ingress_id, dict(epochs), submit)
        self.on_accepted(replica_id, submit)
        await self._pause()
        return receipt

    async def attach(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncIterator[Hello | Frame]:
        await self._pause()
        replica_id = self._choose(hints)
        stream = self.replicas[replica_id].attach(ingress_id, dict(epochs))
        broken = asyncio.ensure_future(self._broken.setdefault(replica_id, asyncio.Event()).wait())
        item: asyncio.Future[Hello | Frame | None] = asyncio.ensure_future(anext(stream, None))
        try:
            while True:
                await asyncio.wait({item, broken}, return_when=asyncio.FIRST_COMPLETED)
                if broken.done():
                    raise ConnectionError("the replica is gone")
                received = item.result()
                if received is None:
                    return
                item = asyncio.ensure_future(anext(stream, None))
                yield received
        finally:
            broken.cancel()
            item.cancel()
            await asyncio.gather(item, return_exceptions=True)
            await stream.aclose()

    async def control(
        self,
        hints: Hints,
        stream_id: StreamId,
        aborts: Sequence[Abort],
        renew: bool,
        elsewhere: Sequence[ServiceReport] = (),
    ) -> Lease | None:
        await self._pause()
        replica = self.replicas[self._choose(hints)]
        if hints.target in self.leaving:
            replica.drain()
        kept = [abort for abort in aborts if not self.lose(abort)]
        return await replica.control(stream_id, kept, renew, elsewhere)

    async def choose(self, hints: Hints) -> str:
        await self._pause()
        return self._choose(hints)

    async def _pause(self) -> None:
        """As long as a call takes: others get their turn."""
        if self.hang:
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    def _choose(self, hints: Hints) -> str:
        if hints.target:
            if hints.target not in self.replicas:
                raise UnknownStream(f"{hints.target} is gone")
            return hints.target
        running = [r for r in self.replicas if r not in self.leaving]
        if not running:
            raise ConnectionError("no replica is running")
        return next((r for r in running if r not in hints.avoid), running[0])
