"""Wire: the connection between one ingress replica and one engine replica for all that is frequent.

A call through Ray costs its two sides more than a millisecond of CPU together, and each item of a
stream some hundred microseconds. So what comes with every request (a submit, its receipt) and with
every engine step (a frame) goes through a TCP connection of its own; what is rare stays with Ray,
which also says where the replica listens. No Ray here.

The replica makes an Offer: its address and a ticket, good for one connection and a moment. Whoever
connects shows the ticket first; until then nothing that comes is unpickled. Where nobody takes up
an offer, as behind a firewall, everything goes through Ray.

    ingress:  32 bytes of ticket, then (number, epoch, Submit) ...
    replica:  ACCEPTED, then a list for each frame, (number, Receipt or None) for each submit, END
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

from deployments.fleet.batch_queue import Mailbox
from deployments.fleet.protocol import Frame, Hello, Receipt, Submit
from engine.framing import FrameDecoder, encode

TICKET_BYTES = 32
OFFER_S = 2.0  # an offer stands for so long; the frames wait for it
CONNECT_S = 1.0  # well below OFFER_S
ACCEPTED = "accepted"
END = "end"

OnSubmit = Callable[[int, Submit], Receipt]  # (epoch, what) -> the answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    host: str
    port: int
    ticket: bytes


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

    def redeem(self, ticket: bytes, end: "ReplicaEnd") -> OnSubmit | None:
        taken, on_submit = self._standing.pop(ticket, (None, None))
        if taken is None or taken.done():
            return None
        taken.set_result(end)
        return on_submit


async def _send_all(stream: AsyncIterator[Hello | Frame], end: "ReplicaEnd") -> None:
    async for frame in stream:
        if not await end.send_frame(cast(Frame, frame)):
            return
    end.send(END)


class _End(asyncio.Protocol):
    """What both ends have in common."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._decoder = FrameDecoder()
        self.is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def send(self, message: Any) -> None:
        if self._transport is not None and not self.is_over:
            self._transport.write(encode(message))

    def close(self) -> None:
        """What has been sent still goes out."""
        if self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_over = True


class ReplicaEnd(_End):
    """Says nothing and understands nothing until it has seen a ticket."""

    def __init__(self, server: WireServer) -> None:
        super().__init__()
        self._server = server
        self._ticket = b""
        self._on_submit: OnSubmit | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._patience = asyncio.get_running_loop().call_later(OFFER_S, self.close)

    async def send_frame(self, frame: Frame) -> bool:
        """False once there is nobody to send it to. Waits while the ingress is slow."""
        if not self._can_write.is_set():
            await self._can_write.wait()
        self.send(frame)
        return not self.is_over

    def data_received(self, data: bytes) -> None:
        if self._on_submit is None:
            data = self._admit(data)
        if self._on_submit is not None:
            for number, epoch, submit in self._decoder.feed(data):
                self.send((number, _answer(self._on_submit, epoch, submit)))

    def _admit(self, data: bytes) -> bytes:
        """What follows the ticket."""
        data = self._ticket + data
        self._ticket, rest = data[:TICKET_BYTES], data[TICKET_BYTES:]
        if len(self._ticket) < TICKET_BYTES:
            return b""
        self._patience.cancel()
        self._on_submit = self._server.redeem(self._ticket, self)
        if self._on_submit is None:
            self.close()
        else:
            self.send(ACCEPTED)
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
    loop = asyncio.get_running_loop()
    wire: Wire | None = None
    try:
        async with asyncio.timeout(CONNECT_S):
            _, wire = await loop.create_connection(Wire, offer.host, offer.port)
            await wire.show(offer.ticket)
    except (OSError, TimeoutError) as error:
        if wire is not None:
            wire.close()
        where = f"{offer.host}:{offer.port}"
        logger.warning("no wire to the replica at %s, everything goes by Ray: %r", where, error)
        return None
    return wire


class Wire(_End):
    """Every `submit` that waits when the connection ends raises ConnectionError; so does `frames`,
    unless the replica has said END."""

    def __init__(self) -> None:
        super().__init__()
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news: Mailbox[Frame | str | ConnectionError] = Mailbox()
        self._receipts: dict[int, asyncio.Future[Receipt]] = {}
        self._numbers = count()

    async def show(self, ticket: bytes) -> None:
        assert self._transport is not None, "shown once connected"
        self._transport.write(ticket)
        await self._accepted

    async def submit(self, epoch: int, submit: Submit) -> Receipt:
        if self.is_over:
            raise ConnectionError("the wire to the replica broke")
        number = next(self._numbers)
        receipt = asyncio.get_running_loop().create_future()
        self._receipts[number] = receipt
        self.send((number, epoch, submit))
        try:
            return await receipt
        finally:
            del self._receipts[number]

    async def frames(self) -> AsyncIterator[Frame]:
        while True:
            for news in await self._news.next():
                if isinstance(news, ConnectionError):
                    raise news
                if isinstance(news, str):
                    return
                yield news

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            if isinstance(message, tuple):
                number, answer = message
                receipt = self._receipts.get(number)
                if receipt is None or receipt.done():
                    continue
                if answer is None:
                    receipt.set_exception(RuntimeError("the replica failed to take the request"))
                else:
                    receipt.set_result(answer)
            elif message != ACCEPTED:
                self._news.put(message)
            elif not self._accepted.done():
                self._accepted.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        broken = ConnectionError(f"the wire to the replica broke: {exc}")
        self._news.put(broken)  # behind END, if that has come
        for waiting in (self._accepted, *self._receipts.values()):
            if not waiting.done():
                waiting.set_exception(broken)
