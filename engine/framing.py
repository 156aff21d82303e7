"""Frame messages on a stream socket: a 4-byte little-endian length, then the message as msgpack.

Used between a replica and its engine process, and between an ingress and a replica. Both sides
declare their messages as subclasses of `Message`. A decoder accepts the types it was made for,
checks every field, and builds nothing else, so bytes from outside cannot run code.
"""

from typing import Generic, TypeVar

import msgspec

# The longest message of a model with 131,072 tokens of context, the log-probabilities of a whole
# prompt with 20 alternatives each, has about 42 MB.
MAX_BODY_BYTES = 2**30
_HEADER = 4

MessageT = TypeVar("MessageT")


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base class of all messages. Encoded as an array of the class's name and the fields."""


class BadFrame(ValueError):
    """The bytes are not a message of the expected types; what follows them is unusable too."""


_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Return the message as a frame. Raises BadFrame if it is too long."""
    body = _ENCODER.encode(message)
    _check_length(len(body))
    return len(body).to_bytes(_HEADER, "little") + body


class FrameDecoder(Generic[MessageT]):
    """Assemble whole messages from bytes that arrive in any portions."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[MessageT]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[MessageT]:
        """Return the messages that are now complete. After a BadFrame the decoder is unusable."""
        self._buffer += data
        messages: list[MessageT] = []
        while len(self._buffer) >= _HEADER:
            length = int.from_bytes(self._buffer[:_HEADER], "little")
            _check_length(length)
            end = _HEADER + length
            if len(self._buffer) < end:
                break
            messages.append(self._decode(self._buffer[_HEADER:end]))
            del self._buffer[:end]
        return messages

    def _decode(self, body: bytearray) -> MessageT:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadFrame(f"a message of {len(body)} bytes cannot be decoded: {error}") from error


def _check_length(length: int) -> None:
    if length > MAX_BODY_BYTES:
        raise BadFrame(f"a message of {length} bytes is longer than {MAX_BODY_BYTES}")
