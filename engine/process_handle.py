"""ProcessHandle: one engine process as the client sees it, from its start until it is reaped.

It passes on what the process sends, watches that it does not fall silent, and makes sure that it
ends. It never starts another one; that is the client's business.
"""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import cast

import msgspec

from engine.config import EngineConfig
from engine.framing import BadFrame, FrameDecoder, Message, encode
from engine.liveness import Liveness
from engine.messages import (
    Busy,
    EngineInfo,
    EngineReady,
    FromEngine,
    Ping,
    StartEngine,
    StepOutputs,
)
from engine.process_usage import UsageMeter

PROGRAM = (sys.executable, "-m", "engine.process")
CLOSE_TIMEOUT_S = 5.0  # for a process to end by itself
KILL_TIMEOUT_S = 10.0  # for the system to end a process that was killed
LAST_WORDS_S = 1.0  # for what a process that has ended had sent before
WATCH_PERIOD_S = 0.25
IDLE_WATCH_PERIOD_S = 1.0  # where nothing was sent or came for a period, but pings and answers
POLL_S = 0.01
SPIN_COUNT = "1000"  # a few microseconds

_DECODER = msgspec.msgpack.Decoder(FromEngine)


class EngineStartError(RuntimeError):
    """The engine process failed to start; the message is the reason that it gave."""


class ProcessHandle(asyncio.Protocol):
    """Made by `spawn`. `on_outputs` is not called any more once `ended` has returned."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        on_outputs: Callable[[StepOutputs], None],
        liveness: Liveness,
    ) -> None:
        self._process = process
        self._on_outputs = on_outputs
        self._liveness = liveness
        self.ending_since_s: float | None = None
        self._ready_since_s: float | None = None
        self._spawned_s = time.monotonic()
        self._decoder = FrameDecoder(_DECODER)
        self._transport: asyncio.Transport | None = None
        self._info: EngineInfo | None = None
        self._start_failure: str | None = None
        self._end_reason: str | None = None
        self._is_idle = False  # since the watch last looked
        self._has_settled = asyncio.Event()  # ready, or about to end
        self._is_disconnected = asyncio.Event()
        self._is_over = asyncio.Event()
        self._is_gone = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def spawn(
        cls, config: EngineConfig, on_outputs: Callable[[StepOutputs], None], liveness: Liveness
    ) -> "ProcessHandle":
        """Start a process and tell it to load the model. Raises EngineStartError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = _popen(config, theirs)
            except OSError as error:
                ours.close()
                raise EngineStartError(f"no process could be started: {error}") from error
        handle = cls(process, on_outputs, liveness)
        liveness.begin()
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: handle, sock=ours)
        except BaseException as error:
            handle.kill("its start was cancelled")
            if isinstance(error, OSError):
                raise EngineStartError(f"no connection to the process: {error}") from error
            raise
        handle.send(StartEngine(config))
        handle._watching = asyncio.create_task(handle._watch())
        return handle

    # ---- state ---------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        return self._info is not None and self._ending is None

    @property
    def ready_s(self) -> float:
        """How long the process was ready, until now or until it began to end."""
        if self._ready_since_s is None:
            return 0.0
        until_s = time.monotonic() if self.ending_since_s is None else self.ending_since_s
        return until_s - self._ready_since_s

    async def ready(self) -> EngineInfo:
        """Wait for the model to be loaded. Raises EngineStartError once the process has ended.

        `load_s` of the result counts from the start of the process.
        """
        await self._has_settled.wait()
        if self._info is not None:
            return self._info
        reason = await self.ended()
        raise EngineStartError(self._start_failure or reason)

    async def ended(self) -> str:
        """Wait for the end of the process, or until it cannot be ended; return the reason."""
        await self._is_over.wait()
        return self._end_reason or ""

    async def gone(self, timeout_s: float) -> bool:
        """Wait until there is no such process any more; tell whether that is so."""
        try:
            await asyncio.wait_for(self._is_gone.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    # ---- orders --------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        if self._transport is not None and self._ending is None:
            self._is_idle = self._is_idle and isinstance(message, Ping)
            self._transport.write(encode(message))

    def kill(self, reason: str) -> None:
        """End the process at once. A reason that was given before stays."""
        self._end_reason = self._end_reason or reason
        self._process.kill()
        self._begin_end()

    async def close(self) -> None:
        """Let the process end; kill it if it does not."""
        if self._transport is not None:
            self._transport.close()
        self._begin_end()
        await self._is_over.wait()

    # ---- the connection ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_disconnected.set()
        self._begin_end()

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._decoder.feed(data)
        except BadFrame as error:
            self.kill(f"the engine's process was killed, its messages are not understood: {error}")
            return
        if not messages:
            self._liveness.hear_part()
        for message in messages:
            self._receive(message)

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, StepOutputs):
            self._liveness.hear_step()
            self._is_idle = self._is_idle and not message.items
            if not self._is_over.is_set():
                self._on_outputs(message)
        elif isinstance(message, Busy):
            self._liveness.hear_busy(message.work, message.patience_s)
        elif isinstance(message, EngineReady):
            self._liveness.hear_ready(may_compile=message.info.device != "cpu")
            self._info = replace(message.info, load_s=time.monotonic() - self._spawned_s)
            self._ready_since_s = time.monotonic()
            self._has_settled.set()
        else:
            self._start_failure = message.reason
            self._begin_end()

    # ---- watching ------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Ping the process when it is silent, and kill it when it is silent for too long."""
        liveness, meter = self._liveness, UsageMeter(self.pid)
        last_s, period_s = time.monotonic(), WATCH_PERIOD_S
        while self._ending is None:
            self._is_idle = True
            await asyncio.sleep(period_s)
            is_idle = self._is_idle and not liveness.is_waiting
            period_s = IDLE_WATCH_PERIOD_S if is_idle else WATCH_PERIOD_S
            now_s = time.monotonic()
            elapsed_s, last_s = now_s - last_s, now_s
            if liveness.wants_usage:
                liveness.pass_time(elapsed_s, meter.read(elapsed_s))
            else:
                meter.forget()
                liveness.pass_time(elapsed_s, None)
            if liveness.is_hanging:
                self.kill(_hang(liveness))
            elif liveness.wants_ping:
                liveness.ping()
                self.send(Ping())

    # ---- the end -------------------------------------------------------------------------

    def _begin_end(self) -> None:
        if self._ending is None:
            self.ending_since_s = time.monotonic()
            self._ending = asyncio.ensure_future(self._end())
            self._has_settled.set()

    async def _end(self) -> None:
        if not await self._exits_within(CLOSE_TIMEOUT_S):
            self._process.kill()
        if await self._exits_within(KILL_TIMEOUT_S):
            reason = f"the engine's process ended with code {self._process.returncode}"
            await self._hear_last_words()
        else:
            reason = f"the engine's process {self.pid} does not end, although it was killed"
        self._end_reason = self._end_reason or reason
        if self._transport is not None:
            self._transport.abort()
        self._is_over.set()
        while self._process.poll() is None:
            await asyncio.sleep(WATCH_PERIOD_S)
        self._is_gone.set()

    async def _exits_within(self, seconds: float) -> bool:
        """Poll: a wait in a thread would keep the program alive with a process that cannot end."""
        deadline_s = time.monotonic() + seconds
        while self._process.poll() is None:
            if time.monotonic() >= deadline_s:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def _hear_last_words(self) -> None:
        if self._transport is None:
            return
        with suppress(TimeoutError):  # a process of its own may have inherited the socket
            await asyncio.wait_for(self._is_disconnected.wait(), LAST_WORDS_S)


def _hang(liveness: Liveness) -> str:
    while_ = f" while {liveness.work}" if liveness.work else ""
    return f"the engine was silent for {liveness.silent_s:.0f} s{while_} and was killed"


def _popen(config: EngineConfig, theirs: socket.socket) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*PROGRAM, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=_environment(config),
    )


def _environment(config: EngineConfig) -> dict[str, str]:
    """Set the number of threads from the config: Ray sets OMP_NUM_THREADS in its own processes.

    Waiting threads spin only briefly: with OpenMP's default, a step takes several times as long as
    soon as another process needs one of the cores, and Ray's processes always do.
    """
    threads = str(config.num_threads or os.cpu_count() or 1)
    ours = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return {"GOMP_SPINCOUNT": SPIN_COUNT, **os.environ, **ours}
