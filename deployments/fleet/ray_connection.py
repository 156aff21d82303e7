"""RayConnection: reach the replicas of one Engine deployment from an ingress.

Calls go over a Serve handle, or over a direct socket to a replica that there is a stream to. Ray's
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

from deployments.fleet.direct_client import IngressEndpoint, connect
from deployments.fleet.protocol import Abort, Frame, Hello, Hints, Lease, Receipt, StreamId, Submit
from deployments.policy.shared_service import ServiceReport

CHOOSE_S = 0.25  # a choice between replicas takes far less


class RayConnection:
    """A protocol.Connection. Messages are pickled in C, not by cloudpickle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        handle = handle.options(request_serialization="pickle", response_serialization="pickle")
        self._submit = handle.submit
        self._control = handle.control
        self._attach = handle.options(stream=True).attach
        self._sockets: dict[str, IngressEndpoint] = {}

    async def submit(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int], submit: Submit
    ) -> Receipt:
        replica_id = await self._choose_at_once(hints) if self._sockets else None
        if replica_id is not None:
            socket = self._sockets.get(replica_id)
            if socket is not None:
                return await socket.submit(epochs.get(replica_id, 0), submit)
            hints = replace(hints, target=replica_id)  # chosen, and counted, once
        return await _unary(self._submit, hints, ingress_id, epochs, submit)

    async def _choose_at_once(self, hints: Hints) -> str | None:
        """Ask the router; None if that must wait for a replica.

        Ray counts a call that waits, and starts a replica for it, but not a choice that does.
        """
        try:
            async with asyncio.timeout(CHOOSE_S):
                return await self.choose(hints)
        except TimeoutError:
            return None

    async def choose(self, hints: Hints) -> str:
        """Ask the router where the call would go. No call is made, and nothing is reserved."""
        async with self._submit.choose_replica(hints, _reserve=False) as selection:
            return selection.replica_id

    async def attach(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncIterator[Hello | Frame]:
        response = _call(self._attach, hints, ingress_id, epochs)
        socket = None
        try:
            hello, offer = await anext(response)
            socket = None if offer is None else await connect(offer)
            if socket is not None:
                self._sockets[hello.replica_id] = socket
            yield hello
            if socket is not None:
                async for frame in socket.frames():
                    yield frame
            async for frame in response:  # after a socket's frames only the end is left
                yield frame
        finally:
            if socket is not None:
                self._forget(socket)
            response.cancel()

    def _forget(self, socket: IngressEndpoint) -> None:
        socket.close()
        self._sockets = {r: known for r, known in self._sockets.items() if known is not socket}

    async def control(
        self,
        hints: Hints,
        stream_id: StreamId,
        aborts: Sequence[Abort],
        renew: bool,
        elsewhere: Sequence[ServiceReport] = (),
    ) -> Lease | None:
        return await _unary(self._control, hints, stream_id, aborts, renew, elsewhere)


def _call(method: DeploymentHandle[Any], *args: object) -> Any:
    return contextvars.Context().run(method.remote, *args)


async def _unary(method: DeploymentHandle[Any], *args: object) -> Any:
    response = _call(method, *args)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
