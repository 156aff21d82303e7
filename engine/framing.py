"""Messages on a stream socket between a replica and its own engine process.

A frame is a 4-byte little-endian length and a pickle. Both ends are ours and the socket is a
private pair, so pickle is safe here and nowhere else.
"""

import pickle
from typing import Any

_HEADER = 4


def encode(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(_HEADER, "little") + body


class FrameDecoder:
    """Bytes in, in any portions; whole messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        self._buffer += data
        messages: list[Any] = []
        while len(self._buffer) >= _HEADER:
            end = _HEADER + int.from_bytes(self._buffer[:_HEADER], "little")
            if len(self._buffer) < end:
                break
            messages.append(pickle.loads(memoryview(self._buffer)[_HEADER:end]))
            del self._buffer[:end]
        return messages
