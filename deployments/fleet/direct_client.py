"""IngressEndpoint: the ingress' end of a direct socket."""

import asyncio
import logging
from collections.abc import AsyncIterator
from itertools import count

from deployments.fleet.batch_queue import BatchQueue
from deployments.fleet.direct_socket import Endpoint, Offer
from deployments.fleet.protocol import Frame, Receipt, Submit
from deployments.fleet.socket_messages import (
    FROM_REPLICA,
    VERSION,
    Answer,
    NewFrame,
    StreamEnd,
    Submission,
    greeting,
    version_mismatch,
)

CONNECT_S = 1.0  # well below OFFER_S

logger = logging.getLogger(__name__)


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


class IngressEndpoint(Endpoint):
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
