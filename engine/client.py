"""EngineClient: keep one engine process running and talk to it from asyncio.

Submits and aborts requests without waiting and passes every frame of new tokens to one callback.
When the process dies or hangs, its requests end with an error and one loop starts it again, one
process at a time. Imports no torch, which only the engine process needs.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from engine.config import EngineConfig
from engine.liveness import Liveness
from engine.messages import (
    AbortRequest,
    AdapterVerdict,
    AddRequest,
    EngineInfo,
    EngineStats,
    ErrorKind,
    FlowTokens,
    GenerateRequest,
    Item,
    RequestError,
    RequestOutput,
    ServedElsewhere,
    StepOutputs,
)
from engine.process_handle import EngineStartError, ProcessHandle

MAX_FAILED_STARTS = 3
RESTART_BACKOFF_S = 0.5  # after the second end in a row; doubled with each further one
MAX_BACKOFF_S = 60.0
LASTING_S = 60.0  # a process that was ready for so long is no sign that the next one ends too
GONE_TIMEOUT_S = 30.0  # for a process that was killed, before the next one counts as failed

log = logging.getLogger(__name__)

OnFrame = Callable[[list[Item]], None]
OnVerdict = Callable[[AdapterVerdict], None]
OnServed = Callable[[Sequence[FlowTokens]], None]


def restart_delay_s(num_short: int) -> float:
    """Wait before a restart: not after one process that ended soon, ever longer after several."""
    if num_short < 2:
        return 0.0
    return min(RESTART_BACKOFF_S * 2.0 ** min(num_short - 2, 30), MAX_BACKOFF_S)


class EngineUnavailable(RuntimeError):
    """The engine process is being restarted; try again later."""


class EngineClient:
    """Run one engine process. `on_frame` is called on the event loop with each step's outputs,
    `on_verdict` with each verdict on an adapter, and `on_served` with what tenants were charged.

    Every choice of a submitted request ends with an output that has a finish_reason, whatever
    happens to the process. There are never two processes: the next one is started when the last
    one has been reaped.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_frame: OnFrame,
        *,
        on_verdict: OnVerdict = lambda verdict: None,
        on_served: OnServed = lambda served: None,
        hang_timeout_s: float = 120.0,
    ) -> None:
        self.config = config
        self.stats = EngineStats()
        self.num_restarts = 0
        self.failure: str | None = None  # set once restarting is given up
        self._last_end = ""  # why the last process that was ready has ended
        self._num_short = 0  # processes in a row that were ready for less than LASTING_S
        self._on_frame = on_frame
        self._on_verdict = on_verdict
        self._on_served = on_served
        self._liveness = Liveness(config.max_silence_s, hang_timeout_s)
        self._info: EngineInfo | None = None
        self._process: ProcessHandle | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._live: dict[str, set[int]] = {}
        self._down_since_s: float | None = time.monotonic()  # None: ready when last seen
        self._is_closing = False

    # ==== state ====

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineUnavailable("the engine has not started yet")
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._process is not None and self._process.is_ready

    @property
    def outage(self) -> str | None:
        """Why requests are refused, in words that clients may read; None while it is ready."""
        if self.is_ready:
            return None
        if self._is_closing:
            return "the engine is being stopped"
        if self.failure is not None:
            return "the engine cannot be started again"
        again = "" if self._info is None else " again"
        return f"the engine is being started{again}, since {self._down_s:.0f} s"

    @property
    def trouble(self) -> str | None:
        """The outage with the reason for it; None while the engine is ready."""
        outage = self.outage
        if outage is None or not self._last_end:
            return outage
        times = (
            f" {self._num_short} times soon after its start, at last" if self._num_short > 1 else ""
        )
        return f"{outage}; it had ended{times}: {self._last_end}"

    @property
    def _down_s(self) -> float:
        since_s = self._down_since_s
        if since_s is None and self._process is not None:
            since_s = self._process.ending_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    # ==== requests ====

    def submit(self, request: GenerateRequest) -> None:
        """Send a request to the process. Raises EngineUnavailable while none is ready."""
        outage = self.outage
        if outage is not None or self._process is None:
            raise EngineUnavailable(outage)
        assert request.request_id not in self._live, f"{request.request_id} was submitted twice"
        self._process.send(AddRequest(request))
        self._live[request.request_id] = set(range(max(request.n, 1)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End one choice, or all, within a step. Ignores what is unknown or has ended."""
        if request_id in self._live and self._process is not None:
            self._process.send(AbortRequest(request_id, index))

    def count_elsewhere(self, served: Sequence[FlowTokens]) -> None:
        """Tell the process what tenants were charged with elsewhere, if there is one."""
        if self._process is not None and self.outage is None:
            self._process.send(ServedElsewhere(tuple(served)))

    # ==== outputs ====

    def _on_outputs(self, outputs: StepOutputs) -> None:
        if outputs.stats is not None:
            self.stats = outputs.stats
        for item in outputs.items:
            if not isinstance(item, tuple) and item.finish_reason is not None:
                self._forget(item)
        self._deliver(outputs.items)
        for verdict in outputs.verdicts:
            self._on_verdict(verdict)
        if outputs.served:
            self._on_served(outputs.served)

    def _end_requests(self, reason: str) -> int:
        """End what the process has left unfinished; return the number of outputs."""
        error = RequestError(ErrorKind.ENGINE_DIED, reason)
        ended: list[Item] = [
            RequestOutput(request_id, index, [], finish_reason="error", error=error)
            for request_id, indexes in self._live.items()
            for index in sorted(indexes)
        ]
        self._live.clear()
        self.stats = EngineStats()
        self._deliver(ended)
        return len(ended)

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

    # ==== the process ====

    async def start(self) -> EngineInfo:
        """Start the process and wait until the model is loaded. Raises EngineStartError.

        From then on the process is started again whenever it ends.
        """
        assert self._keeper is None, "the engine was started already"
        self._down_since_s = time.monotonic()
        process = await self._start_process()
        self._down_since_s = None
        self._keeper = asyncio.create_task(self._keep_running(process))
        return self.info

    async def close(self) -> None:
        """End the process. Requests that are still running end with an error."""
        self._is_closing = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._process is not None:
            await self._process.close()
            self._end_requests(await self._process.ended())

    async def _keep_running(self, process: ProcessHandle | None) -> None:
        """Start the process again whenever it has ended. Nothing else does, so there is only one.

        Ends when the starts fail again and again, which sets `failure`.
        """
        try:
            while process is not None:
                reason = await process.ended()
                self._down_since_s = process.ending_since_s
                num_ended = self._end_requests(reason)
                self._note_end(process, reason)
                delay_s = restart_delay_s(self._num_short)
                log.error(
                    "%s; it is started again in %.1f s, without %d outputs",
                    reason,
                    delay_s,
                    num_ended,
                )
                await asyncio.sleep(delay_s)
                process = await self._start_again()
        except Exception as error:  # a bug here must not look like a start that takes long
            log.exception("the engine is not started again")
            self.failure = f"the engine is not started again: {error!r}"

    def _note_end(self, process: ProcessHandle, reason: str) -> None:
        self._last_end = reason
        self._num_short = self._num_short + 1 if process.ready_s < LASTING_S else 0

    async def _start_again(self) -> ProcessHandle | None:
        reason = ""
        for attempt in range(MAX_FAILED_STARTS):
            await asyncio.sleep(RESTART_BACKOFF_S * 2**attempt * (attempt > 0))
            try:
                process = await self._start_process()
            except EngineStartError as error:
                reason = str(error)
                log.error("start %d of %d failed: %s", attempt + 1, MAX_FAILED_STARTS, reason)
            else:
                self.num_restarts += 1
                log.warning("the engine is ready again after %.1f s", self._down_s)
                self._down_since_s = None
                return process
        self.failure = f"the engine could not be started again: {reason}"
        return None

    async def _start_process(self) -> ProcessHandle:
        if self._process is not None and not await self._process.gone(GONE_TIMEOUT_S):
            raise EngineStartError(await self._process.ended())
        process = await ProcessHandle.spawn(self.config, self._on_outputs, self._liveness)
        self._process = process
        if self._is_closing:
            process.kill("the engine is being stopped")
        try:
            self._info = await process.ready()
        except asyncio.CancelledError:
            process.kill("its start was cancelled")
            raise
        return process
