"""Prewarmer: loads the adapters that a new replica will be asked for.

Their files are fetched while the model is loaded. Then each gets a request of one token, so that it
comes to the device as it does for any other: fetched, verified, decoded, proven and copied.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from adapter_store.names import AdapterRef
from deployments.fleet.protocol import StreamId, Submit
from deployments.replica.adapter_fetcher import AdapterFetcher
from deployments.replica.ingress_streams import IngressStream
from deployments.replica.live_requests import LiveRequests
from deployments.replica.outbox import Outbox
from engine.messages import GenerateRequest
from engine.scheduler.request import SamplingParams

ANSWER_S = 0.5
ONE_TOKEN = SamplingParams(max_tokens=1, ignore_eos=True)

AskForAdapters = Callable[[], Awaitable[Sequence[AdapterRef]]]

logger = logging.getLogger(__name__)


class Prewarmer:
    """Runs once. What cannot be loaded is left to the requests that want it."""

    def __init__(
        self, ask: AskForAdapters, requests: LiveRequests, fetcher: AdapterFetcher
    ) -> None:
        self._requests, self._fetcher = requests, fetcher
        self._has_answer, self._has_started = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._run(ask))

    async def wait(self, limit_s: float) -> None:
        """Wait until all is loaded, at most so long; the rest goes on. The engine must run.

        Those who are asked have had the time of the model's load: they are not waited for long.
        """
        self._has_started.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                async with asyncio.timeout(ANSWER_S):
                    await self._has_answer.wait()
                await asyncio.wait([self._task])

    def close(self) -> None:
        self._task.cancel()

    async def _run(self, ask: AskForAdapters) -> None:
        try:
            refs = await ask()
        except Exception as error:  # whatever Ray raises while there is no ingress
            logger.info("asking which adapters will be wanted: %r", error)
            return
        finally:
            self._has_answer.set()
        for ref in refs:
            self._fetcher.acquire(ref, ref.tenant)
        try:
            await self._has_started.wait()
            if refs:
                await self._load(refs)
        finally:
            for ref in refs:
                self._fetcher.release(ref)

    async def _load(self, refs: Sequence[AdapterRef]) -> None:
        began_s = time.monotonic()
        stream = IngressStream(StreamId("prewarm", 0), began_s, Outbox(time.monotonic))
        for number, ref in enumerate(refs):
            request = GenerateRequest(f"prewarm-{number}", [0], ONE_TOKEN, tenant=ref.tenant)
            self._requests.accept(stream, Submit(request, ref), is_counted=False)
        while stream.request_ids:
            await stream.outbox.wait()
            stream.outbox.take(1)
        took_s = time.monotonic() - began_s
        logger.info("loaded %d adapters ahead of their requests in %.2f s", len(refs), took_s)
