"""Engine: turns requests into tokens, one step at a time, in one process and one thread.

    step():  schedule -> launch -> update

If the runner computes asynchronously, a step launches the next batch first and then takes the
results of the one before, so that the device never waits for Python. At most two batches exist.
The host cache's threads read and decode adapters; the step loop only polls for their completion.
A step that raises ends its own requests with an error and nothing else, unless the device is lost
with it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from engine.adapter_loader import AdapterLoader
from engine.announcer import SILENT, Announcer
from engine.backends.load import load_model
from engine.backends.needs import arena_bytes
from engine.backends.runner import FailedStep, RowOutput, Runner, StepHandle, check_device
from engine.config import EngineConfig
from engine.describe import describe, eos_token_ids, grammar_refusal
from engine.drafting.draft_model import DraftModel
from engine.drafting.loading import load_draft, settle_draft
from engine.grammar.grammars import Grammars
from engine.grammar.link import Tokens
from engine.grammar.masks import StepMasks
from engine.lora.host_cache import HostCache, Loaded
from engine.lora.weights import AdapterLoadError, AdapterUnreadable, LoraWeights
from engine.messages import (
    AdapterFolder,
    AdapterVerdict,
    EngineStats,
    ErrorKind,
    FlowTokens,
    GenerateRequest,
    RequestError,
    RequestOutput,
)
from engine.proof.gate import Gate
from engine.proof.probe import is_probe
from engine.proof.proofs import Proofs
from engine.results import Results, brings_parts
from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.classes import Flow
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.memory import MemoryBudget
from engine.scheduler.model_speculation import ModelSpeculation
from engine.scheduler.request import CacheScope, Request
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.speculation import NgramDrafter, Speculation
from engine.settle import settle
from engine.step_sizes import StepSizes
from engine.validate import validate

log = logging.getLogger(__name__)

MAX_REPORTED_ADAPTERS = 256


@dataclass(frozen=True, slots=True)
class _InFlight:
    batch: ScheduledBatch
    handle: StepHandle
    start_s: float
    masks: StepMasks | None = None


class Engine:
    """Runs requests. Other threads call `wake` when an idle engine has work again."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        wake: Callable[[], None] = lambda: None,
        announcer: Announcer = SILENT,
    ) -> None:
        self.settled = settle(config, arena_bytes)
        draft = None
        if config.speculation.method == "draft":
            draft = settle_draft(config, self.settled)
            rest = self.settled.memory_bytes - draft[1].memory_bytes
            config = replace(config, memory_bytes=rest)
            self.settled = settle(config, arena_bytes)
        self.config = config
        self._clock = clock
        self._announcer = announcer
        self._step_sizes = StepSizes()
        self.model = load_model(config, self.settled, announcer=announcer)
        self.grammars = self._open_grammars(wake)
        self.info = describe(config, self.settled, self.model)
        self.draft_model: DraftModel | None = None
        if draft is not None:
            loaded = load_draft(*draft, self.settled, self.model, clock=clock, announcer=announcer)
            self.draft_model = loaded.drafter
            self.info = replace(
                self.info, weight_bytes=self.info.weight_bytes + loaded.weight_bytes
            )
        self.loader = AdapterLoader(config, self.settled, self.model, self._on_adapter_read)
        self.host = HostCache(config.host_adapter_bytes, self.loader.load, wake)
        self.runner: Runner = self.model.make_runner(self.host.get)
        self.jumps_ahead = config.enable_jump_ahead and not self.runner.pipeline_depth
        self.scheduler = self._make_scheduler()
        self.proofs = self._make_gate(wake)
        self.last_batch: ScheduledBatch | None = None  # of the newest step; None: nothing could run
        self.is_idle = True  # the last step found nothing to run or to wait for
        self._in_flight: deque[_InFlight] = deque()  # oldest first
        self._failed_loads: set[str] = set()  # digests whose last load was in a step that failed
        self._outputs: list[RequestOutput] = []  # in chronological order
        self.results = Results()
        self._num_steps = 0
        self._step_s = self._last_update_s = 0.0

    def _open_grammars(self, wake: Callable[[], None]) -> Grammars | None:
        """Start to build the tokenizer's table, in another process.

        Not while the model is loaded, which needs the cores that it would take: only requests with
        a grammar wait for the table.
        """
        if grammar_refusal(self.config, self.settled):
            return None
        path, vocab_size = Path(self.config.source) / "tokenizer.json", self.settled.spec.vocab_size
        tokens = Tokens(str(path), vocab_size, eos_token_ids(self.config, self.settled))
        speculation = self.config.speculation
        max_drafts = 0 if speculation.method == "none" else speculation.max_draft_tokens
        return Grammars(tokens, self.config.max_num_seqs, wake, max_drafts)

    def _make_gate(self, wake: Callable[[], None]) -> Gate | None:
        if self.config.adapter_proof == "off":
            return None
        s = self.settled
        proofs = Proofs(
            self.model.decoder,
            s.dtype,
            s.max_model_len,
            self._clock,
            decodes_apart=self.runner.pipeline_depth > 0,
            layers=self.model.plain_layers,
            wake=wake,
        )
        return Gate(self, proofs)

    def _make_scheduler(self) -> Scheduler:
        s, seqs = self.settled, self.config.max_num_seqs
        target_ms = self.config.target_step_ms
        limits = SchedulerLimits(
            seqs,
            s.max_num_batched_tokens,
            s.max_model_len,
            self.info.eos_token_ids,
            target_step_s=None if target_ms is None else target_ms / 1e3,
        )
        depth, speculation = self.runner.pipeline_depth, self._make_speculation()
        return Scheduler(
            limits, self._memory_budget(), pipeline_depth=depth, speculation=speculation
        )

    def _make_speculation(self) -> Speculation | None:
        wanted = self.config.speculation
        if wanted.method == "none" or (wanted.method == "auto" and self.runner.pipeline_depth):
            return None
        if self.runner.pipeline_depth:
            raise wanted.impossible_on(self.settled.device)
        most = wanted.max_draft_tokens, self.settled.max_model_len
        if self.draft_model is not None:
            return ModelSpeculation(self.draft_model, *most)
        return Speculation(NgramDrafter(), *most)

    def _memory_budget(self) -> MemoryBudget:
        config, s = self.config, self.settled
        return MemoryBudget(
            s.memory_bytes,
            s.block_bytes,
            BlockManager(
                s.num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching
            ),
            AdapterSlots(loads_are_immediate=self.runner.loads_are_immediate),
            max_adapter_bytes=config.adapter_memory_bytes,
            max_adapters=self.model.max_adapters,
        )

    # ==== requests ====

    def add_request(self, request: GenerateRequest) -> None:
        """Queue a request. Raises InvalidRequest, naming the value and the allowed range."""
        validate(request, self.info)
        adapter_folder = request.adapter_folder
        adapter_digest = adapter_folder.digest if adapter_folder else ""
        scope = CacheScope(request.tenant, request.cache_salt, adapter_digest)
        now = self._clock()
        first, *forks = [
            Request(
                request.request_id,
                request.prompt_token_ids,
                request.sampling,
                now,
                scope=scope,
                priority=request.priority,
                weight=request.weight,
                priority_class=request.priority_class,
                index=i,
                output_token_ids=list(request.output_token_ids),
                num_resumed_tokens=len(request.output_token_ids),
            )
            for i in range(request.n)
        ]
        first.forks = forks
        self.scheduler.add(first, is_next=is_probe(request.request_id))
        self._want_grammar(first, adapter_folder)
        if adapter_folder:
            for _ in range(request.n):
                self.host.want(adapter_folder)
            if self.proofs is not None:
                self.proofs.enter(first, adapter_folder)

    def _want_grammar(self, first: Request, adapter_folder: AdapterFolder | None) -> None:
        grammar, choices = first.sampling.grammar, [first, *first.forks]
        if grammar is None or self.grammars is None:
            return
        is_ready = self.grammars.want(first.scope.tenant, grammar, len(choices))
        # Grammars do not know which of the base's tokens an adapter lacks: sampling finds out
        lacks_tokens = adapter_folder and 0 < adapter_folder.vocab_size < self.info.vocab_size
        for choice in choices:
            choice.awaits_grammar = not is_ready
            choice.jumps_ahead = self.jumps_ahead and not lacks_tokens

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End one choice of the request, or all; their blocks are free on return.

        Unknown requests have already ended and are ignored.
        """
        self.end_requests(self.scheduler.abort(request_id, index), None)

    # ==== a step ====

    def step(self) -> list[RequestOutput]:
        """Launch a step and take the results of the steps that are due.

        Returns the requests' new outputs, and those that ended since the last call. Raises
        DeviceLost if no later step can succeed: the caller must end this process.
        """
        self._poll_adapters()
        if self.grammars is not None and self.grammars.has_news:
            self._poll_grammars(self.grammars)
        num_kept = self._launch()
        self.is_idle = not self._in_flight and not self.scheduler.adapters.is_any_loading
        while len(self._in_flight) > num_kept:
            self._collect(self._in_flight.popleft())
        outputs, self._outputs = self._outputs, []
        if self.proofs is not None:
            outputs = self._advance_proofs(self.proofs, outputs)
        return outputs

    def _advance_proofs(self, gate: Gate, outputs: list[RequestOutput]) -> list[RequestOutput]:
        outputs, is_busy = gate.step(outputs)
        self.is_idle = self.is_idle and not is_busy
        ended, self._outputs = self._outputs, []
        return outputs + [output for output in ended if not is_probe(output.request_id)]

    def _launch(self) -> int:
        """Start the next step if there is one; returns how many may now stay in flight."""
        start = self._clock()
        batch = self.last_batch = self.scheduler.schedule(start)
        if batch is None:
            return 0
        if self.draft_model is not None:
            start += self.draft_model.take_spent_s()  # is no part of the step that was chosen
        news = self._step_sizes.describe_news(batch)
        if news is not None:  # steps of known sizes say how long the next one may take
            self._announcer.announce(news)
        handle: StepHandle
        num_kept, masks = self.runner.pipeline_depth, None
        try:
            if batch.grammar_rows:
                masks = self._begin_masks(batch)
                handle = self.runner.launch(batch, masks)
            else:
                handle = self.runner.launch(batch)
        except Exception as error:
            handle, num_kept = FailedStep(error), 0
        self._in_flight.append(_InFlight(batch, handle, start, masks))
        return num_kept

    def _collect(self, step: _InFlight) -> None:
        try:
            rows = step.handle.result()
        except Exception as error:
            log.exception("a step failed; its %d requests end", len(step.batch.requests))
            check_device(self.settled.device)
            text = f"the step failed: {type(error).__name__}: {error}"
            ended = [*self.scheduler.fail(step.batch), *self._fail_loads(step.batch)]
            self.end_requests(ended, RequestError(ErrorKind.ENGINE_ERROR, text))
        else:
            self._failed_loads -= {load.digest for load in step.batch.adapter_loads}
            if step.masks is not None:
                self._end_unmasked(step.batch, step.masks)
            self._update(step.batch, rows, step.start_s)

    def _fail_loads(self, batch: ScheduledBatch) -> list[Request]:
        """Remove requests whose adapter's load was in two failed steps in a row; return them.

        They need not be in either step, and would wait for ever. After one failure they may stay:
        it may have another cause.
        """
        digests = {load.digest: None for load in batch.adapter_loads}
        again = [digest for digest in digests if digest in self._failed_loads]
        self._failed_loads ^= digests.keys()
        return [r for digest in again for r in self.scheduler.end_adapter_with_error(digest)]

    def take_verdicts(self) -> tuple[AdapterVerdict, ...]:
        """Return the verdicts on adapters that were reached since the last call."""
        return () if self.proofs is None else self.proofs.take_verdicts()

    @property
    def has_unfinished(self) -> bool:
        """Whether a request has not had its last output yet."""
        is_holding = self.proofs is not None and self.proofs.is_holding
        return self.scheduler.has_unfinished or is_holding

    def take_served(self) -> tuple[FlowTokens, ...]:
        """Return what tenants were charged with since the last call."""
        self.scheduler.service.settle(self.scheduler.running)
        news = self.scheduler.service.take_news().items()
        return tuple((flow.tenant, flow.priority_class, tokens) for flow, tokens in news)

    def count_elsewhere(self, served: Iterable[FlowTokens]) -> None:
        """Count what other engines have charged tenants with."""
        flows = [
            (Flow(tenant, priority_class), tokens) for tenant, priority_class, tokens in served
        ]
        self.scheduler.service.settle(self.scheduler.running)
        self.scheduler.service.count_elsewhere(flows, self.scheduler.waiting.flows)

    @property
    def stats(self) -> EngineStats:
        s, blocks, rates = self.scheduler, self.scheduler.blocks, self.scheduler.rates
        return EngineStats(
            num_running=len(s.running),
            num_waiting=s.num_waiting,
            num_blocks_used=blocks.num_held,
            num_blocks_cached=blocks.num_cached,
            num_blocks_total=s.memory.num_reachable_blocks,
            queued_tokens=s.queued_tokens,
            resident_adapters=s.adapters.resident,
            adapters_in_memory=s.adapters.in_memory(MAX_REPORTED_ADAPTERS),
            total_steps=self._num_steps,
            total_prompt_tokens=self.results.num_prompt,
            total_cached_tokens=self.results.num_cached,
            total_output_tokens=self.results.num_outputs,
            total_preemptions=s.num_preemptions,
            total_step_s=self._step_s,
            total_drafts=s.num_drafts,
            total_drafted_tokens=s.num_drafted_tokens,
            total_accepted_tokens=s.num_accepted_tokens,
            tokens_per_s=rates.tokens_per_s,
            step_s=rates.step_s,
            row_s=rates.row_s,
            adapters_used=s.adapters_used,
        )

    def close(self) -> None:
        self.host.close()
        if self.grammars is not None:
            self.grammars.close()

    # ==== results of a step ====

    def _update(self, batch: ScheduledBatch, rows: list[RowOutput], start: float) -> None:
        for scheduled, row in zip(batch.requests, rows, strict=True):
            if row.error is not None:
                ended = self.scheduler.end_with_error(scheduled)
                self.end_requests(ended, RequestError(ErrorKind.ENGINE_ERROR, row.error))
            elif brings_parts(row):
                request = self.scheduler.owner(scheduled)
                if request is not None:  # it has not ended and was not preempted since
                    self.results.add_row(request, scheduled, row)
        now = self._clock()
        progress = self.scheduler.update(batch, [row.token_ids for row in rows])
        self._num_steps += 1
        step_s = now - max(start, self._last_update_s)  # steps in flight overlap
        self._step_s += step_s
        self.scheduler.observe(batch, step_s)
        self._last_update_s = now
        for each in progress:
            self._outputs.append(self.results.output(each, rows[each.row], now))
            if each.request.finish_reason:
                self._release(each.request)

    def end_requests(self, requests: Iterable[Request], error: RequestError | None) -> None:
        """Release what dropped requests hold outside the scheduler, and report their end."""
        now = self._clock()
        for request in requests:
            self._release(request)
            self._outputs.append(self.results.end(request, error, now))

    # ==== grammars ====

    def _poll_grammars(self, grammars: Grammars) -> None:
        for grammar, error in grammars.poll():
            if error is None:
                self.scheduler.set_grammar_ready(grammar)
            else:
                self.end_requests(self.scheduler.end_grammar_with_error(grammar), error)

    def _begin_masks(self, batch: ScheduledBatch) -> StepMasks:
        assert self.grammars is not None
        owners = [(i, self.scheduler.owner(batch.requests[i])) for i in batch.grammar_rows]
        rows = [(i, request) for i, request in owners if request is not None]
        drafted = [(i, r) for i, r in enumerate(batch.requests) if r.num_drafts]
        drafts = {i: r.token_ids[-r.num_drafts :] for i, r in drafted}
        return self.grammars.begin(rows, self.scheduler.running, drafts)

    def _end_unmasked(self, batch: ScheduledBatch, masks: StepMasks) -> None:
        """End requests whose token was sampled without the mask that it needs."""
        for index, error in masks.errors.items():
            self.end_requests(self.scheduler.end_with_error(batch.requests[index]), error)

    # ==== adapters ====

    def _on_adapter_read(self, adapter_folder: AdapterFolder, weights: LoraWeights) -> None:
        if self.proofs is not None:
            self.proofs.keep(adapter_folder, weights)

    def _poll_adapters(self) -> None:
        for digest in self.runner.arrived():
            self.scheduler.adapters.set_resident(digest)
        if self.host.is_settled:
            return
        for loaded in self.host.poll():
            if loaded.weights is not None:
                self._set_ready(loaded.digest, loaded.weights.nbytes)
                continue
            log.error("adapter %s cannot be used: %s", loaded.digest, loaded.error)
            error = _load_error(loaded)
            if error.kind == ErrorKind.ENGINE_ERROR:
                check_device(self.settled.device)  # its driver pins host memory for packing
            self.end_requests(self.scheduler.end_adapter_with_error(loaded.digest), error)
            self.loader.take_invocation(loaded.digest)
            if self.proofs is not None:
                self.proofs.end_load(loaded.digest, error)
        self._set_absent(self.host.advance(self.scheduler.adapters))

    def _set_ready(self, digest: str, nbytes: int) -> None:
        invocation = self.loader.take_invocation(digest)
        self.scheduler.adapters.set_ready(digest, nbytes, invocation)
        for request in self.scheduler.end_too_large(digest):
            text = self.scheduler.refusal(request)
            self.end_requests([request], RequestError(ErrorKind.INVALID_REQUEST, text))
        if self.proofs is not None:
            self.proofs.probe(digest)

    def _set_absent(self, digests: list[str]) -> None:
        for digest in digests:
            self.scheduler.adapters.set_absent(digest)
        if self.proofs is not None and digests:
            self.proofs.forget(digests)

    def drop_adapter(self, digest: str) -> None:
        """Take an adapter that no request uses from all memory: its files are read again."""
        self.scheduler.discard_adapter(digest)
        self._set_absent(self.host.discard(digest))

    def _release(self, request: Request) -> None:
        """Let go of the adapter and the grammar of a request that has ended."""
        if request.sampling.grammar is not None and self.grammars is not None:
            self.grammars.release(request.sampling.grammar)
        if request.adapter_digest:
            self._set_absent(self.host.release(request.adapter_digest))


def _load_error(loaded: Loaded) -> RequestError:
    if isinstance(loaded.error, AdapterUnreadable):
        text = f"The files of adapter {loaded.digest} cannot be read."
        return RequestError(ErrorKind.ADAPTER_DAMAGED, text)
    if isinstance(loaded.error, AdapterLoadError):
        return RequestError(ErrorKind.ADAPTER_INVALID, str(loaded.error))
    return RequestError(ErrorKind.ENGINE_ERROR, str(loaded.error))
