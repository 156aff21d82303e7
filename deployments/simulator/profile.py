"""Profile: what one replica takes for what it does.

A step's time is linear in what it computes, as the engine's own estimate is; rows with adapters add
a time each, and so does each distinct adapter.
"""

import msgspec

from deployments.simulator.checked import Seconds
from engine.scheduler.batch import ScheduledBatch


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

    def step_s(self, batch: ScheduledBatch) -> float:
        """Return what a step of these rows takes."""
        times = self.step
        tokens = logit_rows = positions_read = pairs = adapter_rows = 0
        slots: set[int] = set()
        for request in batch.requests:
            count = len(request.token_ids)
            tokens += count
            logit_rows += request.samples
            if count == 1:
                positions_read += request.start + 1
            else:  # each token attends to all before it
                pairs += count * request.start + count * (count + 1) // 2
            if request.adapter_slot:
                adapter_rows += count
                slots.add(request.adapter_slot)
        return (
            times.fixed
            + times.token * tokens
            + times.logit_row * logit_rows
            + times.position_read * positions_read
            + times.pair * pairs
            + times.adapter_row * adapter_rows
            + times.distinct_adapter * len(slots)
        )

    def fetch_s(self, nbytes: int) -> float:
        return self.load.fetch + self.load.fetch_byte * nbytes

    def decode_s(self, nbytes: int) -> float:
        return self.load.decode + self.load.decode_byte * nbytes
