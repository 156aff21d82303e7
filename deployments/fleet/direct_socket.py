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
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from deployments.fleet.protocol import Hello
from deployments.fleet.socket_messages import VERSION
from engine.framing import BadFrame, FrameDecoder, Message, encode

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    host: str
    port: int
    ticket: bytes
    version: int = VERSION


Greeting = tuple[Hello, Offer | None]


class Endpoint(asyncio.Protocol):
    """One end of the connection: sends and decodes messages until it is over."""

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
