"""RayConnection: how an ingress reaches the replicas of one Engine deployment.

Over a Serve handle, and beside it over a `wire` to every replica that it has a stream to. Ray's
router says which replica is best either way.

Calls must not inherit the context of an HTTP request: Ray gives all calls out of one request the
same internal id, by which its router tells pending calls apart (the second of two at the same
time would wait for ever), and cancels them when the request ends.
"""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.fleet.direct_socket import Wire, take_up
from deployments.fleet.protocol import Abort, Frame, Hello, Hints, Lease, Receipt, StreamId, Submit


class RayConnection:
    """A transport.Connection. Messages are pickled by C, not by cloudpickle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        handle = handle.options(request_serialization="pickle", response_serialization="pickle")
        self._submit = handle.submit
        self._control = handle.control
        self._attach = handle.options(stream=True).attach
        self._wires: dict[str, Wire] = {}

    async def submit(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int], submit: Submit
    ) -> Receipt:
        if self._wires:
            replica_id = await self._choose(hints)
            wire = self._wires.get(replica_id)
            if wire is not None:
                return await wire.submit(epochs.get(replica_id, 0), submit)
            hints = replace(hints, target=replica_id)  # chosen, and counted, once
        return await _unary(self._submit, hints, ingress_id, epochs, submit)

    async def _choose(self, hints: Hints) -> str:
        """What the router would do with the call. No call is made: nothing is reserved."""
        async with self._submit.choose_replica(hints, _reserve=False) as selection:
            return selection.replica_id

    async def attach(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncIterator[Hello | Frame]:
        response = _call(self._attach, hints, ingress_id, epochs)
        wire = None
        try:
            hello, offer = await anext(response)
            wire = None if offer is None else await take_up(offer)
            if wire is not None:
                self._wires[hello.replica_id] = wire
            yield hello
            if wire is not None:
                async for frame in wire.frames():
                    yield frame
            async for frame in response:  # of a wire's, only its end
                yield frame
        finally:
            if wire is not None:
                self._forget(wire)
            response.cancel()

    def _forget(self, wire: Wire) -> None:
        wire.close()
        self._wires = {r: known for r, known in self._wires.items() if known is not wire}

    async def control(
        self, hints: Hints, stream_id: StreamId, aborts: Sequence[Abort], renew: bool
    ) -> Lease | None:
        return await _unary(self._control, hints, stream_id, aborts, renew)


def _call(method: DeploymentHandle, *args: object) -> Any:
    return contextvars.Context().run(method.remote, *args)


async def _unary(method: DeploymentHandle, *args: object) -> Any:
    response = _call(method, *args)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
