"""What a step computes, of a batch and of requests that decode."""

from collections.abc import Mapping, Sequence

from deployments.simulator.profile import StepWork
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.request import Request
from engine.scheduler.step_time import StepShape, shape_of


def work_of(
    batch: ScheduledBatch,
    digests: Mapping[int, str],
    sizes: Mapping[str, int],
    decodes: Sequence[Request] = (),
) -> StepWork:
    """Return the work of a batch, and of requests beside it that have one token scheduled.

    `digests` are of the adapters in the slots, `sizes` their bytes.
    """
    rows = row_bytes = positions = 0
    used: set[str] = set()
    for request in decodes:
        positions += request.num_computed_tokens
        digest = request.scope.adapter_digest
        if digest and (request.adapter_start or 0) < request.num_computed_tokens:
            rows += 1
            row_bytes += sizes[digest]
            used.add(digest)
    for scheduled in batch.requests:
        if scheduled.adapter_slot:
            digest = digests[scheduled.adapter_slot]
            count = len(scheduled.token_ids) - scheduled.num_base_rows
            rows += count
            row_bytes += count * sizes[digest]
            used.add(digest)
    tokens, logit_rows, read, pairs = shape_of(batch)
    shape = StepShape(tokens + len(decodes), logit_rows + len(decodes), read + positions, pairs)
    return StepWork(shape, rows, row_bytes, len(used), sum(sizes[digest] for digest in used))
