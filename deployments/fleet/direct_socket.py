"""Wire: the connection between one ingress replica and one engine replica for all that is frequent.

A call through Ray costs its two sides more than a millisecond of CPU together, and each item of a
stream some hundred microseconds. So what comes with every request (a submit, its receipt) and with
every engine step (a frame) goes through a TCP connection of its own; what is rare stays with Ray,
which also says where the replica listens. No Ray here.

The replica makes an Offer: its address, its version of this protocol, and a ticket, good for one
connection and a moment. Whoever connects shows ticket and version first; until then nothing that
comes is decoded. Where nobody takes up an offer, as behind a firewall or with another version,
everything goes through Ray. What cannot be decoded closes the connection.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import msgspec

from deployments.fleet.batch_queue import Mailbox
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

OFFER_S = 2.0  # an offer stands for so long; the frames wait for it
CONNECT_S = 1.0  # well below OFFER_S

OnSubmit = Callable[[int, Submit], Receipt]  # (epoch, what) -> the answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    host: str
    port: int
    ticket: bytes
    version: int = VERSION


Greeting = tuple[Hello, Offer | None]


# ---- the replica's side ----------------------------------------------------------------------


class WireServer:
    """Where a replica listens. Owns the offers that stand: a ticket is in here once, or void."""

    def __init__(self) -> None:
        self._standing: dict[bytes, tuple[asyncio.Future[ReplicaEnd], OnSubmit]] = {}
        self._server: asyncio.Server | None = None
        self._address = ("", 0)

    async def listen(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: ReplicaEnd(self), host, 0)
        except OSError as error:  # a node may be known by an address that is not its own
            logger.warning("cannot listen on %s, everything goes by Ray: %s", host, error)
        else:
            self._address = (host, self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def carry(
        self, stream: AsyncGenerator[Hello | Frame, None], on_submit: OnSubmit
    ) -> AsyncIterator[Greeting | Frame]:
        """The stream as Ray is to send it: its Hello with an offer, and its frames unless the
        offer is taken up. Ends with the stream, or when the wire breaks."""
        taken: asyncio.Future[ReplicaEnd] = asyncio.get_running_loop().create_future()
        try:
            async with aclosing(stream):
                hello = cast(Hello, await anext(stream))
                with self._offer(taken, on_submit) as offer:
                    yield hello, offer
                    if offer is not None:
                        await asyncio.wait([taken], timeout=OFFER_S)
                if taken.done():
                    await _send_all(stream, taken.result())
                else:
                    async for frame in stream:
                        yield cast(Frame, frame)
        finally:
            if taken.done():
                taken.result().close()

    @contextmanager
    def _offer(
        self, taken: "asyncio.Future[ReplicaEnd]", on_submit: OnSubmit
    ) -> Iterator[Offer | None]:
        """Stands for the length of the block."""
        if self._server is None:
            yield None
            return
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._standing[ticket] = (taken, on_submit)
        try:
            yield Offer(*self._address, ticket)
        finally:
            self._standing.pop(ticket, None)

    def redeem(self, ticket: bytes, version: int, end: "ReplicaEnd") -> OnSubmit | None:
        taken, on_submit = self._standing.pop(ticket, (None, None))
        if taken is None or taken.done():
            return None
        if version != VERSION:
            logger.warning("%s, everything goes by Ray", version_mismatch("an ingress", version))
            return None
        taken.set_result(end)
        return on_submit


async def _send_all(stream: AsyncIterator[Hello | Frame], end: "ReplicaEnd") -> None:
    async for frame in stream:
        if not await end.send_frame(cast(Frame, frame)):
            return
    end.send(StreamEnd())


class _End(asyncio.Protocol):
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
        """What has been sent still goes out."""
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_over = True


class ReplicaEnd(_End):
    """Says nothing and understands nothing until it has seen a ticket."""

    def __init__(self, server: WireServer) -> None:
        super().__init__(TO_REPLICA)
        self._server = server
        self._greeting = b""
        self._on_submit: OnSubmit | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._patience = asyncio.get_running_loop().call_later(OFFER_S, self.close)

    async def send_frame(self, frame: Frame) -> bool:
        """False once there is nobody to send it to. Waits while the ingress is slow."""
        if not self._can_write.is_set():
            await self._can_write.wait()
        self.send(NewFrame(frame))
        return not self.is_over

    def data_received(self, data: bytes) -> None:
        if self._on_submit is None:
            data = self._admit(data)
        if self._on_submit is not None:
            for asked in self.decode(data):
                receipt = _answer(self._on_submit, asked.epoch, asked.submit)
                self.send(Answer(asked.number, receipt))

    def _admit(self, data: bytes) -> bytes:
        """Check the greeting; return what follows it."""
        data = self._greeting + data
        self._greeting, rest = data[:GREETING_BYTES], data[GREETING_BYTES:]
        if len(self._greeting) < GREETING_BYTES:
            return b""
        self._patience.cancel()
        self._on_submit = self._server.redeem(*read_greeting(self._greeting), self)
        if self._on_submit is None:
            self.close()
        else:
            self.send(Accepted())
        return rest

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._patience.cancel()
        self._can_write.set()


def _answer(on_submit: OnSubmit, epoch: int, submit: Submit) -> Receipt | None:
    try:
        return on_submit(epoch, submit)
    except Exception:  # one request's, not everybody's
        logger.exception("submitting %s", submit.request.request_id)
        return None


# ---- the ingress' side -----------------------------------------------------------------------


async def take_up(offer: Offer) -> "Wire | None":
    """None where the replica cannot be reached, or does not keep its word."""
    where = f"{offer.host}:{offer.port}"
    if offer.version != VERSION:
        mismatch = version_mismatch(f"the replica at {where}", offer.version)
        logger.warning("%s, everything goes by Ray", mismatch)
        return None
    loop = asyncio.get_running_loop()
    wire: Wire | None = None
    try:
        async with asyncio.timeout(CONNECT_S):
            _, wire = await loop.create_connection(Wire, offer.host, offer.port)
            await wire.show(offer.ticket)
    except (OSError, TimeoutError) as error:
        if wire is not None:
            wire.close()
        logger.warning("no wire to the replica at %s, everything goes by Ray: %r", where, error)
        return None
    return wire


class Wire(_End):
    """Every `submit` that waits when the connection ends raises ConnectionError; so does `frames`,
    unless the replica has sent StreamEnd."""

    def __init__(self) -> None:
        super().__init__(FROM_REPLICA)
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news: Mailbox[Frame | StreamEnd | ConnectionError] = Mailbox()
        self._receipts: dict[int, asyncio.Future[Receipt]] = {}
        self._numbers = count()

    async def show(self, ticket: bytes) -> None:
        assert self._transport is not None, "shown once connected"
        self._transport.write(greeting(ticket))
        await self._accepted

    async def submit(self, epoch: int, submit: Submit) -> Receipt:
        if self.is_over:
            raise ConnectionError("the wire to the replica broke")
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
            for news in await self._news.next():
                if isinstance(news, ConnectionError):
                    raise news
                if isinstance(news, StreamEnd):
                    return
                yield news

    def data_received(self, data: bytes) -> None:
        for message in self.decode(data):
            if isinstance(message, NewFrame):
                self._news.put(message.frame)
            elif isinstance(message, Answer):
                self._settle(message)
            elif isinstance(message, StreamEnd):
                self._news.put(message)
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
        broken = ConnectionError(f"the wire to the replica broke: {exc}")
        self._news.put(broken)  # behind StreamEnd, if that has come
        for waiting in (self._accepted, *self._receipts.values()):
            if not waiting.done():
                waiting.set_exception(broken)
