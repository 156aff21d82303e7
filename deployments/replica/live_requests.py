"""LiveRequests: the requests that a replica has accepted, from there to their last outputs.

Adapters are fetched off the engine's path, and each engine frame is split by ingress.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_store.names import AdapterRef
from deployments.fleet.protocol import Submit
from deployments.policy.load_meter import LoadMeter
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

    def accept(self, stream: IngressStream, submit: Submit, is_counted: bool = True) -> None:
        request = submit.request
        live = LiveRequest(stream, request, request.n, is_counted=is_counted)
        self.by_id[request.request_id] = live
        self.num_open += live.num_open
        if is_counted:
            self.meter.received(len(request.prompt_token_ids), live.num_open)
        stream.request_ids[request.request_id] = None
        if submit.adapter_ref is None:
            self._start(request)
        else:
            folder = self._fetcher.acquire(submit.adapter_ref, request.tenant)
            live.adapter_ref = submit.adapter_ref
            live.fetching = asyncio.create_task(self._start_with(folder, live, submit.adapter_ref))

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
        for request_id, live in list(self.by_id.items()):
            self._stop(request_id, live)
            self.fail(request_id, error)

    def _stop(self, request_id: str, live: LiveRequest) -> None:
        if live.fetching is not None:
            live.fetching.cancel()
        self.engine.abort(request_id)

    def _release(self, request_id: str, live: LiveRequest) -> None:
        del self.by_id[request_id]
        self.num_open -= live.num_open
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
