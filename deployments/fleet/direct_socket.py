"""A TCP connection between one ingress replica and one engine replica, for frequent messages.

A call through Ray costs its two sides more than a millisecond of CPU together, and each item of a
stream some hundred microseconds. So what comes with every request (a submit, its receipt) and with
every engine step (a frame) goes through a TCP connection of its own; what is rare stays with Ray,
which also says where the replica listens. No Ray here.

The replica makes an Offer: its address, its version of this protocol, and a ticket that is good for
one connection within a short time. The ingress sends ticket and version first; until then nothing
is decoded. If an offer is not accepted, as behind a firewall or with another version, everything
goes through Ray. What cannot be decoded closes the connection.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, cast

import msgspec

from deployments.fleet.batch_queue import BatchQueue
from deployments.fleet.protocol import Frame, Hello, Receipt, Submit
from deployments.fleet.socket_messages import (
    FROM_REPLICA,
    GREETING_BYTES,
    TICKET_BYTES,
    TO_REPLICA,
    VERSION,
    Accepted,
    Answer,
    NewFrame,
    StreamEnd,
    Submission,
    greeting,
    read_greeting,
    version_mismatch,
)
from engine.framing import BadFrame, FrameDecoder, Message, encode

OFFER_S = 2.0  # an offer is valid for this long; frames are held back until then
CONNECT_S = 1.0  # well below OFFER_S

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    host: str
    port: int
    ticket: bytes
    version: int = VERSION


Greeting = tuple[Hello, Offer | None]


class Receiver(Protocol):
    """What accepts the requests: an EngineReplica."""

    def submit(self, ingress_id: str, epochs: Mapping[str, int], submit: Submit) -> Receipt: ...


@dataclass(slots=True)
class _OpenOffer:
    """For whom it is, and the connection that has accepted it."""

    ingress_id: str
    replica_id: str
    connection: "asyncio.Future[ReplicaEndpoint]"


# ---- the replica's side ----------------------------------------------------------------------


class DirectServer:
    """Listens for a replica. Owns the open offers, by their tickets, each of which is used once."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self._offers: dict[bytes, _OpenOffer] = {}
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
                with self._offer(_OpenOffer(ingress_id, hello.replica_id, accepted)) as offer:
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
    def _offer(self, offer: _OpenOffer) -> Generator[Offer | None]:
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

    def redeem(self, ticket: bytes, version: int, endpoint: "ReplicaEndpoint") -> _OpenOffer | None:
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


class _Endpoint(asyncio.Protocol):
    """What both ends have in common."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        self._transport: asyncio.Transport | None = None
        self._decoder = FrameDecoder(decoder)
        self.is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def send(self, message: Message) -> None:
        if self._transport is not None and not self.is_over:
            self._transport.write(encode(message))

    def decode(self, data: bytes) -> list[Any]:
        """Return the messages that are now complete; close the connection if one is malformed."""
        try:
            return self._decoder.feed(data)
        except BadFrame as error:
            logger.error("a direct socket is closed: %s", error)
            self.close()
            return []

    def close(self) -> None:
        """Close. What has been sent still goes out."""
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_over = True


class ReplicaEndpoint(_Endpoint):
    """Sends nothing and decodes nothing until it has seen a ticket."""

    def __init__(self, server: DirectServer) -> None:
        super().__init__(TO_REPLICA)
        self._server = server
        self._greeting = b""
        self._offer: _OpenOffer | None = None
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

    def _submit(self, offer: _OpenOffer, submission: Submission) -> Receipt | None:
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


# ---- the ingress' side -----------------------------------------------------------------------


async def connect(offer: Offer) -> "IngressEndpoint | None":
    """Accept an offer. None if the replica is unreachable or rejects the ticket."""
    where = f"{offer.host}:{offer.port}"
    if offer.version != VERSION:
        mismatch = version_mismatch(f"the replica at {where}", offer.version)
        logger.warning("%s, everything goes by Ray", mismatch)
        return None
    loop = asyncio.get_running_loop()
    endpoint: IngressEndpoint | None = None
    try:
        async with asyncio.timeout(CONNECT_S):
            _, endpoint = await loop.create_connection(IngressEndpoint, offer.host, offer.port)
            await endpoint.present(offer.ticket)
    except (OSError, TimeoutError) as error:
        if endpoint is not None:
            endpoint.close()
        logger.warning("no socket to the replica at %s, everything goes by Ray: %r", where, error)
        return None
    return endpoint


class IngressEndpoint(_Endpoint):
    """If the connection ends, every `submit` that waits raises ConnectionError; so does `frames`,
    unless the replica has sent StreamEnd."""

    def __init__(self) -> None:
        super().__init__(FROM_REPLICA)
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received: BatchQueue[Frame | StreamEnd | ConnectionError] = BatchQueue()
        self._receipts: dict[int, asyncio.Future[Receipt]] = {}
        self._numbers = count()

    async def present(self, ticket: bytes) -> None:
        """Send the ticket, and wait until the replica has accepted it."""
        assert self._transport is not None, "presented once connected"
        self._transport.write(greeting(ticket))
        await self._accepted

    async def submit(self, epoch: int, submit: Submit) -> Receipt:
        if self.is_over:
            raise ConnectionError("the socket to the replica broke")
        number = next(self._numbers)
        receipt = asyncio.get_running_loop().create_future()
        self._receipts[number] = receipt
        try:
            self.send(Submission(number, epoch, submit))
            return await receipt
        finally:
            del self._receipts[number]

    async def frames(self) -> AsyncIterator[Frame]:
        while True:
            for received in await self._received.next_batch():
                if isinstance(received, ConnectionError):
                    raise received
                if isinstance(received, StreamEnd):
                    return
                yield received

    def data_received(self, data: bytes) -> None:
        for message in self.decode(data):
            if isinstance(message, NewFrame):
                self._received.put(message.frame)
            elif isinstance(message, Answer):
                self._settle(message)
            elif isinstance(message, StreamEnd):
                self._received.put(message)
            elif not self._accepted.done():
                self._accepted.set_result(None)

    def _settle(self, answer: Answer) -> None:
        receipt = self._receipts.get(answer.number)
        if receipt is None or receipt.done():
            return
        if answer.receipt is None:
            receipt.set_exception(RuntimeError("the replica failed to take the request"))
        else:
            receipt.set_result(answer.receipt)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        broken = ConnectionError(f"the socket to the replica broke: {exc}")
        self._received.put(broken)  # after StreamEnd, if that has come
        for waiting in (self._accepted, *self._receipts.values()):
            if not waiting.done():
                waiting.set_exception(broken)
