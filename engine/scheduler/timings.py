"""Timings: timestamps of one request, and the latency figures derived from them.

All timestamps are seconds of the clock whose readings are passed to the scheduler.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Timings:
    """Timestamps are None until set; a preempted request keeps its first ones."""

    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def on_scheduled(self, now: float) -> None:
        if self.first_scheduled_s is None:
            self.first_scheduled_s = now

    def on_tokens(self, now: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now
        self.last_token_s = now


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times and token counts of a finished request. TPOT is None with fewer than two tokens."""

    queue_s: float
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


def request_metrics(
    timings: Timings,
    arrival_s: float,
    now: float,
    num_prompt_tokens: int,
    num_cached_tokens: int,
    num_output_tokens: int,
) -> RequestMetrics:
    """Queue time: arrival to first scheduled; TTFT: arrival to first token; E2E: to the end."""
    scheduled, first = timings.first_scheduled_s, timings.first_token_s
    end = timings.last_token_s if timings.last_token_s is not None else now
    tpot = None
    if first is not None and num_output_tokens > 1:
        tpot = (end - first) / (num_output_tokens - 1)
    return RequestMetrics(
        queue_s=(scheduled if scheduled is not None else now) - arrival_s,
        ttft_s=None if first is None else first - arrival_s,
        tpot_s=tpot,
        e2e_s=end - arrival_s,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_output_tokens=num_output_tokens,
    )
