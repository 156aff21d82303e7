"""LiveRequests: the requests that a replica has accepted, from there to their last outputs.

Adapters are fetched off the engine's path, and each engine frame is split by ingress.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapter_store.names import AdapterRef
from deployments.fleet.protocol import Submit
from deployments.policy.load_meter import LoadMeter
from deployments.policy.queue_shares import FlowLoad
from deployments.replica.adapter_fetcher import AdapterFetcher, adapter_error
from deployments.replica.engine_handle import EngineHandle
from deployments.replica.ingress_streams import IngressStream
from engine.client import EngineUnavailable
from engine.messages import (
    AdapterFolder,
    ErrorKind,
    GenerateRequest,
    Item,
    RequestError,
    RequestOutput,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class LiveRequest:
    """One accepted request. `adapter_ref` is set while this request keeps it pinned."""

    stream: IngressStream
    request: GenerateRequest
    num_open: int  # choices that have not finished
    adapter_ref: AdapterRef | None = None
    fetching: asyncio.Task[None] | None = None  # until the adapter is there
    is_counted: bool = True  # as part of the traffic
    flow: FlowLoad = field(kw_only=True)
    has_begun: bool = False  # its first token has come, here or where it was before
    timer: asyncio.TimerHandle | None = None  # until its first token comes


class LiveRequests:
    """Every request ends with one last output per choice, or is dropped.

    `make_engine` is given the callback for the engine's frames.
    """

    def __init__(
        self,
        make_engine: Callable[[Callable[[list[Item]], None]], EngineHandle],
        fetcher: AdapterFetcher,
    ) -> None:
        self.engine = make_engine(self.on_frame)
        self.by_id: dict[str, LiveRequest] = {}
        self.num_open = 0  # choices that have not ended: they take a place in the batch
        self.meter = LoadMeter()
        self._flows: dict[tuple[str, int], FlowLoad] = {}  # that have a request
        self._fetcher = fetcher

    # ---- outputs -------------------------------------------------------------------------

    def on_frame(self, items: list[Item]) -> None:
        """Hand each item to its ingress. The engine calls it once per step."""
        touched: dict[IngressStream, None] = {}
        by_id = self.by_id
        for item in items:
            is_tokens = isinstance(item, tuple)
            request_id = item[0] if is_tokens else item.request_id
            live = by_id.get(request_id)
            if live is None:
                continue  # aborted while this was on its way
            stream = live.stream
            stream.outbox.put(request_id, item)
            touched[stream] = None
            if not is_tokens:
                self._note(request_id, live, item)
        for stream in touched:
            stream.outbox.end_step()

    def _note(self, request_id: str, live: LiveRequest, output: RequestOutput) -> None:
        if not live.has_begun:
            self._begin(live)
        metrics = output.metrics if live.is_counted else None
        if metrics is not None:
            self.meter.waited(metrics.queue_s)
        if output.finish_reason is None:
            return
        if metrics is not None:
            self.meter.answered(metrics.num_output_tokens)
        if output.error is not None:
            self._repair_if_damaged(live, output.error)
        self._finish_choice(request_id, live)

    def _repair_if_damaged(self, live: LiveRequest, error: RequestError) -> None:
        """See to the adapter's files before the ingress sends the request again."""
        if error.kind == ErrorKind.ADAPTER_DAMAGED and live.adapter_ref is not None:
            self._fetcher.repair(live.adapter_ref, live.request.tenant)

    def _finish_choice(self, request_id: str, live: LiveRequest) -> None:
        live.num_open -= 1
        live.flow.num_open -= 1
        self.num_open -= 1
        if live.num_open == 0:
            self._release(request_id, live)

    def fail(self, request_id: str, error: RequestError) -> None:
        """Give every choice that has not ended its last output."""
        n = self.by_id[request_id].request.n
        self.on_frame(
            [
                RequestOutput(request_id, index, [], finish_reason="error", error=error)
                for index in range(n)
            ]
        )

    # ---- the beginning -------------------------------------------------------------------

    @property
    def flows(self) -> Collection[FlowLoad]:
        """What there is of each tenant and class."""
        return self._flows.values()

    def flow_of(self, request: GenerateRequest) -> FlowLoad:
        """Return what there is of a request's tenant and class, which may be nothing."""
        known = self._flows.get((request.tenant, request.priority_class))
        if known is None:
            return FlowLoad(request.tenant, request.priority_class, request.weight)
        known.weight = request.weight
        return known

    def accept(self, stream: IngressStream, submit: Submit, is_counted: bool = True) -> None:
        request = submit.request
        flow = self._flows.setdefault(
            (request.tenant, request.priority_class), self.flow_of(request)
        )
        live = LiveRequest(stream, request, request.n, is_counted=is_counted, flow=flow)
        self.by_id[request.request_id] = live
        self.num_open += live.num_open
        flow.num_open += live.num_open
        live.has_begun = bool(request.output_token_ids)
        if not live.has_begun:
            self._expect(live, submit.timeout_s)
        if is_counted:
            self.meter.received(len(request.prompt_token_ids), live.num_open)
        stream.request_ids[request.request_id] = None
        if submit.adapter_ref is None:
            self._start(request)
        else:
            folder = self._fetcher.acquire(submit.adapter_ref, request.tenant)
            live.adapter_ref = submit.adapter_ref
            live.fetching = asyncio.create_task(self._start_with(folder, live, submit.adapter_ref))

    def _expect(self, live: LiveRequest, timeout_s: float | None) -> None:
        """Count a prompt as waiting, and end it if its first token has not come by then."""
        live.flow.queued_tokens += len(live.request.prompt_token_ids)
        if timeout_s is not None:
            loop = asyncio.get_running_loop()
            live.timer = loop.call_later(timeout_s, self._end_late, live, timeout_s)

    def _begin(self, live: LiveRequest) -> None:
        """Note the first token, or an end without one."""
        live.has_begun = True
        live.flow.queued_tokens -= len(live.request.prompt_token_ids)
        if live.timer is not None:
            live.timer.cancel()

    def _end_late(self, live: LiveRequest, timeout_s: float) -> None:
        message = f"No token came in the {timeout_s:.3g} s that were left of what is allowed."
        self._end(live, RequestError(ErrorKind.TOO_LATE, message))

    async def _start_with(
        self, folder: asyncio.Future[Path], live: LiveRequest, ref: AdapterRef
    ) -> None:
        try:
            path = await asyncio.shield(folder)  # others may be waiting for it too
        except Exception as error:
            logger.warning("adapter %s of %s: %r", ref.name, ref.tenant, error)
            self.fail(live.request.request_id, adapter_error(error))
            return
        live.fetching = None
        folder_of_ref = AdapterFolder(ref.digest, str(path), ref.vocab_size)
        self._start(replace(live.request, adapter_folder=folder_of_ref))

    def _start(self, request: GenerateRequest) -> None:
        try:
            self.engine.submit(request)
        except EngineUnavailable as error:
            self.fail(request.request_id, RequestError(ErrorKind.ENGINE_DIED, str(error)))

    # ---- the end -------------------------------------------------------------------------

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that their ingress no longer wants: nothing more is sent for them."""
        for request_id in list(request_ids):
            live = self.by_id.get(request_id)
            if live is not None:
                self._stop(request_id, live)
                self._release(request_id, live)

    def fail_all(self, error: RequestError) -> None:
        for live in list(self.by_id.values()):
            self._end(live, error)

    def num_waiting_of(self, flow: FlowLoad) -> int:
        """Count the answers of a flow that have not begun."""
        lives = self.by_id.values()
        return sum(live.num_open for live in lives if live.flow is flow and not live.has_begun)

    def shed(self, flow: FlowLoad, num_answers: int, error: RequestError) -> int:
        """End the newest requests of a flow that have not begun, until so many answers are gone.

        Return how many there were, perhaps fewer.
        """
        num_gone = 0
        for live in reversed(list(self.by_id.values())):
            if num_gone >= num_answers:
                break
            if live.flow is flow and not live.has_begun:
                num_gone += live.num_open
                self._end(live, error)
        return num_gone

    def _end(self, live: LiveRequest, error: RequestError) -> None:
        request_id = live.request.request_id
        self._stop(request_id, live)
        self.fail(request_id, error)

    def _stop(self, request_id: str, live: LiveRequest) -> None:
        if live.fetching is not None:
            live.fetching.cancel()
        self.engine.abort(request_id)

    def _release(self, request_id: str, live: LiveRequest) -> None:
        del self.by_id[request_id]
        self.num_open -= live.num_open
        flow = live.flow
        flow.num_open -= live.num_open
        if not live.has_begun:
            self._begin(live)
        if not flow.num_open:
            self._flows.pop((flow.tenant, flow.rank), None)
        del live.stream.request_ids[request_id]
        if live.adapter_ref is not None:
            self._fetcher.release(live.adapter_ref)
        live.stream.outbox.wake()  # it may have been the last one that a drain waits for

    # ---- figures -------------------------------------------------------------------------

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of requests whose adapter is on its way."""
        waiting = [live for live in self.by_id.values() if live.fetching is not None]
        return sum(len(live.request.prompt_token_ids) for live in waiting)
