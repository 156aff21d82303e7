"""ScheduledBatch: what the scheduler hands to whatever executes a step.

Plain picklable data, so that a process, tensor-parallel ranks or a simulator can stand behind
`launch`. Holds no reference to the scheduler's own mutable state.
"""

from dataclasses import dataclass
from typing import NamedTuple

from engine.scheduler.request import SamplingParams

PENDING = -1  # in token_ids: the token that the step before samples for this request


class ScheduledRequest(NamedTuple):
    """One request's share of a step: `token_ids` go in at positions `start`, `start` + 1, ...

    Where the step before has not been read yet, `token_ids` is [PENDING]: the executor puts in
    what that step sampled for the same request and `life`, and counts it as the last token of
    the output in `history`, which ends before it.

    A named tuple because one is made per request and step, at a third of a dataclass's price.
    """

    request_id: str
    choice: int  # its index among the request's choices
    token_ids: list[int]
    start: int
    block_table: tuple[int, ...]  # covers start + len(token_ids) positions
    adapter_slot: int  # 0 = base model
    sampling: SamplingParams
    samples: bool  # the last row's logits give the next token
    forbidden_token_ids: tuple[int, ...] = ()  # not to be sampled yet (min_tokens)
    history: tuple[list[int], list[int]] | None = None  # (prompt, output), where penalties need it
    prompt_targets: list[int] | None = None  # token after each row, where their logprobs are asked
    life: int = 0  # which admission of the request this serves; never used twice

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class BlockCopy(NamedTuple):
    """All of a KV block's content, from one block number to another."""

    source: int
    destination: int


class AdapterMove(NamedTuple):
    """A resident adapter's extent, from one offset in the arena to another; the two are disjoint.

    It belongs to the adapter that has the slot since before this batch.
    """

    slot: int
    source_bytes: int
    destination_bytes: int
    nbytes: int


class AdapterLoad(NamedTuple):
    """The adapter's weights, from host memory to its extent in the arena."""

    slot: int
    digest: str
    offset_bytes: int
    nbytes: int


Move = BlockCopy | AdapterMove


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Requests with a single new token come first, then prefill chunks by length.

    What changes in memory is to be done before the forward, in the order of the fields: evictions,
    then the moves one after the other, each reading what those before it wrote, then the loads.
    """

    requests: tuple[ScheduledRequest, ...]
    adapter_evictions: tuple[int, ...] = ()  # slots
    moves: tuple[Move, ...] = ()
    adapter_loads: tuple[AdapterLoad, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(r.token_ids) for r in self.requests)
