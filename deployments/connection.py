"""RayConnection: how an ingress reaches the replicas of one Engine deployment, over a Serve handle.

Calls must not inherit the context of an HTTP request: Ray gives all calls out of one request the
same internal id, by which its router tells pending calls apart (the second of two at the same
time would wait for ever), and cancels them when the request ends.
"""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.transport import Abort, Frame, Hello, Hints, Lease, Receipt, StreamId, Submit


class RayConnection:
    """A transport.Connection. Messages are pickled by C, not by cloudpickle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        handle = handle.options(request_serialization="pickle", response_serialization="pickle")
        self._submit = handle.submit
        self._control = handle.control
        self._attach = handle.options(stream=True).attach

    async def submit(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int], submit: Submit
    ) -> Receipt:
        return await _unary(self._submit, hints, ingress_id, epochs, submit)

    async def attach(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncIterator[Hello | Frame]:
        response = _call(self._attach, hints, ingress_id, epochs)
        try:
            async for frame in response:
                yield frame
        finally:
            response.cancel()

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
