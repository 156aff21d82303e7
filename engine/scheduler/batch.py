"""ScheduledBatch: one step as plain data, handed from the scheduler to a Runner.

Picklable, so that an executor may live in another process. Holds no reference to the
scheduler's own mutable state.
"""

from array import array
from dataclasses import dataclass
from typing import NamedTuple

from engine.scheduler.request import SamplingParams
from engine.scheduler.token_rules import NO_TOKENS, TokenBiases

PENDING = -1  # in token_ids: the token that the step before samples for this request


class ScheduledRequest(NamedTuple):
    """One request's rows in a step: `token_ids` at positions `start`, `start` + 1, ...

    If the result of the previous step has not been read yet, `token_ids` is [PENDING]: the
    executor inserts the token that step sampled for the same request and `life`, and treats it
    as the last output token; the output in `history` ends before it.

    The last `num_drafts` of `token_ids` are guesses. A token is sampled at the row before each of
    them and at the last row, as if the guesses up to there were output; the result is the sampled
    tokens up to the first that is not the guess that follows. `history` ends before the guesses.

    A named tuple, because one is made per request and step, at a third of a dataclass's cost.
    """

    request_id: str
    choice: int  # its index among the request's choices
    token_ids: list[int]
    start: int
    block_table: tuple[int, ...]  # covers start + len(token_ids) positions
    adapter_slot: int  # of the rows from `num_base_rows` on; 0 = base model
    sampling: SamplingParams
    samples: bool  # a token is sampled from the last row's logits
    forbidden_token_ids: "array[int]" = NO_TOKENS  # may not be sampled
    history: tuple[list[int], list[int]] | None = None  # (prompt, output), if penalties need it
    prompt_targets: list[int] | None = None  # token after each row, if their logprobs are asked for
    life: int = 0  # number of the request's admission that this row belongs to; unique
    biases: TokenBiases | None = None  # of `sampling`, as arrays
    allowed_token_ids: "array[int] | None" = None  # may be sampled; None: all
    pooled: tuple[int, int] | None = None  # first and end of the rows whose sum is asked for
    num_base_rows: int = 0  # leading rows that are the base model's, although the rest has a slot
    num_drafts: int = 0  # the last token_ids that are guesses
    # What may not be sampled after 1, 2, ... guesses, if it is not always `forbidden_token_ids`
    forbidden_after_drafts: "tuple[array[int], ...]" = ()

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def row_slots(self) -> list[int]:
        """The adapter slot of each row; 0 = base model."""
        num_base = self.num_base_rows
        return [0] * num_base + [self.adapter_slot] * (len(self.token_ids) - num_base)


class BlockCopy(NamedTuple):
    """Copies a whole KV block from one block number to another."""

    source: int
    destination: int


class AdapterMove(NamedTuple):
    """Moves a resident adapter's extent to another, disjoint place in the arena.

    The slot is that of an adapter which was placed before this batch.
    """

    slot: int
    destination_bytes: int
    nbytes: int


class AdapterLoad(NamedTuple):
    """Copies an adapter's weights from host memory to its extent in the arena."""

    slot: int
    digest: str
    offset_bytes: int
    nbytes: int


Move = BlockCopy | AdapterMove


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Requests with a single new token come first, then prefill chunks by length.

    Memory changes precede the forward pass, in the order of the fields: evictions, then moves one
    after the other (each may read what an earlier one wrote), then loads.
    """

    requests: tuple[ScheduledRequest, ...]
    adapter_evictions: tuple[int, ...] = ()  # slots
    moves: tuple[Move, ...] = ()
    adapter_loads: tuple[AdapterLoad, ...] = ()
    grammar_rows: tuple[int, ...] = ()  # indexes of requests that sample and have a grammar

    @property
    def num_tokens(self) -> int:
        return sum(len(r.token_ids) for r in self.requests)
