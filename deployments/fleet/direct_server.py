"""DirectServer: the replica's end of its direct sockets."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

from deployments.fleet.direct_socket import Endpoint, Greeting, Offer
from deployments.fleet.protocol import Frame, Hello, Receipt, Submit
from deployments.fleet.socket_messages import (
    GREETING_BYTES,
    TICKET_BYTES,
    TO_REPLICA,
    VERSION,
    Accepted,
    Answer,
    NewFrame,
    StreamEnd,
    Submission,
    read_greeting,
    version_mismatch,
)

OFFER_S = 2.0  # an offer is valid for this long; frames are held back until then

logger = logging.getLogger(__name__)


class Receiver(Protocol):
    """What accepts the requests: an EngineReplica."""

    def submit(self, ingress_id: str, epochs: Mapping[str, int], submit: Submit) -> Receipt: ...


@dataclass(slots=True)
class OpenOffer:
    """For whom it is, and the connection that has accepted it."""

    ingress_id: str
    replica_id: str
    connection: "asyncio.Future[ReplicaEndpoint]"


class DirectServer:
    """Listens for a replica. Owns the open offers, by their tickets, each of which is used once."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self._offers: dict[bytes, OpenOffer] = {}
        self._server: asyncio.Server | None = None
        self._address = ("", 0)

    async def listen(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: ReplicaEndpoint(self), host, 0)
        except OSError as error:  # a node may be known by an address that is not its own
            logger.warning("cannot listen on %s, everything goes by Ray: %s", host, error)
        else:
            self._address = (host, self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def relay(
        self, stream: AsyncGenerator[Hello | Frame, None], ingress_id: str
    ) -> AsyncIterator[Greeting | Frame]:
        """Yield what Ray has to send: the Hello with an offer, and the frames if it is declined.

        Ends with the stream, or when the connection breaks.
        """
        accepted: asyncio.Future[ReplicaEndpoint] = asyncio.get_running_loop().create_future()
        try:
            async with aclosing(stream):
                hello = cast(Hello, await anext(stream))
                with self._offer(OpenOffer(ingress_id, hello.replica_id, accepted)) as offer:
                    yield hello, offer
                    if offer is not None:
                        await asyncio.wait([accepted], timeout=OFFER_S)
                if accepted.done():
                    await _send_all(stream, accepted.result())
                else:
                    async for frame in stream:
                        yield cast(Frame, frame)
        finally:
            if accepted.done():
                accepted.result().close()

    @contextmanager
    def _offer(self, offer: OpenOffer) -> Generator[Offer | None]:
        """Keep the offer open for the length of the block. None if the server does not listen."""
        if self._server is None:
            yield None
            return
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._offers[ticket] = offer
        try:
            yield Offer(*self._address, ticket)
        finally:
            self._offers.pop(ticket, None)

    def redeem(self, ticket: bytes, version: int, endpoint: "ReplicaEndpoint") -> OpenOffer | None:
        """Give an open offer to the connection that shows its ticket."""
        offer = self._offers.pop(ticket, None)
        if offer is None or offer.connection.done():
            return None
        if version != VERSION:
            logger.warning("%s, everything goes by Ray", version_mismatch("an ingress", version))
            return None
        offer.connection.set_result(endpoint)
        return offer


async def _send_all(stream: AsyncIterator[Hello | Frame], endpoint: "ReplicaEndpoint") -> None:
    async for frame in stream:
        if not await endpoint.send_frame(cast(Frame, frame)):
            return
    endpoint.send(StreamEnd())


class ReplicaEndpoint(Endpoint):
    """Sends nothing and decodes nothing until it has seen a ticket."""

    def __init__(self, server: DirectServer) -> None:
        super().__init__(TO_REPLICA)
        self._server = server
        self._greeting = b""
        self._offer: OpenOffer | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._deadline = asyncio.get_running_loop().call_later(OFFER_S, self.close)

    async def send_frame(self, frame: Frame) -> bool:
        """Send a frame, once the ingress has read enough. False if the connection is over."""
        if not self._can_write.is_set():
            await self._can_write.wait()
        self.send(NewFrame(frame))
        return not self.is_over

    def data_received(self, data: bytes) -> None:
        if self._offer is None:
            data = self._admit(data)
        if self._offer is not None:
            for submission in self.decode(data):
                receipt = self._submit(self._offer, submission)
                self.send(Answer(submission.number, receipt))

    def _admit(self, data: bytes) -> bytes:
        """Check the greeting; return what follows it."""
        data = self._greeting + data
        self._greeting, rest = data[:GREETING_BYTES], data[GREETING_BYTES:]
        if len(self._greeting) < GREETING_BYTES:
            return b""
        self._deadline.cancel()
        self._offer = self._server.redeem(*read_greeting(self._greeting), self)
        if self._offer is None:
            self.close()
        else:
            self.send(Accepted())
        return rest

    def _submit(self, offer: OpenOffer, submission: Submission) -> Receipt | None:
        epochs = {offer.replica_id: submission.epoch}
        try:
            return self._server.receiver.submit(offer.ingress_id, epochs, submission.submit)
        except Exception:  # an error of one request must not end the others
            logger.exception("submitting %s", submission.submit.request.request_id)
            return None

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._deadline.cancel()
        self._can_write.set()
