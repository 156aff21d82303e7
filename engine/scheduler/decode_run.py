"""DecodeRun: steps in a row that only decode the same requests, taken together.

For who computes nothing, a simulator: its time goes into rows of which nothing but numbers changes.
The run does to requests and blocks what `schedule` and `update` would do step by step, in the same
order; `Scheduler.begin_run` says whether the next steps are of that kind. The last step ends the
first requests that end, or is the last one for which blocks are surely there.

    begin_run()   step 1 is scheduled          schedule(n)   n more are, those before are updated
    end_run()     the newest one is updated

A step with prompts, too, may leave out the rows of those that decode: LightBatch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.memory import MemoryBudget
from engine.scheduler.prefix_cache import publish_blocks
from engine.scheduler.request import Request

MOST_STEPS = 64  # more save nothing, and are predicted in vain when something comes between


@dataclass(slots=True)
class DecodeRun:
    """At most `num_possible` steps of one token for each of `rows`; `num_scheduled` are scheduled.

    `token_id` is what they all sample.
    """

    rows: list[Request]
    num_possible: int
    token_id: int
    num_scheduled: int = field(default=0, init=False)

    @property
    def is_last(self) -> bool:
        """Whether the newest step may end requests."""
        return self.num_scheduled == self.num_possible

    def schedule(self, memory: MemoryBudget, count: int) -> None:
        """Schedule `count` more steps. The caller has updated, or now updates, those before."""
        first = self.num_scheduled == 0
        places = self._places(memory.blocks.block_size, count)
        for request in self.rows:
            request.num_computed_tokens += count
            request.num_pending_tokens = 1
            added = count - first
            if added:
                request.output_token_ids += [self.token_id] * added
        for _, is_update, row, position in places:
            request = self.rows[row]
            if is_update:
                publish_blocks(memory.blocks, request, position)
            elif memory.blocks.blocks_for(position) > len(request.block_table):
                has_room = memory.reserve(1)
                assert has_room, "the blocks of a run are not there"
                memory.blocks.grow(request.block_table, position)
        memory.pass_steps(count)
        self.num_scheduled += count

    def _places(self, block_size: int, count: int) -> list[tuple[int, bool, int, int]]:
        """List (step, is an update, row, tokens then computed) where blocks begin or are full."""
        places: list[tuple[int, bool, int, int]] = []
        first = self.num_scheduled == 0
        for row, request in enumerate(self.rows):
            known = request.num_computed_tokens
            begun = known + 1 + -known % block_size  # tokens computed once the next block is begun
            while begun <= known + count:
                places.append((begun - known, False, row, begun))
                begun += block_size
            full = known + -known % block_size  # the step scheduled last is updated first
            full += block_size * (first and full == known)
            while full < known + count:
                places.append((full - known, True, row, full))
                full += block_size
        places.sort()
        return places


class LightBatch(NamedTuple):
    """A step without the rows of requests that decode: `rest` has the others, and the changes."""

    decodes: list[Request]
    rest: ScheduledBatch


def are_plain_decodes(requests: Iterable[Request], token_id: int) -> bool:
    """Whether the next token of each needs no more than the numbers that a run keeps."""
    for request in requests:
        sampling, num_outputs = request.sampling, len(request.output_token_ids)
        if not (
            num_outputs
            and request.num_computed_tokens == len(request.prompt_token_ids) + num_outputs - 1
            and request.index == 0  # with further choices, blocks are shared
            and token_id not in request.rules.end_token_ids
            and sampling.grammar is None
            and sampling.pooling is None
        ):
            return False
    return True


def steps_possible(rows: Sequence[Request], memory: MemoryBudget, max_model_len: int) -> int:
    """Return how many steps of one token each there are until a request ends or blocks may lack."""
    most = MOST_STEPS
    for request in rows:
        num_outputs = len(request.output_token_ids)
        left = request.sampling.max_tokens - num_outputs
        if left < most:
            most = left
        left = max_model_len - len(request.prompt_token_ids) - num_outputs
        if left < most:
            most = left
    size = memory.blocks.block_size
    while most > 0 and not memory.has_ready_blocks(_num_begun(rows, most, size)):
        most //= 2
    return most


def _num_begun(rows: Iterable[Request], count: int, block_size: int) -> int:
    """Return how many blocks so many steps begin."""
    known = [request.num_computed_tokens for request in rows]
    return sum([-(-(k + count) // block_size) - -(-k // block_size) for k in known])
