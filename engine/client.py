"""EngineClient: start an engine process and talk to it from asyncio.

Submits and aborts requests without waiting, passes every frame of new tokens to one callback, and
detects a process that died or hangs: its requests then end with an error, and the process is
started again. Imports no torch, which only the engine process needs.
"""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

import msgspec

from engine.config import EngineConfig
from engine.framing import BadFrame, FrameDecoder, Message, encode
from engine.messages import (
    AbortRequest,
    AddRequest,
    EngineInfo,
    EngineReady,
    EngineStats,
    ErrorKind,
    FromEngine,
    GenerateRequest,
    Item,
    Ping,
    RequestError,
    RequestOutput,
    StartEngine,
    StepOutputs,
)

MAX_FAILED_STARTS = 3
RESTART_BACKOFF_S = 0.5
CLOSE_TIMEOUT_S = 5.0
SPIN_COUNT = "1000"  # a few microseconds

log = logging.getLogger(__name__)

OnFrame = Callable[[list[Item]], None]

_DECODER = msgspec.msgpack.Decoder(FromEngine)


class EngineStartError(RuntimeError):
    """The engine process failed to start; the message is the reason that it gave."""


class EngineUnavailable(RuntimeError):
    """The engine process is being restarted; try again later."""


class EngineClient:
    """Run one engine process. `on_frame` is called on the event loop with each step's outputs.

    Every choice of a submitted request ends with an output that has a finish_reason, whatever
    happens to the process.
    """

    def __init__(
        self, config: EngineConfig, on_frame: OnFrame, *, hang_timeout_s: float = 120.0
    ) -> None:
        self.config = config
        self.stats = EngineStats()
        self.num_restarts = 0
        self.failure: str | None = None  # set once restarting is given up
        self._on_frame = on_frame
        self._hang_timeout_s = hang_timeout_s
        self._info: EngineInfo | None = None
        self._connection: _Connection | None = None
        self._live: dict[str, set[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineUnavailable("the engine has not started yet")
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._connection is not None and self._connection.is_ready

    @property
    def pid(self) -> int | None:
        return self._connection.process.pid if self._connection else None

    async def start(self) -> EngineInfo:
        """Start the process and wait until the model is loaded. Raises EngineStartError."""
        connection = await _connect(self.config, self._on_outputs, self._on_lost)
        self._connection = connection
        connection.send(StartEngine(self.config))
        self._info = await connection.ready
        self._spawn(self._watch(connection))
        return self._info

    def submit(self, request: GenerateRequest) -> None:
        """Send a request to the process. Raises EngineUnavailable while none is ready."""
        if not self.is_ready or self._connection is None:
            raise EngineUnavailable(self.failure or "the engine is being started again")
        assert request.request_id not in self._live, f"{request.request_id} was submitted twice"
        self._connection.send(AddRequest(request))
        self._live[request.request_id] = set(range(max(request.n, 1)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End one choice, or all, within a step. Ignores what is unknown or has ended."""
        if request_id in self._live and self._connection is not None:
            self._connection.send(AbortRequest(request_id, index))

    async def close(self) -> None:
        """End the process. Requests that are still running end with an error."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        if self._connection is not None:
            await self._connection.close()

    # ==== callbacks of the connection ====

    def _on_outputs(self, outputs: StepOutputs) -> None:
        if outputs.stats is not None:
            self.stats = outputs.stats
        for item in outputs.items:
            if not isinstance(item, tuple) and item.finish_reason is not None:
                self._forget(item)
        self._deliver(outputs.items)

    def _on_lost(self, reason: str) -> None:
        error = RequestError(ErrorKind.ENGINE_DIED, reason)
        ended: list[Item] = [
            RequestOutput(request_id, index, [], finish_reason="error", error=error)
            for request_id, indexes in self._live.items()
            for index in sorted(indexes)
        ]
        self._live.clear()
        self.stats = EngineStats()
        self._deliver(ended)
        if not self._is_closing and self._info is not None:
            log.error("%s; it is started again, without %d outputs", reason, len(ended))
            self._spawn(self._restart())

    def _deliver(self, items: list[Item]) -> None:
        try:
            if items:
                self._on_frame(items)
        except Exception:  # a bug in the callback must not end the process and all requests
            log.exception("the callback for the engine's frames raised")

    def _forget(self, output: RequestOutput) -> None:
        indexes = self._live.get(output.request_id)
        if indexes is not None:
            indexes.discard(output.index)
            if not indexes:
                del self._live[output.request_id]

    async def _restart(self) -> None:
        for attempt in range(MAX_FAILED_STARTS):
            await asyncio.sleep(RESTART_BACKOFF_S * 2**attempt * (attempt > 0))
            try:
                await self.start()
            except EngineStartError as error:
                self.failure = f"the engine could not be started again: {error}"
            else:
                self.num_restarts += 1
                self.failure = None
                return

    async def _watch(self, connection: "_Connection") -> None:
        """Ping the process; kill it once it has been silent for too long."""
        while not connection.is_lost:
            connection.send(Ping())
            await asyncio.sleep(self._hang_timeout_s / 4)
            silent_s = time.monotonic() - connection.heard_s
            if silent_s > self._hang_timeout_s:
                connection.kill(f"the engine was silent for {silent_s:.0f} s and was killed")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Connection(asyncio.Protocol):
    """Connection to one process, from its start to its end. `on_lost` is called once, at the end.

    The argument of `on_lost` is the reason why the process ended.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        on_outputs: Callable[[StepOutputs], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.process = process
        self.ready: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self.heard_s = time.monotonic()
        self.is_lost = False
        self._on_outputs = on_outputs
        self._on_lost = on_lost
        self._decoder = FrameDecoder(_DECODER)
        self._kill_reason: str | None = None
        self._transport: asyncio.Transport | None = None
        self._gone = asyncio.Event()
        self._reaping: asyncio.Future[None] | None = None

    @property
    def is_ready(self) -> bool:
        done = self.ready.done() and not self.ready.cancelled()
        return done and self.ready.exception() is None and not self.is_lost

    def send(self, message: Message) -> None:
        if self._transport is not None and not self.is_lost:
            self._transport.write(encode(message))

    def kill(self, reason: str) -> None:
        self._kill_reason = reason
        self.process.kill()

    async def close(self) -> None:
        self._close_transport()
        await self._gone.wait()

    def _close_transport(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self.heard_s = time.monotonic()
        try:
            messages = self._decoder.feed(data)
        except BadFrame as error:
            self.kill(f"the engine's process was killed, its messages are not understood: {error}")
            self._close_transport()
            return
        for message in messages:
            if isinstance(message, StepOutputs):
                self._on_outputs(message)
            elif isinstance(message, EngineReady):
                self.ready.set_result(message.info)
            else:
                self.ready.set_exception(EngineStartError(message.reason))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self._reaping = asyncio.ensure_future(self._reap())

    async def _reap(self) -> None:
        """Wait for the process, which ends slightly after its socket, and report its exit code."""
        code = await asyncio.to_thread(_wait_or_kill, self.process)
        reason = self._kill_reason or f"the engine's process ended with code {code}"
        if not self.ready.done():
            self.ready.set_exception(EngineStartError(reason))
        self._on_lost(reason)
        self._gone.set()


def _wait_or_kill(process: "subprocess.Popen[bytes]") -> int:
    try:
        return process.wait(CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


async def _connect(
    config: EngineConfig,
    on_outputs: Callable[[StepOutputs], None],
    on_lost: Callable[[str], None],
) -> _Connection:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=_environment(config),
        )
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: _Connection(process, on_outputs, on_lost), sock=ours
    )
    return connection


def _environment(config: EngineConfig) -> dict[str, str]:
    """Set the number of threads from the config: Ray sets OMP_NUM_THREADS in its own processes.

    Waiting threads spin only briefly: with OpenMP's default, a step takes several times as long as
    soon as another process needs one of the cores, and Ray's processes always do.
    """
    threads = str(config.num_threads or os.cpu_count() or 1)
    ours = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return {"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ, **ours}
