"""Scheduler: which tokens of which requests are computed next.

    schedule(now) -> ScheduledBatch      decide, allocate, advance num_computed_tokens
    update(batch, sampled, now)          append what was sampled, publish blocks, finish
    fail(batch)                          the step was lost: its requests end with an error

With a `pipeline_depth` of 1, a step may be scheduled before the update of the one before it. A
request whose next token is still being computed then goes on with PENDING in its place, unless
that token is its last for certain. Every admission of a request is a life with a number of its
own; what a step gives to a life that has ended or was preempted meanwhile is dropped. What such a
life held is free at once, for executors run steps in order: what a dropped row writes is
overwritten before anybody reads it.

One step mixes decodes with chunks of prompts under `max_num_batched_tokens`. Running requests
go first; waiting ones follow in arrival order, except that a request whose adapter is on its way
is passed over. When memory lacks, the request admitted last loses its blocks and is computed again
later (preemption by recompute). Nothing here depends on time other than through `now`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.scheduler.batch import PENDING, ScheduledBatch, ScheduledRequest
from engine.scheduler.block_manager import block_hash, scope_hash
from engine.scheduler.memory import MemoryBudget, MemoryChanges
from engine.scheduler.request import (
    FinishReason,
    InvalidRequest,
    Request,
    RequestStatus,
    SamplingParams,
)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """What one request gained in one step; `request.finish_reason` says whether it ended."""

    request: Request
    token_ids: list[int]
    stop_token_id: int | None = None


class Scheduler:
    """Owns every unfinished request. Finished ones are handed back once and forgotten."""

    def __init__(
        self, limits: SchedulerLimits, memory: MemoryBudget, *, pipeline_depth: int = 0
    ) -> None:
        assert pipeline_depth in (0, 1), f"pipeline_depth must be 0 or 1, not {pipeline_depth}"
        self.limits = limits
        self.memory = memory
        self.blocks = memory.blocks
        self.adapters = memory.adapters
        self.pipeline_depth = pipeline_depth
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0
        self._by_key: dict[tuple[str, int], Request] = {}
        self._num_in_flight = 0  # batches handed out that have neither been updated nor failed
        self._num_lives = 0

    # ==== requests in and out ====

    def add(self, request: Request) -> None:
        """Queue a request (and its forks, which wait for its prompt).

        Raises InvalidRequest for one that memory can never hold.
        """
        if refusal := self.refusal(request):
            raise InvalidRequest(refusal)
        for r in (request, *request.forks):
            assert r.key not in self._by_key, f"request {r.key} was added twice"
            self._by_key[r.key] = r
        self.waiting.append(request)

    def abort(self, request_id: str) -> list[Request]:
        """End every choice of the request; their blocks and pins are free on return."""
        ended = [r for r in self._by_key.values() if r.request_id == request_id]
        return self._finish_all(ended, FinishReason.ABORT)

    def end_with_error(self, scheduled: ScheduledRequest) -> list[Request]:
        """End the choice that this row is for, and the forks that only it could have started."""
        request = self.owner(scheduled)
        return self._finish_all([request, *request.forks], FinishReason.ERROR) if request else []

    def end_too_large(self, digest: str) -> list[Request]:
        """End the requests of an adapter, now that its size is known, that never fit beside it."""
        requests = [r for r in self._by_key.values() if r.adapter == digest]
        ended = [r for r in requests if self.refusal(r)]
        return self._finish_all(ended, FinishReason.ERROR)

    def refusal(self, request: Request) -> str:
        """Why memory can never hold the request at its full length; empty if it can."""
        most = request.num_prompt_tokens + request.sampling.max_tokens
        num_tokens = min(most, self.limits.max_model_len) - 1  # the last one is not computed
        lacking = self.memory.lacking_bytes(num_tokens, request.adapter)
        if lacking is None:
            return ""
        beside = f" beside adapter {request.adapter}" if request.adapter else ""
        return (
            f"{num_tokens} tokens{beside} need {lacking[0]} bytes of memory, and there are "
            f"{lacking[1]}; ask for fewer tokens (max_tokens={request.sampling.max_tokens})"
        )

    def end_adapter_with_error(self, digest: str) -> list[Request]:
        """End every request of an adapter that will never be ready."""
        ended = [r for r in self._by_key.values() if r.adapter == digest]
        return self._finish_all(ended, FinishReason.ERROR)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._by_key)

    @property
    def num_waiting(self) -> int:
        return len(self._by_key) - len(self.running)

    @property
    def queued_tokens(self) -> int:
        """Tokens that no step has been given yet."""
        return sum(r.num_remaining_tokens for r in self._by_key.values())

    # ==== a step ====

    def schedule(self, now: float) -> ScheduledBatch | None:
        """The next step, or None when nothing can run, or not before another update."""
        assert self._num_in_flight <= self.pipeline_depth, "an update or fail is due first"
        step = _Step(self.limits.max_num_batched_tokens)
        self._schedule_running(step)
        if not step.lacks_blocks:
            self._schedule_waiting(step, now)
        changes = self.memory.take_changes()
        if not step.rows and not changes:
            return None
        for request, _ in step.rows:
            request.timings.on_scheduled(now)
        self._num_in_flight += 1
        return self._to_batch(step, changes)

    def update(
        self, batch: ScheduledBatch, sampled: Sequence[Sequence[int]], now: float
    ) -> list[Progress]:
        """Take each request's sampled tokens (none for an unfinished prompt), in batch order.

        Batches are updated in the order in which they were scheduled.
        """
        self._num_in_flight -= 1
        progress: list[Progress] = []
        for scheduled, token_ids in zip(batch.requests, sampled, strict=True):
            request = self.owner(scheduled)
            if request is None:
                continue
            assert scheduled.end <= request.num_tokens, "an earlier batch has not been updated"
            self._publish_blocks(request, scheduled.end)
            self._start_forks(request, scheduled.end)
            request.num_pending_tokens -= scheduled.samples
            if token_ids:
                progress.append(self._append(request, token_ids, now))
        return progress

    def fail(self, batch: ScheduledBatch) -> list[Request]:
        """The step raised: end its requests; what it was to load or move is not in memory.

        Requests that only a later step has admitted with such an adapter are computed again, and
        after moves, where nothing in memory is relied on, all are.
        """
        self._num_in_flight -= 1
        ended: list[Request] = []
        for scheduled in batch.requests:
            ended += self.end_with_error(scheduled)
        lost = {load.digest: None for load in batch.adapter_loads}
        for request in self.running[::-1]:
            if batch.moves or request.adapter in lost:
                self._preempt(request)
        if batch.moves:
            self.memory.forget(self._tables())
        for digest in lost:
            self.memory.discard(digest, self._tables())
        return ended

    def owner(self, scheduled: ScheduledRequest) -> Request | None:
        """The request that this row is for; None if it has ended or was preempted since."""
        request = self._by_key.get((scheduled.request_id, scheduled.choice))
        return request if request is not None and request.life == scheduled.life else None

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks, pins and queues agree with the requests."""
        pins: dict[str, int] = {}
        alive = [r for r in self._by_key.values() if r.life]
        assert len({r.life for r in alive}) == len(alive) == len(self.running)
        for request in self._by_key.values():
            assert request.num_remaining_tokens >= 0
            assert 0 <= request.num_pending_tokens <= (self._num_in_flight if request.life else 0)
        for request in self.running:
            assert request.status is RequestStatus.RUNNING and request.life
            assert len(request.block_table) >= self.blocks.blocks_for(request.num_computed_tokens)
            if request.adapter:
                pins[request.adapter] = pins.get(request.adapter, 0) + 1
        self.memory.check_integrity(list(self._tables()), pins)
        queued = [*self.running, *self.waiting]
        queued += [fork for r in queued for fork in r.forks]
        assert {r.key for r in queued} == set(self._by_key) and len(queued) == len(self._by_key)

    # ==== who runs ====

    def _schedule_running(self, step: "_Step") -> None:
        decodes = [
            r for r in self.running if r.num_remaining_tokens == 1 and not self._is_ending(r)
        ]
        prefills = [r for r in self.running if r.num_remaining_tokens > 1]
        for request in [*decodes, *prefills]:
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for one before it
            count = min(request.num_remaining_tokens, step.budget)
            if count and self._make_room(request, count, step):
                step.add(request, count)

    def _make_room(self, request: Request, count: int, step: "_Step") -> bool:
        """Blocks for `count` more tokens, at the cost of requests admitted later or of itself.

        Where a request is about to end, its blocks are waited for instead; and this one does not
        give way before its pending token is known, or it might sample that one for ever.
        """
        while not self._allocate(request, count):
            step.lacks_blocks = True
            if any(self._is_ending(r) for r in self.running):
                return False
            victim = next(r for r in reversed(self.running) if not step.has(r))
            if victim is request and request.num_pending_tokens:
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _schedule_waiting(self, step: "_Step", now: float) -> None:
        for request in list(self.waiting):
            if not step.budget or len(self.running) + step.num_promised >= self.limits.max_num_seqs:
                return
            if request.adapter and not self.adapters.is_ready(request.adapter):
                continue  # its weights are on their way; others need not wait for them
            is_loading = self.adapters.awaited_load(request.adapter) > 0
            if not is_loading and self._admit(request, step):
                continue
            if not self._is_passed_over(request, step):
                return  # room comes when running requests end; overtaking could starve this one

    def _is_passed_over(self, request: Request, step: "_Step") -> bool:
        """While its adapter is copied to the device others go on, and leave it the blocks it needs.

        For the first such copy only: if another is needed, nobody overtakes the request again.
        """
        load = self.adapters.awaited_load(request.adapter)
        request.awaited_load = request.awaited_load or load
        if not load or request.awaited_load != load:
            return False
        step.num_promised += 1
        step.promised_blocks += self.blocks.blocks_for(request.num_tokens)
        return True

    def _admit(self, request: Request, step: "_Step") -> bool:
        """Start a waiting request if all its known tokens find room beside the running ones.

        They and its adapter, which is brought to the device; False until it is there.
        """
        cached = self._find_cached_blocks(request)
        self.blocks.share(cached)
        request.block_table.extend(cached)
        request.num_computed_tokens = len(cached) * self.blocks.block_size
        needed = self.blocks.blocks_for(request.num_tokens) - len(cached) + step.promised_blocks
        if not self._reserve(needed, request.adapter) or not self._acquire(request):
            self.blocks.free(request.block_table)
            request.num_computed_tokens = 0
            return False
        count = min(request.num_remaining_tokens, step.budget)
        has_room = self._allocate(request, count)
        assert has_room, "what was reserved for a request is gone"
        request.num_cached_tokens = max(request.num_cached_tokens, request.num_computed_tokens)
        self.waiting.remove(request)
        self._start_life(request)
        step.add(request, count)
        return True

    def _acquire(self, request: Request) -> bool:
        return not request.adapter or self.adapters.acquire(request.adapter) is not None

    def _reserve(self, num_blocks: int, adapter: str = "") -> bool:
        return self.memory.reserve(num_blocks, adapter, self._tables())

    def _tables(self) -> Iterator[list[int]]:
        return (r.block_table for r in self._by_key.values())

    def _allocate(self, request: Request, count: int) -> bool:
        """Private blocks for `count` more tokens; False and no change if there are too few."""
        blocks, table, start = self.blocks, request.block_table, request.num_computed_tokens
        end = start + count
        missing = blocks.blocks_for(end) - len(table)
        frozen = blocks.frozen(table, start, end)
        if missing + len(frozen) > 0:
            if not self._reserve(missing + len(frozen)):
                return False
            self.memory.make_private(table, frozen)
            blocks.grow(table, end)
        return True

    def _start_life(self, request: Request) -> None:
        self._num_lives += 1
        request.life = self._num_lives
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    def _preempt(self, request: Request) -> None:
        """Pending tokens are lost: they are sampled again, the same ones."""
        self.num_preemptions += 1
        self._release(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = request.num_pending_tokens = 0
        self.running.remove(request)
        self.waiting.appendleft(request)

    # ==== blocks and their contents ====

    def _hashes(self, request: Request, num_blocks: int) -> list[bytes]:
        """Hashes of the request's first full blocks, extended as far as needed."""
        known, size = request.block_hashes, self.blocks.block_size
        for i in range(len(known), num_blocks):
            previous = known[-1] if known else scope_hash(request.scope)
            known.append(block_hash(previous, request.token_ids(i * size, (i + 1) * size)))
        return known[:num_blocks]

    def _find_cached_blocks(self, request: Request) -> list[int]:
        """At least one token stays to be computed: its logits are what the request came for."""
        if not self.blocks.prefix_caching or request.sampling.prompt_logprobs is not None:
            return []
        return self.blocks.find(
            self._hashes(request, (request.num_tokens - 1) // self.blocks.block_size)
        )

    def _publish_blocks(self, request: Request, num_computed: int) -> None:
        """Only what a step has computed for certain, not what one in flight is to compute."""
        if not self.blocks.prefix_caching:
            return
        num_full = num_computed // self.blocks.block_size
        hashes = self._hashes(request, num_full)
        for i in range(request.num_published_blocks, num_full):
            self.blocks.publish(request.block_table[i], hashes[i])
        request.num_published_blocks = num_full

    def _start_forks(self, request: Request, num_computed: int) -> None:
        """Once the prompt is computed, further choices share its blocks and redo its last token."""
        if not request.forks or num_computed < request.num_prompt_tokens:
            return
        shared = request.block_table[: self.blocks.blocks_for(request.num_prompt_tokens)]
        for fork in request.forks:
            if len(self.running) >= self.limits.max_num_seqs:
                self.waiting.append(fork)
                continue
            self.blocks.share(shared)
            fork.block_table = list(shared)
            fork.num_computed_tokens = request.num_prompt_tokens - 1
            fork.num_cached_tokens = fork.num_computed_tokens
            fork.timings.first_scheduled_s = request.timings.first_scheduled_s
            self._start_life(fork)
            if fork.adapter:
                self.adapters.acquire(fork.adapter)
        request.forks = []

    # ==== tokens and ends ====

    def _append(self, request: Request, token_ids: Sequence[int], now: float) -> Progress:
        request.timings.on_tokens(now)
        gained: list[int] = []
        for token_id in token_ids:
            request.output_token_ids.append(token_id)
            gained.append(token_id)
            reason = self._end_of(request, token_id)
            if reason is not None:
                self._finish(request, reason)
                stop = token_id if reason is FinishReason.STOP else None
                return Progress(request, gained, stop)
        return Progress(request, gained)

    def _is_ending(self, request: Request) -> bool:
        """Whether a pending token is the last one, whatever it is."""
        pending = request.num_pending_tokens
        return pending > 0 and (
            len(request.output_token_ids) + pending >= request.sampling.max_tokens
            or request.num_tokens + pending >= self.limits.max_model_len
        )

    def _end_of(self, request: Request, token_id: int) -> FinishReason | None:
        sampling, num_outputs = request.sampling, len(request.output_token_ids)
        if num_outputs >= sampling.min_tokens and token_id in self._end_tokens(sampling):
            return FinishReason.STOP
        if num_outputs >= sampling.max_tokens or request.num_tokens >= self.limits.max_model_len:
            return FinishReason.LENGTH
        return None

    def _finish_all(self, requests: list[Request], reason: FinishReason) -> list[Request]:
        for request in requests:
            request.forks = []
            self._finish(request, reason)
        return requests

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Free what the request holds and forget it."""
        assert not request.forks, "forks must be started or ended before their first choice ends"
        if request.status is RequestStatus.RUNNING:
            self._release(request)
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self._by_key[request.key]

    def _release(self, request: Request) -> None:
        self.blocks.free(request.block_table)
        request.num_published_blocks = request.life = 0
        if request.adapter:
            self.adapters.release(request.adapter)

    # ==== the batch ====

    def _to_batch(self, step: "_Step", changes: MemoryChanges) -> ScheduledBatch:
        rows = sorted(step.rows, key=lambda row: row[1])  # stable: short ones first
        return ScheduledBatch(
            requests=tuple(self._to_scheduled(r, count) for r, count in rows),
            adapter_evictions=changes.evictions,
            moves=changes.moves,
            adapter_loads=changes.loads,
        )

    def _to_scheduled(self, request: Request, count: int) -> ScheduledRequest:
        start = request.num_computed_tokens
        end = request.num_computed_tokens = start + count
        sampling, adapter = request.sampling, request.scope.adapter
        pending = request.num_pending_tokens
        num_outputs = len(request.output_token_ids) + pending
        samples = end == request.num_tokens + pending
        request.num_pending_tokens += samples
        history = None
        if sampling.uses_penalties:
            history = (list(request.prompt_token_ids), list(request.output_token_ids))
        return ScheduledRequest(
            request_id=request.request_id,
            choice=request.index,
            token_ids=[PENDING] if pending else request.token_ids(start, end),
            start=start,
            block_table=tuple(request.block_table),
            adapter_slot=self.adapters.slot(adapter) if adapter else 0,
            sampling=sampling,
            samples=samples,
            forbidden_token_ids=(
                self._end_tokens(sampling) if num_outputs + 1 < sampling.min_tokens else ()
            ),
            history=history,
            prompt_targets=_prompt_targets(request, start, end),
            life=request.life,
        )

    def _end_tokens(self, sampling: SamplingParams) -> tuple[int, ...]:
        eos = () if sampling.ignore_eos else self.limits.eos_token_ids
        return (*eos, *sampling.stop_token_ids)


def _prompt_targets(request: Request, start: int, end: int) -> list[int] | None:
    """The tokens that follow positions [start, end) within the prompt, where they are scored."""
    if request.sampling.prompt_logprobs is None or start >= request.num_prompt_tokens - 1:
        return None
    return request.token_ids(start + 1, min(end + 1, request.num_prompt_tokens))


class _Step:
    """A batch in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.rows: list[tuple[Request, int]] = []
        self.lacks_blocks = False  # for one that runs; so nobody is admitted
        self.num_promised = 0  # requests whose adapter is being copied to the device
        self.promised_blocks = 0  # that are left to them
        self._keys: dict[tuple[str, int], None] = {}

    def add(self, request: Request, count: int) -> None:
        self.rows.append((request, count))
        self.budget -= count
        self._keys[request.key] = None

    def has(self, request: Request) -> bool:
        return request.key in self._keys
