"""Turns: the loop of an engine's process, run in this thread, a turn at a time.

Its connection is a pair of sockets, so that reading requests and sending tokens cost what they cost
there. What the other end does is not measured.
"""

import gc
import socket
import time
from contextlib import suppress
from dataclasses import replace

import msgspec
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.framing import FrameDecoder, Message, encode
from engine.gc_freeze import keep_what_is_loaded
from engine.messages import (
    AbortRequest,
    AddRequest,
    FromEngine,
    GenerateRequest,
    RequestOutput,
    StepOutputs,
)
from engine.process import Connection, Loop

_CHUNK = 1 << 20


class Turns:
    """One engine, whose adapters are not proven. Not thread-safe; `close` ends it."""

    def __init__(self, config: EngineConfig) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._connection = Connection(theirs)
        self._unsent = bytearray()
        self._decoder = FrameDecoder(msgspec.msgpack.Decoder(FromEngine))
        self.engine = Engine(replace(config, adapter_proof="off"), wake=self._connection.wake)
        self._loop = Loop(self.engine, self._connection)
        keep_what_is_loaded()

    def add(self, request: GenerateRequest) -> None:
        """Let the next turn take a request."""
        self._send(AddRequest(request))

    def abort(self, request_id: str) -> None:
        self._send(AbortRequest(request_id))

    def turn(self) -> tuple[list[tuple[str, int, bool]], float]:
        """Run one turn, which waits while the engine has nothing to do.

        Return (request_id, new tokens, whether it has ended) of the requests that it is about, and
        its seconds. Raises RuntimeError if a request ends with an error.
        """
        self._flush()
        began_s = time.perf_counter()
        with torch.inference_mode():
            self._loop.turn()
        took_s = time.perf_counter() - began_s
        return self._receive(), took_s

    def close(self) -> None:
        self.engine.close()
        self._socket.close()
        self._connection.close()
        gc.unfreeze()

    def _send(self, message: Message) -> None:
        self._unsent += encode(message)

    def _flush(self) -> None:
        with suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]

    def _receive(self) -> list[tuple[str, int, bool]]:
        news: list[tuple[str, int, bool]] = []
        with suppress(BlockingIOError):
            while data := self._socket.recv(_CHUNK):
                for message in self._decoder.feed(data):
                    assert isinstance(message, StepOutputs)
                    news += [_news(item) for item in message.items]
        return news


def _news(item: tuple[str, int, list[int]] | RequestOutput) -> tuple[str, int, bool]:
    if isinstance(item, tuple):
        return item[0], len(item[2]), False
    if item.error is not None:
        raise RuntimeError(f"a request failed: {item.error.message}")
    return item.request_id, len(item.token_ids), item.finish_reason is not None
