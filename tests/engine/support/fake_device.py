"""FakeDevice: stores in every KV slot all tokens up to there, each with its adapter.

The next token is a function of that memory, so a scheduler that shares, copies, evicts or
preempts wrongly gives other tokens than `expected_output`.

It is asynchronous: `launch` only queues a step, which runs when its result or a later one is read.
So changes after the launch must not affect the step.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from engine.scheduler.batch import PENDING, ScheduledBatch, ScheduledRequest
from tests.engine.support.fake_arena import CELL, FakeArena, Garbage

VOCAB = 50
GARBAGE = -7  # token sampled by a failed step


def block_bytes(block_size: int) -> int:
    return (block_size + 1) * CELL


Known = tuple[tuple[int, str], ...]  # tokens, each with the digest of its adapter


def next_token(known: Known, salt: int, forbidden: Sequence[int] = ()) -> int:
    raw = repr((known, salt)).encode()
    token_id = int.from_bytes(hashlib.md5(raw).digest()[:4], "little") % VOCAB
    while token_id in forbidden:
        token_id = (token_id + 1) % VOCAB
    return token_id


def expected_output(
    adapter: str,
    prompt: Sequence[int],
    salt: int,
    max_tokens: int,
    stop: Sequence[int] = (),
    min_tokens: int = 0,
    adapter_start: int = 0,
) -> list[int]:
    tokens, length = list(prompt), len(prompt)
    while len(tokens) < length + max_tokens:
        forbidden = stop if len(tokens) + 1 < length + min_tokens else ()
        known = tuple((t, adapter if i >= adapter_start else "") for i, t in enumerate(tokens))
        tokens.append(next_token(known, salt, forbidden))
        if tokens[-1] in stop and len(tokens) >= length + min_tokens:
            break
    return tokens[length:]


class DeviceError(Exception):
    """Raised by a step that fails."""


def _sampled(request: ScheduledRequest, known: Known) -> list[int]:
    """Sample before each draft, up to the first that is another one, and after the last."""
    salt, num_known = request.sampling.seed + request.choice, request.end - request.num_drafts
    always = request.forbidden_token_ids
    forbidden = (always, *(request.forbidden_after_drafts or [always] * request.num_drafts))
    sampled: list[int] = []
    for i in range(request.num_drafts + 1):
        sampled.append(next_token(known[: num_known + i], salt, forbidden[i]))
        if known[num_known + i : num_known + i + 1] and known[num_known + i][0] != sampled[i]:
            break
    return sampled


@dataclass(eq=False)
class FakeStep:
    device: "FakeDevice"
    batch: ScheduledBatch
    is_lost: bool = False

    def result(self) -> list[list[int]]:
        return self.device.run_to(self)


class FakeDevice:
    """A device whose KV slots are cells of the arena; each block has one unused extra cell."""

    def __init__(
        self, block_size: int, memory_bytes: int, *, loads_are_immediate: bool = True
    ) -> None:
        self.block_size = block_size
        self.arena = FakeArena(
            memory_bytes, block_bytes(block_size), loads_are_immediate=loads_are_immediate
        )
        self._queue: list[FakeStep] = []
        self._done: dict[FakeStep, list[list[int]]] = {}
        self._sampled: dict[tuple[str, int, int], int] = {}  # by the last step

    def launch(self, batch: ScheduledBatch) -> FakeStep:
        step = FakeStep(self, batch)
        self._queue.append(step)
        return step

    def run_to(self, step: FakeStep) -> list[list[int]]:
        """Run all steps up to this one and return its result, which can be taken once."""
        while step not in self._done:
            head = self._queue.pop(0)
            self._done[head] = self._lose(head.batch) if head.is_lost else self._execute(head.batch)
        if step.is_lost:
            raise DeviceError("a step was lost")
        return self._done.pop(step)

    def _execute(self, batch: ScheduledBatch) -> list[list[int]]:
        self.arena.change(batch.adapter_evictions, batch.moves, batch.adapter_loads)
        self._check_disjoint_writes(batch)
        outputs = [self._run(request) for request in batch.requests]
        self.arena.check()
        self._sampled = {
            (r.request_id, r.choice, r.life): token_id
            for r, token_ids in zip(batch.requests, outputs, strict=True)
            for token_id in token_ids
        }
        return outputs

    def _lose(self, batch: ScheduledBatch) -> list[list[int]]:
        """Leave the memory as a step does that fails midway."""
        changes = batch.adapter_evictions, batch.moves, batch.adapter_loads
        self.arena.change(*changes, is_lost=True)
        for request in batch.requests:
            self._spoil(request)
        self._sampled = {
            (r.request_id, r.choice, r.life): GARBAGE for r in batch.requests if r.samples
        }
        return []

    def _run(self, request: ScheduledRequest) -> list[int]:
        new_ids, arena = self._resolved(request), self.arena
        adapter = arena.adapter(request.adapter_slot)
        read = [arena.read(*self._slot(request, i)) for i in range(request.start)]
        if GARBAGE in new_ids or Garbage() in (adapter, *read):
            self._spoil(request)
            return [GARBAGE] if request.samples else []
        known: Known = ()
        for position, content in enumerate(read):  # as attention reads it
            assert isinstance(content, tuple)
            known = content
            assert len(known) == position + 1
        for row, token_id in enumerate(new_ids):
            known = (*known, (token_id, str(adapter) if row >= request.num_base_rows else ""))
            arena.write(*self._slot(request, request.start + row), known)
        for position in range(request.end):
            content = arena.read(*self._slot(request, position))
            assert content == known[: position + 1]
        num_known = request.end - request.num_drafts
        self._check_history(request, tuple(token_id for token_id, _ in known[:num_known]))
        return _sampled(request, known) if request.samples else []

    def _resolved(self, request: ScheduledRequest) -> list[int]:
        if PENDING not in request.token_ids:
            return request.token_ids
        assert request.token_ids == [PENDING]
        return [self._sampled[request.request_id, request.choice, request.life]]

    def _spoil(self, request: ScheduledRequest) -> None:
        for position in range(request.start, request.end):
            self.arena.write(*self._slot(request, position), Garbage())

    def _slot(self, request: ScheduledRequest, position: int) -> tuple[int, int]:
        return request.block_table[position // self.block_size], position % self.block_size

    def _check_history(self, request: ScheduledRequest, known: tuple[int, ...]) -> None:
        assert (request.history is not None) == request.sampling.uses_penalties
        if request.history and request.samples:
            prompt, output = request.history
            pending = known[-1:] if PENDING in request.token_ids else ()
            assert (*prompt, *output, *pending) == known

    def _check_disjoint_writes(self, batch: ScheduledBatch) -> None:
        written = [
            self._slot(r, position) for r in batch.requests for position in range(r.start, r.end)
        ]
        assert len(set(written)) == len(written), "two requests write the same KV slot"
