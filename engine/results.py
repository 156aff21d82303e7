"""Results: makes the outputs of requests from the rows of steps."""

import numpy as np
from numpy.typing import NDArray

from engine.backends.runner import RowOutput
from engine.messages import RequestError, RequestMetrics, RequestOutput, TokenLogprobs
from engine.proof.probe import is_probe
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import FinishReason, Request
from engine.scheduler.scheduler import Progress


class Results:
    """Keeps what comes in parts, and counts tokens, but not those of probes."""

    def __init__(self) -> None:
        self.num_prompt = self.num_cached = self.num_outputs = 0
        self._prompt_logprobs: dict[tuple[str, int], dict[int, TokenLogprobs]] = {}
        self._pooled: dict[tuple[str, int], NDArray[np.float64]] = {}  # sums over earlier chunks

    @property
    def holds_parts(self) -> bool:
        """Whether the first parts of any request are there, and the rest is to come."""
        return bool(self._prompt_logprobs or self._pooled)

    def add_row(self, request: Request, scheduled: ScheduledRequest, row: RowOutput) -> None:
        """Keep the parts that a row brings: `brings_parts` says whether it does."""
        if row.prompt_logprobs:
            known = self._prompt_logprobs.setdefault(request.key, {})
            known.update(enumerate(row.prompt_logprobs, scheduled.start + 1))
        if row.pooled is not None:
            self._add_pooled(request, scheduled, row.pooled)

    def _add_pooled(
        self, request: Request, scheduled: ScheduledRequest, pooled: NDArray[np.float64]
    ) -> None:
        """Add a chunk's sum. One at position 0 begins anew: the request may have been preempted."""
        before = self._pooled.get(request.key) if scheduled.start else None
        self._pooled[request.key] = pooled if before is None else before + pooled

    def output(self, progress: Progress, row: RowOutput, now: float) -> RequestOutput:
        """Make the output of a request that went on, with all that is known by now."""
        request, count = progress.request, len(progress.token_ids)
        if not is_probe(request.request_id):
            self._count(request, count)
        if _is_plain(request, row, count) and not self.holds_parts:  # nearly always
            return RequestOutput(request.request_id, request.index, progress.token_ids)
        return RequestOutput(
            request.request_id,
            request.index,
            progress.token_ids,
            logprobs=None if row.logprobs is None else row.logprobs[:count],
            prompt_logprobs=self._take_prompt_logprobs(request),
            finish_reason=request.finish_reason.value if request.finish_reason else None,
            stop_token_id=progress.stop_token_id,
            metrics=_metrics(request, now) if _has_metrics(request, count) else None,
            embedding=self._take_embedding(request),
        )

    def end(self, request: Request, error: RequestError | None, now: float) -> RequestOutput:
        """Make the last output of a request that was dropped, and forget its parts."""
        self._prompt_logprobs.pop(request.key, None)
        self._pooled.pop(request.key, None)
        reason = FinishReason.ERROR if error else FinishReason.ABORT
        return RequestOutput(
            request.request_id,
            request.index,
            [],
            finish_reason=reason.value,
            error=error,
            metrics=_metrics(request, now),
        )

    def _count(self, request: Request, num_new: int) -> None:
        self.num_outputs += num_new
        if request.finish_reason and request.index == 0:  # the choices share one prompt
            self.num_prompt += request.num_prompt_tokens
            self.num_cached += request.num_cached_tokens or 0

    def _take_prompt_logprobs(self, request: Request) -> list[TokenLogprobs | None] | None:
        known = self._prompt_logprobs.pop(request.key, None)
        if known is None:
            return None
        return [None, *(known[i] for i in range(1, request.num_prompt_tokens))]

    def _take_embedding(self, request: Request) -> bytes | None:
        pooled = self._pooled.pop(request.key, None)
        if pooled is None:
            return None
        if request.sampling.pooling == "mean":
            pooled = pooled / request.num_prompt_tokens
        return pooled.astype("<f4").tobytes()


def brings_parts(row: RowOutput) -> bool:
    return bool(row.prompt_logprobs) or row.pooled is not None


def _is_plain(request: Request, row: RowOutput, num_new: int) -> bool:
    """Check that the output of a request that holds no parts has nothing but tokens."""
    num_before = len(request.output_token_ids) - request.num_resumed_tokens - num_new
    return num_before > 0 and request.finish_reason is None and row.logprobs is None


def _has_metrics(request: Request, num_new: int) -> bool:
    """Check if an output needs metrics: the last one, and the first, in case the rest comes from
    another replica."""
    is_first = len(request.output_token_ids) - request.num_resumed_tokens == num_new
    return request.finish_reason is not None or (request.index == 0 and is_first)


def _metrics(request: Request, now: float) -> RequestMetrics:
    scheduled_s = now if request.first_scheduled_s is None else request.first_scheduled_s
    return RequestMetrics(
        scheduled_s - request.arrival_s,
        request.num_prompt_tokens,
        request.num_cached_tokens or 0,
        len(request.output_token_ids) - request.num_resumed_tokens,
        request.num_drafted_tokens,
        request.num_accepted_tokens,
        request.load_bytes,
    )
