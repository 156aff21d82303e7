"""Placement: offer an attempt to replicas until one takes it.

Which replica is asked is the router's decision; here is only which ones to avoid, and when to
give up.
"""

import asyncio
import logging

from deployments.fleet.failover import Attempt
from deployments.fleet.protocol import Connection, Hints, Receipt
from deployments.fleet.stream_pool import StreamPool
from deployments.fleet.timing import Timing
from deployments.policy.prefix_memory import prefix_keys
from engine.messages import ErrorKind, GenerateRequest, RequestError

logger = logging.getLogger(__name__)


class Placement:
    """Changes the ids of the attempts that it offers more than once, in `attempts` too."""

    def __init__(
        self,
        connection: Connection,
        ingress_id: str,
        streams: StreamPool,
        attempts: dict[str, Attempt],
        timing: Timing,
    ) -> None:
        self._connection = connection
        self._ingress_id = ingress_id
        self._streams = streams
        self._attempts = attempts
        self._timing = timing
        self._ended: list[tuple[str, int]] = []  # what the router has not been told yet

    def note_end(self, attempt: Attempt) -> None:
        """Note that an attempt has ended: its replica has less to do than the router believes."""
        if attempt.replica is not None:
            num_tokens = _num_known_tokens(attempt.submit.request)
            self._ended.append((attempt.replica.replica_id, num_tokens))

    async def place(self, attempt: Attempt) -> RequestError | None:
        """Find a replica, unless the attempt is given up meanwhile. Returns why there is none."""
        timing = self._timing
        deadline_s = timing.clock() + self._patience_s(attempt)
        late_s = _late_s(attempt)
        retry_s = timing.retry_s
        reason = "no replica has answered"
        while self._is_live(attempt):
            receipt = await self._submit(attempt)
            if receipt is not None and receipt.refusal is None:
                if await self._settle(attempt, receipt):
                    return None
            elif not self._is_live(attempt):
                return None
            elif receipt is not None and receipt.refusal is not None:
                reason = receipt.refusal.message
                if _is_final(attempt, receipt.replica_id, receipt.refusal):
                    return receipt.refusal
            if late_s is not None and timing.clock() >= late_s:
                message = f"No token came in the time that the request allows: {reason}."
                return RequestError(ErrorKind.TOO_LATE, message)
            if timing.clock() >= deadline_s:
                message = f"The model is unavailable: {reason}."
                return RequestError(ErrorKind.ENGINE_DIED, message)
            if receipt is None or receipt.replica_id in attempt.avoid:
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, timing.max_retry_s)
            else:
                attempt.avoid += (receipt.replica_id,)
            if self._is_live(attempt):
                self._rename(attempt)
        return None

    def _patience_s(self, attempt: Attempt) -> float:
        """A lost request waits for an engine that loads its model again; a new one is told soon."""
        timing, hello = self._timing, self._streams.hello
        if not attempt.avoid:
            return timing.patience_s
        load_s = 0.0 if hello is None else hello.engine.load_s
        return max(timing.lost_patience * timing.patience_s, timing.lost_loads * load_s)

    def _is_live(self, attempt: Attempt) -> bool:
        return attempt.id in self._attempts

    async def _submit(self, attempt: Attempt) -> Receipt | None:
        """Offer the attempt once. None: it is unknown whether it was accepted."""
        ended, self._ended = self._ended, []
        hints = _hints(attempt, self._streams.suspects(), tuple(ended))
        submit = attempt.origin.submit_at(attempt, self._timing.clock())
        try:
            async with asyncio.timeout(self._timing.silence_s):
                return await self._connection.submit(
                    hints, self._ingress_id, self._streams.epochs, submit
                )
        except Exception as error:  # whatever Ray raises for a replica that dies or hangs
            logger.warning("submitting %s: %r", attempt.id, error)
            return None

    async def _settle(self, attempt: Attempt, receipt: Receipt) -> bool:
        """Bind the attempt to the replica that took it. False if that stream was given up."""
        await self._streams.until_known(receipt.replica_id)
        if not self._is_live(attempt):
            self._streams.abort(receipt.replica_id, attempt.id)
            return True
        attempt.replica = self._streams.find(receipt.replica_id, receipt.epoch)
        return attempt.replica is not None

    def _rename(self, attempt: Attempt) -> None:
        del self._attempts[attempt.id]
        attempt.origin.rename(attempt)
        self._attempts[attempt.id] = attempt


def _num_known_tokens(request: GenerateRequest) -> int:
    return len(request.prompt_token_ids) + len(request.output_token_ids)


def _hints(attempt: Attempt, suspects: list[str], ended: tuple[tuple[str, int], ...]) -> Hints:
    request, adapter_ref = attempt.submit.request, attempt.submit.adapter_ref
    adapter_digest = "" if adapter_ref is None else adapter_ref.digest
    return Hints(
        target=attempt.target,
        request_id=request.request_id,
        num_prompt_tokens=_num_known_tokens(request),
        adapter_digest=adapter_digest,
        tenant=request.tenant,
        avoid=(*attempt.avoid, *suspects),
        session=attempt.submit.session and f"{request.tenant}/{attempt.submit.session}",
        prefix_keys=prefix_keys(
            request.prompt_token_ids, request.tenant, request.cache_salt, adapter_digest
        ),
        ended=ended,
    )


def _late_s(attempt: Attempt) -> float | None:
    """Return when a request that has no token yet is not wanted any more, by the link's clock."""
    return None if attempt.origin.has_begun else attempt.origin.deadline_s


def _is_final(attempt: Attempt, replica_id: str, refusal: RequestError) -> bool:
    """Tell whether all replicas are too busy. An answer that has begun is never refused for it."""
    is_new = attempt.num_losses == 0 and not attempt.origin.has_begun
    return refusal.kind == ErrorKind.OVERLOADED and replica_id in attempt.avoid and is_new
