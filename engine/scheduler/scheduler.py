"""Scheduler: decides which tokens of which requests are computed next.

    schedule(now) -> ScheduledBatch      decide, allocate, advance num_computed_tokens
    update(batch, sampled)               append sampled tokens, publish blocks, finish
    fail(batch)                          end the requests of a failed step with an error

With a `pipeline_depth` of 1, a step may be scheduled before the previous one is updated. A
request whose next token is still being computed is then scheduled with PENDING in its place,
unless that token is certainly its last, or a grammar or bad words must know it first. Every
admission of a request is a life with a number of its own; results for a life that has ended or was
preempted are dropped. Its blocks are free at once, because executors run steps in order: what a
dropped row writes is overwritten before any later row reads it.

One step mixes decodes with chunks of prompts under `max_num_batched_tokens`, and under a target
for its time while anybody decodes (`step_budget`). Running requests go first; waiting ones follow,
those of a higher class first (`classes`), then of the tenant that has been given the least before
(`fairness`), except that a request whose adapter is being loaded, or whose grammar is being
compiled, is passed over. When memory runs out, of the lowest class the request admitted last loses
its blocks and is computed again later (preemption by recompute). Time enters only through `now`
and `observe`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from engine.scheduler.activation import NEVER, adapter_start
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.classes import PriorityClass
from engine.scheduler.decode_run import DecodeRun, LightBatch, are_plain_decodes, steps_possible
from engine.scheduler.fairness import TenantService, credit_of
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.memory import MemoryBudget, MemoryChanges
from engine.scheduler.prefix_cache import find_cached_blocks, publish_blocks
from engine.scheduler.request import FinishReason, InvalidRequest, Request, RequestStatus
from engine.scheduler.seats import lowest, may_yield, paused_flows, seats_to_yield
from engine.scheduler.speculation import Draft, Speculation
from engine.scheduler.step import Step
from engine.scheduler.step_budget import StepBudget
from engine.scheduler.step_rates import StepRates, step_rates
from engine.scheduler.step_time import StepShape, shape_of
from engine.scheduler.waiting import Order, WaitingQueue

MOST_PAUSED = 8  # steps in a row in which decodes may be left out for others' prompts


class Progress(NamedTuple):
    """New tokens of one request in one step; `request.finish_reason` says whether it ended.

    A named tuple, because one is made per request and step.
    """

    request: Request
    row: int  # index of the request in the batch
    token_ids: list[int]
    stop_token_id: int | None = None


class Scheduler:
    """Owns every unfinished request. Finished ones are returned once and forgotten."""

    def __init__(
        self,
        limits: SchedulerLimits,
        memory: MemoryBudget,
        *,
        pipeline_depth: int = 0,
        speculation: Speculation | None = None,
    ) -> None:
        assert pipeline_depth in (0, 1), f"pipeline_depth must be 0 or 1, not {pipeline_depth}"
        assert speculation is None or not pipeline_depth, "drafts follow tokens that are known"
        self.limits = limits
        self.memory = memory
        self.blocks = memory.blocks
        self.adapters = memory.adapters
        self.pipeline_depth = pipeline_depth
        self.speculation = speculation
        self.step_budget = StepBudget(limits.target_step_s)
        self.waiting = WaitingQueue()
        self.service = TenantService(credit_of(limits.max_num_seqs))
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = self.num_drafts = 0
        self.num_drafted_tokens = self.num_accepted_tokens = 0
        self._by_key: dict[tuple[str, int], Request] = {}
        self._num_in_flight = 0  # scheduled batches that were neither updated nor failed
        self._num_lives = 0
        self._num_paused = 0  # steps in a row in which some have not decoded
        self._cramped: PriorityClass | None = None  # of the request that found no room

    # ==== requests in and out ====

    def add(self, request: Request, *, is_next: bool = False) -> None:
        """Queue a request (and its forks, which wait for its prompt), or put it before all others.

        Raises InvalidRequest if memory can never hold it.
        """
        if refusal := self.refusal(request):
            raise InvalidRequest(refusal)
        rules = self.limits.rules(request.sampling)
        for r in (request, *request.forks):
            r.rules = rules
            assert r.key not in self._by_key, f"request {r.key} was added twice"
            self._by_key[r.key] = r
        if is_next:
            request.num_charged_tokens = 0  # it is no tenant's
            request.is_nobodys = True
            self.waiting.add_urgent(request)
            return
        if request.flow not in self.waiting.flows:
            self.service.settle(self.running)
            self.service.enter(request.flow, self.waiting.flows)
        self.waiting.add(request)

    def abort(self, request_id: str, index: int | None = None) -> list[Request]:
        """End a choice of the request, or all; their blocks and pins are free on return."""
        if index is not None:
            request = self._by_key.get((request_id, index))
            if request is None:
                return []
            self._part(request)
            return self._finish_all([request], FinishReason.ABORT)
        ended = [r for r in self._by_key.values() if r.request_id == request_id]
        return self._finish_all(ended, FinishReason.ABORT)

    def end_with_error(self, scheduled: ScheduledRequest) -> list[Request]:
        """End the choice that this row belongs to, and the forks that wait for it."""
        request = self.owner(scheduled)
        return self._finish_all([request, *request.forks], FinishReason.ERROR) if request else []

    def end_too_large(self, digest: str) -> list[Request]:
        """End requests that can never fit with this adapter, now that its size is known."""
        requests = [r for r in self._by_key.values() if r.adapter_digest == digest]
        ended = [r for r in requests if self.refusal(r)]
        return self._finish_all(ended, FinishReason.ERROR)

    def refusal(self, request: Request) -> str:
        """Why memory can never hold the request at its full length; empty if it can."""
        most = request.num_prompt_tokens + request.sampling.max_tokens
        num_tokens = min(most, self.limits.max_model_len) - 1  # the last one is not computed
        if request.sampling.pooling is not None:
            num_tokens = request.num_prompt_tokens
        lacking = self.memory.lacking_bytes(num_tokens, request.adapter_digest)
        if lacking is None:
            return ""
        beside = f" beside adapter {request.adapter_digest}" if request.adapter_digest else ""
        return (
            f"{num_tokens} tokens{beside} need {lacking[0]} bytes of memory, and there are "
            f"{lacking[1]}; ask for fewer tokens (max_tokens={request.sampling.max_tokens})"
        )

    def end_adapter_with_error(self, digest: str) -> list[Request]:
        """End every request of an adapter that will never be ready."""
        ended = [r for r in self._by_key.values() if r.adapter_digest == digest]
        return self._finish_all(ended, FinishReason.ERROR)

    def set_adapter_proven(self, digest: str) -> None:
        """Let others use what requests with this adapter have computed and will compute."""
        for request in self._by_key.values():
            if request.adapter_digest == digest:
                request.awaits_proof = False

    def discard_adapter(self, digest: str) -> None:
        """Take an adapter that no request uses from the device."""
        self.memory.discard(digest, self._tables())

    def set_grammar_ready(self, grammar: str) -> None:
        """Let requests with this grammar be admitted."""
        for request in self._by_key.values():
            if request.awaits_grammar and request.sampling.grammar == grammar:
                request.awaits_grammar = False

    def end_grammar_with_error(self, grammar: str) -> list[Request]:
        """End every request that waits for a grammar which will never be ready."""
        ended = [
            r for r in self._by_key.values() if r.awaits_grammar and r.sampling.grammar == grammar
        ]
        return self._finish_all(ended, FinishReason.ERROR)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._by_key)

    @property
    def num_waiting(self) -> int:
        return len(self._by_key) - len(self.running)

    @property
    def queued_tokens(self) -> int:
        """Tokens that have not been scheduled, over all requests."""
        return sum(r.num_remaining_tokens for r in self._by_key.values())

    @property
    def rates(self) -> StepRates:
        """What its steps can do in a second, as they have shown."""
        return step_rates(self.step_budget.times, self.limits.max_num_batched_tokens, self.running)

    @property
    def service_gap(self) -> float:
        """How far apart the counters of tenants are that could be served and wait, in the class
        where it is most; see `fairness.bound`."""
        ready = [r.flow for r in self.waiting.heads() if not self._is_unready(r)]
        if len(ready) < 2:
            return 0.0
        self.service.settle(self.running)
        counters: dict[PriorityClass, list[float]] = {}
        for flow in ready:
            counters.setdefault(flow.priority_class, []).append(self.service[flow])
        return max(max(each) - min(each) for each in counters.values())

    @property
    def adapters_used(self) -> float:
        """The part of the room for adapters that those of all requests need; above 1 if it is not
        enough. One whose size is not known yet counts as empty."""
        digests = {r.adapter_digest for r in self._by_key.values()}
        return self.memory.share_of_adapters(digests - {""})

    # ==== a step ====

    def schedule(self, now: float) -> ScheduledBatch | None:
        """Return the next step; None if nothing can run, or not before another update."""
        planned = self._plan_step(now, None)
        return None if planned is None else planned[0].to_batch(self.adapters, planned[1])

    def schedule_light(self, now: float, token_id: int) -> LightBatch | None:
        """Return the same step as `schedule`, for who computes nothing: requests that decode, and
        that all sample `token_id`, without their rows."""
        planned = self._plan_step(now, token_id)
        if planned is None:
            return None
        for request in planned[0].decodes:
            request.num_computed_tokens += 1
            request.num_pending_tokens = 1
        return LightBatch(planned[0].decodes, planned[0].to_batch(self.adapters, planned[1]))

    def update_light(
        self, batch: LightBatch, token_id: int
    ) -> tuple[list[Request], list[Progress]]:
        """Update as `update` does; return the decodes that ended, and the progress of the rest."""
        ended = self._append_to(batch.decodes, token_id, may_end=True)
        sampled = [[token_id] if row.samples else [] for row in batch.rest.requests]
        return ended, self.update(batch.rest, sampled)

    def _plan_step(self, now: float, token_id: int | None) -> tuple[Step, MemoryChanges] | None:
        """Choose the next step's rows, and make room for them. With a token's id, decodes without
        rows where all of them can be so."""
        assert self._num_in_flight <= self.pipeline_depth, "an update or fail is due first"
        self._yield_room()
        self._yield_seats()
        step = Step(self.limits.max_num_batched_tokens)
        decodes, prefills = self._divide_running(step)
        decodes = self._without_paused(decodes, prefills)
        if token_id is None or not self._take_decodes(step, decodes, token_id):
            self._schedule_running(step, decodes)
        drafts = self._propose_drafts(step)
        num_admissible = min(len(self.waiting), self.limits.max_num_seqs - len(self.running))
        num_prompts = len(prefills) + num_admissible
        if len(prefills) < len(self.running) and (prefills or self.waiting or step.narrow):
            rows = _with_drafts(step.rows, drafts) if drafts else list(step.rows)
            rows += [(request, 1) for request in step.decodes]
            step.prompt_time = self.step_budget.prompt_time(rows, num_prompts)
        self._widen_decodes(step, 2 if num_prompts else 1)
        self._schedule_prompts(step, prefills)
        self._add_drafts(step, drafts)
        changes = self.memory.take_changes()
        if not step.rows and not step.decodes and not changes:
            return None
        for request, _ in step.rows:
            if request.first_scheduled_s is None:
                request.first_scheduled_s = now
        self._num_in_flight += 1
        return step, changes

    def update(self, batch: ScheduledBatch, sampled: Sequence[Sequence[int]]) -> list[Progress]:
        """Take each request's sampled tokens (none for an unfinished prompt), in batch order.

        Behind them may be others that are certain; later steps compute these.
        Batches must be updated in the order in which they were scheduled.
        """
        self._num_in_flight -= 1
        progress: list[Progress] = []
        for row, (scheduled, token_ids) in enumerate(zip(batch.requests, sampled, strict=True)):
            request = self.owner(scheduled)
            if request is None:
                continue
            end = scheduled.end - scheduled.num_drafts
            assert end <= request.num_tokens, "an earlier batch has not been updated"
            publish_blocks(self.blocks, request, end)
            if request.forks:
                self._start_forks(request, end)
            request.num_pending_tokens -= scheduled.samples
            if token_ids:
                gained, stop = self._append(request, token_ids, scheduled.num_drafts)
                progress.append(Progress(request, row, gained, stop))
            elif _is_pooled(request, scheduled):
                self._finish(request, FinishReason.STOP)
                progress.append(Progress(request, row, []))
        return progress

    def begin_run(self, token_id: int) -> DecodeRun | None:
        """Schedule the first of some steps that only decode, and that all sample `token_id`; None
        if the next step may be another one. Until its end, requests may be added, nothing else."""
        rows, memory = self.running, self.memory
        left = self.limits.max_num_batched_tokens - len(rows)
        if not rows or left < 0 or self._num_in_flight or self.pipeline_depth or self.speculation:
            return None
        if memory.has_changes or not self.is_blocked(left):
            return None
        if not are_plain_decodes(rows, token_id):
            return None
        num_steps = steps_possible(rows, memory, self.limits.max_model_len)
        if not num_steps:
            return None
        self._num_in_flight += 1
        run = DecodeRun(list(rows), num_steps, token_id)
        run.schedule(memory, 1)
        return run

    def is_blocked(self, budget: int) -> bool:
        """Whether a step with so many tokens left for prompts looks at no waiting request."""
        if not budget or not self.waiting:
            return True
        if len(self.running) >= self.limits.max_num_seqs:
            return not may_yield(self.running, self.waiting.heads())
        return all(self._is_unready(request) for request in self.waiting)

    def end_run(self, run: DecodeRun) -> list[Request]:
        """Update the newest step of a run; return the requests that ended with it."""
        self._num_in_flight -= 1
        return self._append_to(run.rows, run.token_id, may_end=run.is_last)

    def _append_to(
        self, requests: Sequence[Request], token_id: int, may_end: bool
    ) -> list[Request]:
        """Update requests that decode; return those that ended."""
        ended: list[Request] = []
        size, most = self.blocks.block_size, self.limits.max_model_len
        for request in requests:
            if not request.num_computed_tokens % size:
                publish_blocks(self.blocks, request, request.num_computed_tokens)
            request.num_pending_tokens = 0
            output = request.output_token_ids
            output.append(token_id)
            if may_end and (  # by its length alone, as no such token ends it
                len(output) >= request.sampling.max_tokens
                or len(request.prompt_token_ids) + len(output) >= most
            ):
                self._finish(request, FinishReason.LENGTH)
                ended.append(request)
        return ended

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Learn how long steps take from one that took `seconds`. May be left out."""
        if self._teaches(batch, seconds):
            self.step_budget.times.observe(shape_of(batch), seconds)

    def observe_light(self, batch: LightBatch, shape: StepShape, seconds: float) -> None:
        """Learn from a step of this shape."""
        if self._teaches(batch.rest, seconds):
            self.step_budget.times.observe(shape, seconds)

    def _teaches(self, batch: ScheduledBatch, seconds: float) -> bool:
        is_like_others = not (batch.moves or batch.adapter_loads)
        return is_like_others and self.step_budget.times.needs(seconds)

    def fail(self, batch: ScheduledBatch) -> list[Request]:
        """End the requests of a step that raised; its loads and moves cannot be relied on.

        Running requests that use one of its loading adapters are preempted; if it had moves, all
        running requests are, and all cached content is evicted.
        """
        self._num_in_flight -= 1
        ended: list[Request] = []
        for scheduled in batch.requests:
            ended += self.end_with_error(scheduled)
        lost = {load.digest: None for load in batch.adapter_loads}
        for request in self.running[::-1]:
            if batch.moves or request.adapter_digest in lost:
                self._preempt(request)
        if batch.moves:
            self.memory.forget(self._tables())
        for digest in lost:
            self.memory.discard(digest, self._tables())
        return ended

    def owner(self, scheduled: ScheduledRequest) -> Request | None:
        """The request that this row belongs to; None if it has ended or was preempted since."""
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
            if request.adapter_digest:
                pins[request.adapter_digest] = pins.get(request.adapter_digest, 0) + 1
        self.memory.check_integrity(list(self._tables()), pins)
        queued = [*self.running, *self.waiting]
        queued += [fork for r in queued for fork in r.forks]
        assert {r.key for r in queued} == set(self._by_key) and len(queued) == len(self._by_key)

    # ==== choosing rows ====

    def _yield_room(self) -> None:
        """Take room back for one of a higher class that found none in the last step."""
        above, self._cramped = self._cramped, None
        if above is not None and (last := lowest(self.running, above)) is not None:
            self._preempt(last)

    def _yield_seats(self) -> None:
        """Take seats back for tenants that have too few of them, and were given less."""
        num_free = self.limits.max_num_seqs - len(self.running)
        if num_free or not may_yield(self.running, self.waiting.heads()):
            return
        self.service.settle(self.running)
        ready = (r for r in self.waiting.in_order(self.service.order) if not self._is_unready(r))
        for request in seats_to_yield(self.running, ready, self.service):
            self._preempt(request)

    def _divide_running(
        self, step: Step
    ) -> tuple[list[tuple[Request, int]], list[tuple[Request, int]]]:
        """List requests that decode, and those with more to compute, each with the number."""
        decodes: list[tuple[Request, int]] = []
        prefills: list[tuple[Request, int]] = []
        for request in self.running:
            remaining = request.num_remaining_tokens
            if remaining > 1 and request.num_computed_tokens < request.num_admitted_tokens:
                prefills.append((request, remaining))
            elif remaining and not self.limits.must_wait(request):
                decodes.append((request, 1))
                if remaining > 1:
                    step.narrow.append(request)
        return decodes, prefills

    def _without_paused(
        self, decodes: list[tuple[Request, int]], prefills: Sequence[tuple[Request, int]]
    ) -> list[tuple[Request, int]]:
        """Leave out decodes of flows beside which another's prompt has the right to be fast."""
        prompts = {request.flow for request, _ in prefills}
        if len(self.running) < self.limits.max_num_seqs:
            prompts.update(r.flow for r in self.waiting.heads() if not self._is_unready(r))
        paused = paused_flows(decodes, prompts, self.running, self.service)
        self._num_paused = self._num_paused + 1 if paused and self._num_paused < MOST_PAUSED else 0
        if not self._num_paused:
            return decodes
        return [row for row in decodes if row[0].flow not in paused]

    def _take_decodes(
        self, step: Step, decodes: Sequence[tuple[Request, int]], token_id: int
    ) -> bool:
        """Take all of them without rows; False, without change, if they need more than numbers."""
        blocks, requests = self.blocks, [request for request, _ in decodes]
        if self.pipeline_depth or self.speculation or len(requests) > step.budget:
            return False
        if not are_plain_decodes(requests, token_id):
            return False
        size = blocks.block_size
        beginning = [r for r in requests if r.num_computed_tokens >= size * len(r.block_table)]
        if not self.memory.has_ready_blocks(len(beginning)):
            return False
        for request in beginning:
            self.memory.reserve(1)
            blocks.grow(request.block_table, request.num_computed_tokens + 1)
        step.take_decodes(requests)
        return True

    def _widen_decodes(self, step: Step, part: int) -> None:
        """Give decodes with several known tokens more than one, without preempting anyone.

        They get one of so many equal parts of what decodes leave. No time is too long if all have
        several: these tokens are known to whoever waits for them.
        """
        most = 0 if step.lacks_blocks else step.budget // part
        if step.prompt_time is not None and len(step.narrow) < len(step.rows):
            most = min(most, step.prompt_time.share(part))
        for request in step.narrow:
            more = min(request.num_remaining_tokens - 1, most)
            if more and step.has(request) and self._allocate(request, 1 + more):
                step.widen(request, more)
                most -= more

    def _schedule_running(self, step: Step, requests: list[tuple[Request, int]]) -> None:
        for request, most in requests:
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted for an earlier one
            count = 0 if step.is_full else step.piece(request, most)
            if count and self._make_room(request, count, step):
                step.add(request, count)

    def _propose_drafts(self, step: Step) -> list[tuple[Request, Draft]]:
        """Draft for the decodes that have been scheduled; the drafts' tokens leave the budget, of
        which they may take half, so that prompts go on."""
        if self.speculation is None or step.lacks_blocks:
            return []
        decodes = [request for request, _ in step.rows if request.num_remaining_tokens == 1]
        drafts = self.speculation.propose(decodes, step.budget // 2, self.step_budget.times)
        step.budget -= sum(len(draft.token_ids) for _, draft in drafts)
        return drafts

    def _add_drafts(self, step: Step, drafts: list[tuple[Request, Draft]]) -> None:
        """Add drafts as far as there are blocks for them without preempting anyone."""
        for request, draft in drafts:
            if step.lacks_blocks or not self._allocate(request, 1 + len(draft.token_ids)):
                return
            step.drafts[request.key] = draft.token_ids
            request.draft_match = draft.match

    def _make_room(self, request: Request, count: int, step: Step) -> bool:
        """Allocate blocks for `count` more tokens; preempts later requests, or this one. Those of
        lower classes go first, and last those that keep their seats.

        If a running request is about to end, wait for its blocks instead. A request with a pending
        token is not preempted for itself: it might sample that token again and again.
        """
        while not self._allocate(request, count):
            step.lacks_blocks = True
            if any(self.limits.is_ending(r) for r in self.running):
                return False
            left = [r for r in reversed(self.running) if not step.has(r)]
            # of equals the first, which is the newest
            victim = max(left, key=lambda r: (not r.keeps_seat, r.priority_class))
            if victim is request and request.num_pending_tokens:
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _schedule_prompts(self, step: Step, prefills: list[tuple[Request, int]]) -> None:
        """Go on with prompts, then begin others; where flows differ, by what they were given."""
        flows = {r.flow for r, _ in prefills} | self.waiting.flows
        if len(flows) > 1:
            self.service.settle(self.running)
            self.service.classes.note_waiting(self.waiting.flows)
        if len(flows) > 1 and prefills:
            order = self.service.running_order
            prefills.sort(key=lambda row: order(row[0]))  # stable
            self._schedule_waiting(step, order(prefills[0][0]))
        self._schedule_running(step, prefills)
        if not step.lacks_blocks:
            self._schedule_waiting(step)

    def _schedule_waiting(self, step: Step, below: Order | None = None) -> None:
        """Begin requests, of flows that go before `below` alone."""
        if self._has_no_seat(step):
            return  # without a look at the queue, which may be long
        for request in self.waiting.in_order(self.service.order):
            if below is not None and self.service.order(request.flow) >= below:
                return
            if self._has_no_seat(step):
                return
            if self._is_unready(request):
                continue  # later requests need not wait
            self._set_adapter_start(request)
            is_loading = self.adapters.awaited_load(request.adapter_digest) > 0
            if not is_loading and self._admit(request, step):
                continue
            if not self._is_passed_over(request, step):
                self._cramped = None if is_loading else request.priority_class
                return  # room comes when running requests end; overtaking would starve this one

    def _has_no_seat(self, step: Step) -> bool:
        return step.is_full or (len(self.running) + step.num_promised >= self.limits.max_num_seqs)

    def _is_unready(self, request: Request) -> bool:
        """Whether it cannot be admitted yet, however much room there is."""
        if request.awaits_grammar or (request.awaits_proof and self.pipeline_depth):
            return True  # on a device a probe's decode is in a step without other's prompts
        digest = request.adapter_digest
        return bool(digest) and not self.adapters.is_ready(digest)  # it is being fetched

    def _set_adapter_start(self, request: Request) -> None:
        """Find where the adapter begins to act, once: in the prompt alone, as in PEFT's generate,
        so that no token that is generated later moves it."""
        if request.adapter_start is not None:
            return
        digest, start = request.adapter_digest, NEVER
        if digest:
            invocation = self.adapters.invocation_token_ids(digest)
            start = adapter_start(request.prompt_token_ids, invocation)
        for choice in (request, *request.forks):
            choice.adapter_start = start

    def _is_passed_over(self, request: Request, step: Step) -> bool:
        """Whether later requests may overtake it while its adapter is copied to the device.

        The blocks that it needs stay reserved. Only for its first such copy: if another one is
        needed, no request overtakes it again.
        """
        load = self.adapters.awaited_load(request.adapter_digest)
        request.awaited_load = request.awaited_load or load
        if not load or request.awaited_load != load:
            return False
        step.num_promised += 1
        step.promised_blocks += self.blocks.blocks_for(request.num_tokens)
        return True

    def _admit(self, request: Request, step: Step) -> bool:
        """Start a waiting request if memory has room for all its known tokens and its adapter.

        Starts loading the adapter if needed; returns False until it is resident.
        """
        cached = find_cached_blocks(self.blocks, request)
        self.blocks.share(cached)
        request.block_table.extend(cached)
        request.num_computed_tokens = len(cached) * self.blocks.block_size
        needed = self.blocks.blocks_for(request.num_tokens) - len(cached) + step.promised_blocks
        if not self._reserve_for(request, needed) or not self._acquire(request):
            self.blocks.free(request.block_table)
            request.num_computed_tokens = 0
            return False
        count = step.piece(request, request.num_remaining_tokens)
        has_room = self._allocate(request, count)
        assert has_room, "what was reserved for a request is gone"
        if request.num_cached_tokens is None:
            num_cached = request.num_computed_tokens
            request.num_cached_tokens = min(num_cached, request.num_prompt_tokens)
        self.waiting.remove(request)
        self._start_life(request)
        step.add(request, count)
        return True

    def _acquire(self, request: Request) -> bool:
        return (
            not request.adapter_digest or self.adapters.acquire(request.adapter_digest) is not None
        )

    def _reserve_for(self, request: Request, num_blocks: int) -> bool:
        """Make room for a request that waits; its tenant is charged for a load that it begins."""
        digest, adapters = request.adapter_digest, self.adapters
        is_placed = not digest or adapters.is_placed(digest)
        if not self.memory.reserve(num_blocks, digest, self._tables()):
            return False
        if not is_placed:
            nbytes = adapters.nbytes(digest) or 0
            payer = self._payer(request)
            payer.load_bytes += nbytes
            size = nbytes / self.memory.block_bytes
            self.service.charge_load(payer, size * self.blocks.block_size)
        return True

    def _payer(self, request: Request) -> Request:
        """Find whom a load is for: a probe's is for the oldest request that awaits its verdict."""
        if not request.is_nobodys:
            return request
        digest = request.adapter_digest
        waiting = (r for r in self._by_key.values() if r.adapter_digest == digest)
        return next((r for r in waiting if not r.is_nobodys), request)

    def _reserve(self, num_blocks: int) -> bool:
        return self.memory.reserve(num_blocks, "", self._tables())

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
        self.service.begin(request)
        request.num_admitted_tokens = request.num_tokens
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    def _preempt(self, request: Request) -> None:
        """Return a running request to the queue. Its pending tokens are sampled again, equally."""
        self.num_preemptions += 1
        self.service.settle([request])
        self._release(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = request.num_pending_tokens = 0
        self.running.remove(request)
        self.waiting.appendleft(request)

    def _start_forks(self, request: Request, num_computed: int) -> None:
        """Start further choices once the prompt is computed: they share its blocks.

        Each recomputes the last prompt token, whose logits it needs.
        """
        if num_computed < request.num_prompt_tokens:
            return
        shared = request.block_table[: self.blocks.blocks_for(request.num_prompt_tokens)]
        for fork in request.forks:
            fork.num_cached_tokens = request.num_cached_tokens
            if len(self.running) >= self.limits.max_num_seqs:
                self.waiting.append(fork)
                continue
            self.blocks.share(shared)
            fork.block_table = list(shared)
            fork.num_computed_tokens = request.num_prompt_tokens - 1
            fork.first_scheduled_s = request.first_scheduled_s
            self._start_life(fork)
            if fork.adapter_digest:
                self.adapters.acquire(fork.adapter_digest)
        request.forks = []

    def _part(self, request: Request) -> None:
        """Part a choice from those that share its prompt, one of which may become the first."""
        if request.forks:
            first, *first.forks = request.forks
            request.forks = []
            if request.status is RequestStatus.RUNNING:
                self.waiting.appendleft(first)
            else:
                self.waiting.replace(request, first)
        elif request.status is RequestStatus.WAITING:
            for other in (*self.running, *self.waiting):
                if request in other.forks:
                    other.forks.remove(request)

    # ==== tokens and ends ====

    def _append(
        self, request: Request, token_ids: Sequence[int], num_drafts: int
    ) -> tuple[list[int], int | None]:
        """Take new tokens up to the one that ends the request; return them, and that one if it is a
        stop token. With drafts, all but the last were drafts, whose KV is there; that of further
        drafts is overwritten."""
        gained: list[int] = []
        reason = None
        for token_id in token_ids:
            request.output_token_ids.append(token_id)
            gained.append(token_id)
            reason = self.limits.end_of(request, token_id)
            if reason is not None:
                break
        if num_drafts:
            self._settle_drafts(request, num_drafts, min(len(gained), len(token_ids) - 1))
        if reason is None:
            return gained, None
        self._finish(request, reason)
        return gained, gained[-1] if reason is FinishReason.STOP else None

    def _settle_drafts(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """Count what was accepted as computed, and free the blocks of the rest."""
        self.num_drafts += 1
        self.num_drafted_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        request.num_drafted_tokens += num_drafts
        request.num_accepted_tokens += num_accepted
        assert request.acceptance is not None, "drafts that nobody has proposed"
        request.acceptance.record(request.draft_match, num_drafts, num_accepted)
        request.num_computed_tokens += num_accepted
        publish_blocks(self.blocks, request, request.num_computed_tokens)
        self.blocks.shrink(request.block_table, request.num_tokens)

    def _finish_all(self, requests: list[Request], reason: FinishReason) -> list[Request]:
        for request in requests:
            request.forks = []
            self._finish(request, reason)
        return requests

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Free the request's blocks and pin, and forget it."""
        assert not request.forks, "forks must be started or ended before their first choice ends"
        self.service.settle([request])
        if request.status is RequestStatus.RUNNING:
            self._release(request)
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self._by_key[request.key]
        self.service.forget_idle(self._by_key.values())

    def _release(self, request: Request) -> None:
        self.service.classes.leave(request.priority_class)
        self.blocks.free(request.block_table)
        request.num_published_blocks = request.life = 0
        if request.adapter_digest:
            self.adapters.release(request.adapter_digest)


def _with_drafts(
    rows: Iterable[tuple[Request, int]], drafts: Iterable[tuple[Request, Draft]]
) -> list[tuple[Request, int]]:
    """Add the drafts' tokens to those of the rows."""
    drafted = {request.key: len(draft.token_ids) for request, draft in drafts}
    return [(request, count + drafted.get(request.key, 0)) for request, count in rows]


def _is_pooled(request: Request, scheduled: ScheduledRequest) -> bool:
    """Whether this row has computed the last token that a pooling request needs."""
    return request.sampling.pooling is not None and scheduled.end == request.num_prompt_tokens
