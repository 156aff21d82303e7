"""What a step computes, of a batch and of a run of decodes."""

from collections.abc import Mapping

from deployments.simulator.profile import StepWork
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.decode_run import DecodeRun
from engine.scheduler.step_time import StepShape, shape_of


def work_of(batch: ScheduledBatch, slot_bytes: Mapping[int, int]) -> StepWork:
    """Return the work of a batch; `slot_bytes` are the sizes of the adapters in its slots."""
    rows = row_bytes = 0
    slots: set[int] = set()
    for request in batch.requests:
        slot = request.adapter_slot
        if slot:
            count = len(request.token_ids) - request.num_base_rows
            rows += count
            row_bytes += count * slot_bytes[slot]
            slots.add(slot)
    distinct_bytes = sum(slot_bytes[slot] for slot in slots)
    return StepWork(shape_of(batch), rows, row_bytes, len(slots), distinct_bytes)


def work_of_run(run: DecodeRun, sizes: Mapping[str, int]) -> StepWork:
    """Return the work of a run's newest step; `sizes` are the bytes of adapters."""
    rows = row_bytes = positions = 0
    digests: set[str] = set()
    for request in run.rows:
        positions += request.num_computed_tokens
        digest = request.scope.adapter_digest
        if digest and (request.adapter_start or 0) < request.num_computed_tokens:
            rows += 1
            row_bytes += sizes[digest]
            digests.add(digest)
    shape = StepShape(len(run.rows), len(run.rows), positions)
    return StepWork(shape, rows, row_bytes, len(digests), sum(sizes[d] for d in digests))
