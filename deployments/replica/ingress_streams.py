"""IngressStreams: the streams of one engine replica, one to each ingress that it works for.

An ingress keeps its stream by renewing a lease. Its requests go with its stream: what becomes of
them is told to one callback.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.fleet.protocol import StreamId, UnknownStream
from deployments.replica.outbox import Outbox

LEASE_S = 8.0  # an ingress that says nothing for this long is gone

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class IngressStream:
    """The stream to one ingress."""

    id: StreamId
    renewed_s: float
    outbox: Outbox
    is_open: bool = True
    is_attached: bool = False
    request_ids: dict[str, None] = field(default_factory=dict[str, None])


class IngressStreams:
    """Each ingress has one stream at most, that of the latest epoch it has named."""

    def __init__(
        self,
        replica_id: str,
        clock: Callable[[], float],
        on_detach: Callable[[IngressStream], None],
    ) -> None:
        self._replica_id = replica_id
        self._clock = clock
        self._on_detach = on_detach
        self._by_ingress: dict[str, IngressStream] = {}

    def open(self, ingress_id: str, epoch: int) -> IngressStream | None:
        """Find the stream of that epoch, or begin it. None if there is a later one."""
        stream = self._by_ingress.get(ingress_id)
        if stream is not None and stream.id.epoch > epoch:
            return None
        if stream is not None and stream.id.epoch < epoch:
            self.detach(stream)  # given up by the ingress, unnoticed here so far
            stream = None
        if stream is None:
            stream = IngressStream(StreamId(ingress_id, epoch), self._clock(), Outbox(self._clock))
            self._by_ingress[ingress_id] = stream
        return stream

    def attach(self, ingress_id: str, epoch: int) -> IngressStream:
        """Open a stream for its one reader. Raises UnknownStream."""
        stream = self.open(ingress_id, epoch)
        if stream is None or stream.is_attached:
            raise UnknownStream(f"{ingress_id} has another stream to {self._replica_id}")
        stream.is_attached = True
        stream.renewed_s = self._clock()
        return stream

    def renew(self, stream_id: StreamId) -> IngressStream:
        """Raises UnknownStream."""
        stream = self._by_ingress.get(stream_id.ingress_id)
        if stream is None or stream.id != stream_id:
            raise UnknownStream(stream_id)
        stream.renewed_s = self._clock()
        return stream

    def detach(self, stream: IngressStream) -> None:
        stream.is_open = False
        stream.outbox.close()
        stream.outbox.wake()
        if self._by_ingress.get(stream.id.ingress_id) is stream:
            del self._by_ingress[stream.id.ingress_id]
        self._on_detach(stream)

    def detach_all(self) -> None:
        for stream in list(self._by_ingress.values()):
            self.detach(stream)

    def detach_silent(self, now_s: float) -> None:
        """Detach the ingresses whose lease has ended."""
        for stream in list(self._by_ingress.values()):
            if now_s - stream.renewed_s > LEASE_S:
                logger.warning("ingress stream %s fell silent", stream.id)
                self.detach(stream)

    def wake_all(self) -> None:
        for stream in self._by_ingress.values():
            stream.outbox.wake()
