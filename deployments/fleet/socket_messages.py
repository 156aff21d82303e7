"""Define the messages of the direct socket between an ingress replica and an engine replica.

ingress:  a greeting (32 bytes of ticket, 2 of version), then Submission ...
replica:  Accepted, then NewFrame for each frame, Answer for each Submission, StreamEnd
"""

import msgspec

from deployments.fleet.protocol import Frame, Receipt, Submit
from engine.framing import Message

VERSION = 15  # raise it with every change of the messages below and of what they contain
TICKET_BYTES = 32
GREETING_BYTES = TICKET_BYTES + 2


class Submission(Message):
    """Answered under the same `number`."""

    number: int
    epoch: int
    submit: Submit


class Accepted(Message):
    """Confirms that the ticket was good."""


class NewFrame(Message):
    frame: Frame


class Answer(Message):
    """`receipt` is None if taking the request failed."""

    number: int
    receipt: Receipt | None


class StreamEnd(Message):
    """Says that nothing more will come; a connection that ends without it broke."""


FromReplica = Accepted | NewFrame | Answer | StreamEnd

TO_REPLICA = msgspec.msgpack.Decoder(Submission)
FROM_REPLICA = msgspec.msgpack.Decoder(FromReplica)


def greeting(ticket: bytes) -> bytes:
    return ticket + VERSION.to_bytes(GREETING_BYTES - TICKET_BYTES, "little")


def read_greeting(data: bytes) -> tuple[bytes, int]:
    """Return ticket and version."""
    return data[:TICKET_BYTES], int.from_bytes(data[TICKET_BYTES:], "little")


def version_mismatch(peer: str, version: int) -> str:
    return f"{peer} speaks version {version} of the direct socket's protocol, not {VERSION}"
