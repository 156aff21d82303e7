"""Profile: what one replica takes for what it does. `reef profile` measures one.

A step's time is linear in what it computes, as the engine's own estimate is. Adapters add a time
for each row and for each distinct one, and more for those that are larger. Where `tokens` is given,
the time by the number of tokens is a line through these points instead.
"""

from bisect import bisect_left
from itertools import pairwise
from typing import NamedTuple

import msgspec

from deployments.simulator.checked import Seconds
from deployments.simulator.disturbance import Disturbed
from engine.scheduler.step_time import StepShape


class StepWork(NamedTuple):
    """What a step computes. Bytes are of adapters: of each row's, and of each distinct one."""

    shape: StepShape
    adapter_rows: int = 0
    adapter_row_bytes: int = 0
    distinct_adapters: int = 0
    distinct_bytes: int = 0
    new_requests: int = 0  # whose first step it is
    after_idle: int = 0  # 1 if nothing was to do before, else 0


class StepTimes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Seconds of a step's parts."""

    fixed: Seconds = 5e-3
    token: Seconds = 2e-4
    logit_row: Seconds = 5e-5
    position_read: Seconds = 1e-8
    pair: Seconds = 1e-8
    adapter_row: Seconds = 2e-5
    adapter_row_byte: Seconds = 0.0
    distinct_adapter: Seconds = 2e-4
    distinct_byte: Seconds = 0.0
    new_request: Seconds = 0.0
    after_idle: Seconds = 0.0
    tokens: tuple[tuple[int, Seconds], ...] = ()  # (tokens, seconds), in place of the first two
    disturbed: Disturbed = Disturbed()  # what some steps take beside all that

    def __post_init__(self) -> None:
        counts = [count for count, _ in self.tokens]
        if any(a >= b for a, b in pairwise([0, *counts])) or len(counts) == 1:
            raise ValueError(f"tokens must be two points or more that ascend from 1, not {counts}")

    def of_tokens(self, tokens: int) -> float:
        """Return the seconds of a step of so many tokens, without its other parts."""
        points = self.tokens
        if not points:
            return self.fixed + self.token * tokens
        at = min(max(bisect_left(points, (tokens, 0.0)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        return max(y0 + (y1 - y0) * (tokens - x0) / (x1 - x0), 0.0)


class LoadTimes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Seconds, and seconds per byte, of an adapter's way."""

    fetch: Seconds = 0.1  # object store -> disk
    fetch_byte: Seconds = 1e-8
    decode: Seconds = 0.01  # disk -> host memory
    decode_byte: Seconds = 1e-9


class Profile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    step: StepTimes = StepTimes()
    load: LoadTimes = LoadTimes()
    cold_start: Seconds = 30.0  # from the decision for a replica to its first step

    def step_s(self, work: StepWork) -> float:
        """Return what a step takes that nothing disturbs."""
        times, shape = self.step, work.shape
        return (
            times.of_tokens(shape.tokens)
            + times.logit_row * shape.logit_rows
            + times.position_read * shape.positions_read
            + times.pair * shape.pairs
            + times.adapter_row * work.adapter_rows
            + times.adapter_row_byte * work.adapter_row_bytes
            + times.distinct_adapter * work.distinct_adapters
            + times.distinct_byte * work.distinct_bytes
            + times.new_request * work.new_requests
            + times.after_idle * work.after_idle
        )

    def decodes_s(self, work: StepWork, count: int) -> list[float]:
        """Return what each of `count` steps takes that decode the same rows, the first of which has
        this work: the same as `step_s` of each."""
        times, (tokens, logit_rows, positions_read, pairs) = self.step, work.shape
        rows = times.of_tokens(tokens) + times.logit_row * logit_rows
        rest = (
            times.pair * pairs,
            times.adapter_row * work.adapter_rows,
            times.adapter_row_byte * work.adapter_row_bytes,
            times.distinct_adapter * work.distinct_adapters,
            times.distinct_byte * work.distinct_bytes,
            times.new_request * work.new_requests,
            times.after_idle * work.after_idle,
        )
        a, b, c, d, e, f, g = rest  # added in the order of `step_s`, for the same rounding
        position_read, last = times.position_read, positions_read + count * tokens
        reads = range(positions_read, last, tokens)
        return [rows + position_read * read + a + b + c + d + e + f + g for read in reads]

    def fetch_s(self, nbytes: int) -> float:
        return self.load.fetch + self.load.fetch_byte * nbytes

    def decode_s(self, nbytes: int) -> float:
        return self.load.decode + self.load.decode_byte * nbytes
