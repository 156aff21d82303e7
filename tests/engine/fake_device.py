"""A device that remembers, in every KV slot, the adapter and all tokens that led to it.

The next token is a function of that memory, so a scheduler that shares, copies, evicts or
preempts wrongly gives other tokens than `expected_output` does.
"""

import hashlib
from collections.abc import Sequence

from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from tests.engine.fake_arena import CELL, FakeArena, Garbage

VOCAB = 50


def block_bytes(block_size: int) -> int:
    return (block_size + 1) * CELL


def next_token(adapter: str, token_ids: Sequence[int], salt: int) -> int:
    raw = repr((adapter, tuple(token_ids), salt)).encode()
    return int.from_bytes(hashlib.md5(raw).digest()[:4], "little") % VOCAB


def expected_output(
    adapter: str, prompt: Sequence[int], salt: int, max_tokens: int, stop: Sequence[int] = ()
) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(adapter, tokens, salt))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class FakeDevice:
    """A KV slot is a cell of the arena; a block has one more, that no token uses."""

    def __init__(
        self, block_size: int, memory_bytes: int, *, loads_are_immediate: bool = True
    ) -> None:
        self.block_size = block_size
        self.arena = FakeArena(
            memory_bytes, block_bytes(block_size), loads_are_immediate=loads_are_immediate
        )

    def execute(self, batch: ScheduledBatch) -> list[list[int]]:
        self.arena.change(batch.adapter_evictions, batch.moves, batch.adapter_loads)
        self._check_disjoint_writes(batch)
        outputs = [self._run(request) for request in batch.requests]
        self.arena.check()
        return outputs

    def lose(self, batch: ScheduledBatch) -> None:
        """What a step that breaks down in its middle leaves behind."""
        changes = batch.adapter_evictions, batch.moves, batch.adapter_loads
        self.arena.change(*changes, is_lost=True)
        for request in batch.requests:
            for position in range(request.start, request.end):
                self.arena.write(*self._slot(request, position), Garbage())

    def _run(self, request: ScheduledRequest) -> list[int]:
        adapter, arena = self.arena.adapter(request.adapter_slot), self.arena
        known: tuple[int, ...] = ()
        for position in range(request.start):  # what attention would read
            content = arena.read(*self._slot(request, position))
            assert isinstance(content, tuple)
            owner, known = content
            assert owner == adapter and len(known) == position + 1
        for position, token_id in enumerate(request.token_ids, request.start):
            known = (*known, token_id)
            arena.write(*self._slot(request, position), (adapter, known))
        for position in range(request.end):
            content = arena.read(*self._slot(request, position))
            assert content == (adapter, known[: position + 1])
        salt = request.sampling.seed + request.choice
        return [next_token(adapter, known, salt)] if request.samples else []

    def _slot(self, request: ScheduledRequest, position: int) -> tuple[int, int]:
        return request.block_table[position // self.block_size], position % self.block_size

    def _check_disjoint_writes(self, batch: ScheduledBatch) -> None:
        written = [
            self._slot(r, position) for r in batch.requests for position in range(r.start, r.end)
        ]
        assert len(set(written)) == len(written), "two requests write the same KV slot"
