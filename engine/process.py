"""Run an engine in a process of its own: read requests, send one frame of new tokens per step.

    python -m engine.process <socket file descriptor>

in:   StartEngine, then AddRequest, AbortRequest, Ping
out:  EngineReady or StartFailed, then StepOutputs; Busy before anything that takes long

The loop never blocks on a slow reader: bytes that the socket does not take wait in memory. The
process ends when the client closes the connection, and on an error that no step can recover from,
such as a lost device; the client then starts another process. Only the step loop sends frames, so
a loop that hangs sends none, and the client detects that.
"""

import logging
import os
import select
import socket
import sys
import time
from contextlib import suppress
from typing import Any

import msgspec

from engine.announcer import Announcer
from engine.config import EngineConfig
from engine.framing import BadFrame, FrameDecoder, Message, encode
from engine.gc_freeze import keep_what_is_loaded
from engine.messages import (
    AbortRequest,
    AddRequest,
    Busy,
    EngineReady,
    ErrorKind,
    GenerateRequest,
    Ping,
    RequestError,
    RequestOutput,
    ServedElsewhere,
    StartEngine,
    StartFailed,
    StepOutputs,
    ToEngine,
    encodable,
    to_item,
)
from engine.scheduler.request import InvalidRequest

log = logging.getLogger(__name__)

STATS_PERIOD_S = 0.1
_CHUNK = 1 << 20
_DECODER = msgspec.msgpack.Decoder(ToEngine)


class Connection:
    """Exchange messages over a non-blocking socket. Other threads end a wait through a pipe."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = FrameDecoder(_DECODER)
        self._unsent = bytearray()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.closed = False

    def wake(self) -> None:
        """End the current or the next `receive`. May be called from any thread."""
        with suppress(BlockingIOError):  # the pipe is full, so `receive` will end anyway
            os.write(self._wake_write, b"\0")

    def send(self, message: Message) -> None:
        self._unsent += encode(message)
        self._flush()

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        """Return what has arrived; wait up to `timeout_s` (None: for ever) for the first one."""
        writers = [self._sock] if self._unsent else []
        readable, writable, _ = select.select([self._sock, self._wake_read], writers, [], timeout_s)
        if writable:
            self._flush()
        if self._wake_read in readable:
            os.read(self._wake_read, _CHUNK)
        return self._read() if self._sock in readable else []

    def _read(self) -> list[ToEngine]:
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        self.closed = not data
        try:
            return self._decoder.feed(data)
        except BadFrame as error:
            log.critical("the engine's process ends: %s", error)
            self.closed = True
            return []

    def close(self) -> None:
        """Close the socket and the pipe; nothing else may be called afterwards."""
        self._sock.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            pass
        except ConnectionError:
            self.closed = True


def serve(connection: Connection) -> None:
    """Load the model that the first message names, then step until the connection closes."""
    config, early = _wait_for_start(connection)

    def announce(work: str, patience_s: float | None) -> None:
        connection.send(Busy(work, patience_s))

    announce("importing", None)
    import torch

    from engine.engine import Engine

    try:
        announcer = Announcer(announce, shows_bars=True)
        engine = Engine(config, wake=connection.wake, announcer=announcer)
    except Exception as error:
        connection.send(StartFailed(encodable(f"{type(error).__name__}: {error}")))
        raise
    keep_what_is_loaded()
    connection.send(EngineReady(engine.info))
    loop = Loop(engine, connection)
    for message in early:
        loop.handle(message)
    with torch.inference_mode():
        loop.run()
    engine.close()


def serve_or_exit(connection: Connection) -> None:
    """Call `serve`; log an exception and end the process with exit code 1."""
    try:
        serve(connection)
    except Exception as error:
        log.critical(
            "the engine's process ends: %s: %s", type(error).__name__, error, exc_info=True
        )
        logging.shutdown()
        os._exit(1)  # skip destructors: on a lost device they fail or wait for ever


class Loop:
    """What the process does over and over."""

    def __init__(self, engine: Any, connection: Connection) -> None:
        self._engine = engine
        self._connection = connection
        self._stats_due_s = 0.0
        self._stats_stale = True
        self._is_pinged = False
        self._rejected: list[Any] = []

    def run(self) -> None:
        while not self._connection.closed:
            self.turn()

    def turn(self) -> None:
        """Take what has arrived, step, and send what there is; waits while nothing is to do."""
        for message in self._connection.receive(self._timeout_s()):
            self.handle(message)
        outputs = self._rejected + self._engine.step()
        self._rejected = []
        self._stats_stale |= bool(outputs) or not self._engine.is_idle
        self._report(outputs)

    def handle(self, message: ToEngine) -> None:
        if isinstance(message, AddRequest):
            self._add(message.request)
        elif isinstance(message, AbortRequest):
            self._engine.abort(message.request_id, message.index)
        elif isinstance(message, ServedElsewhere):
            self._engine.count_elsewhere(message.served)
        elif isinstance(message, Ping):
            self._is_pinged = True
        else:
            raise ValueError("the engine was started already")

    def _add(self, request: GenerateRequest) -> None:
        try:
            self._engine.add_request(request)
        except InvalidRequest as refusal:
            error = RequestError(ErrorKind.INVALID_REQUEST, str(refusal))
            self._rejected += [
                RequestOutput(request.request_id, i, [], finish_reason="error", error=error)
                for i in range(max(request.n, 1))
            ]

    def _timeout_s(self) -> float | None:
        """Return 0 while there is work, else the time until statistics are due, if they are."""
        if not self._engine.is_idle:
            return 0.0
        return max(self._stats_due_s - time.monotonic(), 0.0) if self._stats_stale else None

    def _report(self, outputs: list[Any]) -> None:
        now = time.monotonic()
        is_due = self._stats_stale and now >= self._stats_due_s
        stats, served = None, ()
        if is_due or self._is_pinged:
            stats, served = self._engine.stats, self._engine.take_served()
        if is_due:
            self._stats_due_s, self._stats_stale = now + STATS_PERIOD_S, False
        verdicts = self._engine.take_verdicts()
        if outputs or stats is not None or verdicts:
            self._connection.send(StepOutputs(list(map(to_item, outputs)), stats, verdicts, served))
        self._is_pinged = False


def _wait_for_start(connection: Connection) -> tuple[EngineConfig, list[ToEngine]]:
    messages: list[ToEngine] = []
    while not messages:
        messages = connection.receive(None)
        if connection.closed:
            sys.exit("the other end closed before the engine was started")
    first, *early = messages
    if not isinstance(first, StartEngine):
        raise ValueError(f"{type(first).__name__} came before StartEngine")
    return first.config, early


def main() -> None:
    import signal

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent closes the connection
    serve_or_exit(Connection(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
