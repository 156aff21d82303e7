"""Channel: send and receive messages on a blocking stream socket, one after the other."""

import socket
import time
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

from engine.framing import BadFrame, FrameDecoder, Message, encode

_CHUNK = 1 << 20
MessageT = TypeVar("MessageT")


class ChannelLost(Exception):
    """The other end is gone, silent for too long, or not understood."""


class Channel(Generic[MessageT]):
    """One thread at a time may use it, but for `interrupt`."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[MessageT]) -> None:
        self._sock = sock
        self._decoder = FrameDecoder(decoder)
        self._ready: deque[MessageT] = deque()

    def send(self, message: Message, timeout_s: float | None = None) -> None:
        """Raises ChannelLost."""
        try:
            self._sock.settimeout(timeout_s)
            self._sock.sendall(encode(message))
        except OSError as error:
            raise ChannelLost(f"nothing can be sent: {error}") from error

    def receive(self, timeout_s: float | None = None) -> MessageT:
        """Wait for the next message. Raises ChannelLost."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ready:
            try:
                self._sock.settimeout(_left_s(deadline_s))
                data = self._sock.recv(_CHUNK)
                self._ready.extend(self._decoder.feed(data))
            except (OSError, BadFrame) as error:
                raise ChannelLost(f"nothing was received: {error}") from error
            if not data:
                raise ChannelLost("the other end has closed")
        return self._ready.popleft()

    def leave(self) -> None:
        """Close this process's descriptor; another one that has the socket goes on."""
        self._sock.close()

    def interrupt(self) -> None:
        """End a `receive` of another thread, now or later, with ChannelLost.

        The descriptor stays with that thread, which closes it: its number might be another
        socket's by the time that the thread waits for it.
        """
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.interrupt()
        self._sock.close()


def _left_s(deadline_s: float | None) -> float | None:
    return None if deadline_s is None else max(deadline_s - time.monotonic(), 1e-3)
