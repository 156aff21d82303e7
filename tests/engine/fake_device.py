"""A device that remembers, in every KV slot, the adapter and all tokens that led to it.

The next token is a function of that memory, so a scheduler that shares, copies, evicts or
preempts wrongly gives other tokens than `expected_output` does.
"""

import hashlib
from collections.abc import Sequence

from engine.scheduler.batch import ScheduledBatch, ScheduledRequest

VOCAB = 50


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
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.kv: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.adapters: dict[int, str] = {0: ""}

    def execute(self, batch: ScheduledBatch) -> list[list[int]]:
        for slot in batch.adapter_evictions:
            del self.adapters[slot]
        for slot, digest in batch.adapter_loads:
            assert slot not in self.adapters, "loaded over a resident adapter"
            self.adapters[slot] = digest
        for source, destination in batch.block_copies:
            for offset in range(self.block_size):
                if (source, offset) in self.kv:
                    self.kv[destination, offset] = self.kv[source, offset]
        self._check_disjoint_writes(batch)
        return [self._run(request) for request in batch.requests]

    def _run(self, request: ScheduledRequest) -> list[int]:
        adapter = self.adapters[request.adapter_slot]
        known: tuple[int, ...] = ()
        if request.start:
            owner, known = self.kv[self._slot(request, request.start - 1)]
            assert owner == adapter and len(known) == request.start
        for position, token_id in enumerate(request.token_ids, request.start):
            known = (*known, token_id)
            self.kv[self._slot(request, position)] = (adapter, known)
        for position in range(request.end):  # what attention would read
            assert self.kv[self._slot(request, position)] == (adapter, known[: position + 1])
        salt = request.sampling.seed + request.choice
        return [next_token(adapter, known, salt)] if request.samples else []

    def _slot(self, request: ScheduledRequest, position: int) -> tuple[int, int]:
        return request.block_table[position // self.block_size], position % self.block_size

    def _check_disjoint_writes(self, batch: ScheduledBatch) -> None:
        written = [
            self._slot(r, position) for r in batch.requests for position in range(r.start, r.end)
        ]
        assert len(set(written)) == len(written), "two requests write the same KV slot"
