"""Profile: what one replica takes for what it does.

A step's time is linear in what it computes, as the engine's own estimate is; rows with adapters add
a time each, and so does each distinct adapter.
"""

from typing import NamedTuple

import msgspec

from deployments.simulator.checked import Seconds
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.decode_run import DecodeRun
from engine.scheduler.step_time import StepShape, shape_of


class StepWork(NamedTuple):
    """What a step computes."""

    shape: StepShape
    adapter_rows: int = 0
    distinct_adapters: int = 0


class StepTimes(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Seconds of a step's parts."""

    fixed: Seconds = 5e-3
    token: Seconds = 2e-4
    logit_row: Seconds = 5e-5
    position_read: Seconds = 1e-8
    pair: Seconds = 1e-8
    adapter_row: Seconds = 2e-5
    distinct_adapter: Seconds = 2e-4


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
        """Return what a step takes."""
        times, shape = self.step, work.shape
        return (
            times.fixed
            + times.token * shape.tokens
            + times.logit_row * shape.logit_rows
            + times.position_read * shape.positions_read
            + times.pair * shape.pairs
            + times.adapter_row * work.adapter_rows
            + times.distinct_adapter * work.distinct_adapters
        )

    def fetch_s(self, nbytes: int) -> float:
        return self.load.fetch + self.load.fetch_byte * nbytes

    def decode_s(self, nbytes: int) -> float:
        return self.load.decode + self.load.decode_byte * nbytes


def work_of(batch: ScheduledBatch) -> StepWork:
    rows, slots = 0, set[int]()
    for request in batch.requests:
        if request.adapter_slot:
            rows += len(request.token_ids) - request.num_base_rows
            slots.add(request.adapter_slot)
    return StepWork(shape_of(batch), rows, len(slots))


def work_of_run(run: DecodeRun) -> StepWork:
    """Return what the newest scheduled step of a run computes."""
    rows = positions = 0
    digests: set[str] = set()
    for request in run.rows:
        positions += request.num_computed_tokens
        if request.adapter_digest and (request.adapter_start or 0) < request.num_computed_tokens:
            rows += 1
            digests.add(request.adapter_digest)
    return StepWork(StepShape(len(run.rows), len(run.rows), positions), rows, len(digests))
