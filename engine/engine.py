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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.announcer import SILENT, Announcer
from engine.backends.load import load_model
from engine.backends.needs import arena_bytes
from engine.backends.runner import FailedStep, RowOutput, Runner, StepHandle, check_device
from engine.config import EngineConfig
from engine.generation_config import (
    read_eos_token_ids,
    read_named_eos_token_ids,
    read_sampling_defaults,
)
from engine.grammar.grammars import Grammars, refusal_of_model
from engine.grammar.link import Tokens
from engine.grammar.masks import StepMasks
from engine.lora.host_cache import HostAdapter, HostCache, Loaded
from engine.lora.kinds import check_kinds
from engine.lora.load import load_lora
from engine.lora.weights import AdapterLoadError, AdapterUnreadable, LoraWeights
from engine.messages import (
    AdapterFolder,
    EngineInfo,
    EngineStats,
    ErrorKind,
    GenerateRequest,
    RequestError,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from engine.model.base_weights import BaseWeights
from engine.proof.probe import is_probe
from engine.proof.proofs import Proofs
from engine.proof.verdict import Proof
from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.memory import MemoryBudget
from engine.scheduler.request import (
    NO_DEFAULTS,
    CacheScope,
    FinishReason,
    InvalidRequest,
    Request,
    SamplingDefaults,
)
from engine.scheduler.scheduler import Progress, Scheduler
from engine.settle import settle
from engine.step_sizes import StepSizes
from engine.validate import validate

log = logging.getLogger(__name__)


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
        self.config = config
        self.settled = settle(config, arena_bytes)
        self._clock = clock
        self._announcer = announcer
        self._step_sizes = StepSizes()
        self.grammars = self._open_grammars(wake)
        self.model = load_model(config, self.settled, announcer=announcer)
        self.info = self._describe()
        self.proofs = self._make_proofs()
        self.host = HostCache(config.host_adapter_bytes, self._load_adapter, wake)
        self.runner: Runner = self.model.make_runner(self.host.get)
        self.scheduler = self._make_scheduler()
        self.is_idle = True  # the last step found nothing to run or to wait for
        self._in_flight: deque[_InFlight] = deque()  # oldest first
        # Invocation tokens of aLoRAs that are being loaded, written by the host cache's threads
        self._invocations: dict[str, tuple[int, ...]] = {}
        self._failed_loads: set[str] = set()  # digests whose last load was in a step that failed
        self._outputs: list[RequestOutput] = []  # in chronological order
        self._prompt_logprobs: dict[tuple[str, int], dict[int, TokenLogprobs]] = {}
        self._pooled: dict[tuple[str, int], NDArray[np.float64]] = {}  # sums over earlier chunks
        self._num_steps = self._num_prompt = self._num_cached = self._num_outputs = 0
        self._step_s = self._last_update_s = 0.0

    def _open_grammars(self, wake: Callable[[], None]) -> Grammars | None:
        """Start to build the tokenizer's table, in another process, while the model is loaded."""
        if self._grammar_refusal():
            return None
        path, vocab_size = Path(self.config.source) / "tokenizer.json", self.settled.spec.vocab_size
        tokens = Tokens(str(path), vocab_size, self._eos_token_ids())
        return Grammars(tokens, self.config.max_num_seqs, wake)

    def _grammar_refusal(self) -> str:
        is_wanted = self.config.structured_output == "auto"
        return refusal_of_model(Path(self.config.source), is_wanted, self._eos_token_ids())

    def _eos_token_ids(self) -> tuple[int, ...]:
        return self._within_vocabulary(read_eos_token_ids)

    def _within_vocabulary(self, read: Callable[[Path], tuple[int, ...]]) -> tuple[int, ...]:
        vocab = range(self.settled.spec.vocab_size)
        return tuple(i for i in read(Path(self.config.source)) if i in vocab)

    def _describe(self) -> EngineInfo:
        s = self.settled
        return EngineInfo(
            max_model_len=s.max_model_len,
            vocab_size=s.spec.vocab_size,
            num_blocks=s.num_blocks,
            block_size=self.config.block_size,
            eos_token_ids=self._eos_token_ids(),
            named_eos_token_ids=self._within_vocabulary(read_named_eos_token_ids),
            device=str(s.device),
            dtype=str(s.dtype).removeprefix("torch."),
            weight_bytes=self.model.weight_bytes,
            hidden_size=s.spec.hidden_size,
            kernels=self.model.kernels,
            sampling_defaults=self._sampling_defaults(),
            grammar_refusal=self._grammar_refusal(),
        )

    def _sampling_defaults(self) -> SamplingDefaults:
        if self.config.generation_config == "none":
            return NO_DEFAULTS
        return read_sampling_defaults(Path(self.config.source))

    def _make_proofs(self) -> Proofs | None:
        if self.config.adapter_proof == "off":
            return None
        s = self.settled
        return Proofs(self.model.decoder, s.dtype, s.max_model_len, self._clock)

    def _make_scheduler(self) -> Scheduler:
        s, seqs = self.settled, self.config.max_num_seqs
        limits = SchedulerLimits(
            seqs, s.max_num_batched_tokens, s.max_model_len, self.info.eos_token_ids
        )
        depth = self.runner.pipeline_depth
        return Scheduler(limits, self._memory_budget(), pipeline_depth=depth)

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
                index=i,
                output_token_ids=list(request.output_token_ids),
                num_resumed_tokens=len(request.output_token_ids),
            )
            for i in range(request.n)
        ]
        first.forks = forks
        self.scheduler.add(first)
        self._want_grammar(first)
        if adapter_folder:
            for _ in range(request.n):
                self.host.want(adapter_folder)
            if self.proofs is not None and not is_probe(request.request_id):
                self._await_proof(self.proofs, first, adapter_folder)

    def _want_grammar(self, first: Request) -> None:
        grammar, choices = first.sampling.grammar, [first, *first.forks]
        if grammar is None or self.grammars is None:
            return
        is_ready = self.grammars.want(first.scope.tenant, grammar, len(choices))
        for choice in choices:
            choice.awaits_grammar = not is_ready

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End one choice of the request, or all; their blocks are free on return.

        Unknown requests have already ended and are ignored.
        """
        self._end(self.scheduler.abort(request_id, index), None)

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

    def _launch(self) -> int:
        """Start the next step if there is one; returns how many may now stay in flight."""
        start = self._clock()
        batch = self.scheduler.schedule(start)
        if batch is None:
            return 0
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
            self._end(ended, RequestError(ErrorKind.ENGINE_ERROR, text))
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

    @property
    def stats(self) -> EngineStats:
        s, blocks = self.scheduler, self.scheduler.blocks
        return EngineStats(
            num_running=len(s.running),
            num_waiting=s.num_waiting,
            num_blocks_used=blocks.num_held,
            num_blocks_cached=blocks.num_cached,
            num_blocks_total=s.memory.num_reachable_blocks,
            queued_tokens=s.queued_tokens,
            resident_adapters=s.adapters.resident,
            total_steps=self._num_steps,
            total_prompt_tokens=self._num_prompt,
            total_cached_tokens=self._num_cached,
            total_output_tokens=self._num_outputs,
            total_preemptions=s.num_preemptions,
            total_step_s=self._step_s,
        )

    def close(self) -> None:
        self.host.close()
        if self.grammars is not None:
            self.grammars.close()

    # ==== results of a step ====

    def _update(self, batch: ScheduledBatch, rows: list[RowOutput], start: float) -> None:
        by_key: dict[tuple[str, int], RowOutput] = {}
        for scheduled, row in zip(batch.requests, rows, strict=True):
            request = self.scheduler.owner(scheduled)
            if request is None:
                continue  # it has ended or was preempted since
            by_key[request.key] = row
            if row.prompt_logprobs:
                known = self._prompt_logprobs.setdefault(request.key, {})
                known.update(enumerate(row.prompt_logprobs, scheduled.start + 1))
            if row.pooled is not None:
                self._add_pooled(request, scheduled, row.pooled)
            if row.error is not None:
                ended = self.scheduler.end_with_error(scheduled)
                self._end(ended, RequestError(ErrorKind.ENGINE_ERROR, row.error))
        now = self._clock()
        progress = self.scheduler.update(batch, [row.token_ids for row in rows])
        self._num_steps += 1
        self._step_s += now - max(start, self._last_update_s)  # steps in flight overlap
        self._last_update_s = now
        self._outputs += [self._output(p, by_key[p.request.key], now) for p in progress]

    def _output(self, progress: Progress, row: RowOutput, now: float) -> RequestOutput:
        request, count = progress.request, len(progress.token_ids)
        is_counted = not is_probe(request.request_id)
        self._num_outputs += count * is_counted
        output = RequestOutput(
            request.request_id,
            request.index,
            progress.token_ids,
            logprobs=None if row.logprobs is None else row.logprobs[:count],
            prompt_logprobs=self._take_prompt_logprobs(request),
            finish_reason=request.finish_reason.value if request.finish_reason else None,
            stop_token_id=progress.stop_token_id,
            metrics=_metrics(request, now) if _has_metrics(request, count) else None,
            embedding=self._take_embedding(request),
        )
        if request.finish_reason:
            if request.index == 0 and is_counted:  # the choices share one prompt
                self._num_prompt += request.num_prompt_tokens
                self._num_cached += request.num_cached_tokens or 0
            self._release(request)
        return output

    def _take_prompt_logprobs(self, request: Request) -> list[TokenLogprobs | None] | None:
        known = self._prompt_logprobs.pop(request.key, None)
        if known is None:
            return None
        return [None, *(known[i] for i in range(1, request.num_prompt_tokens))]

    def _add_pooled(
        self, request: Request, scheduled: ScheduledRequest, pooled: NDArray[np.float64]
    ) -> None:
        """Add a chunk's sum. One at position 0 begins anew: the request may have been preempted."""
        before = self._pooled.get(request.key) if scheduled.start else None
        self._pooled[request.key] = pooled if before is None else before + pooled

    def _take_embedding(self, request: Request) -> bytes | None:
        pooled = self._pooled.pop(request.key, None)
        if pooled is None:
            return None
        if request.sampling.pooling == "mean":
            pooled = pooled / request.num_prompt_tokens
        return pooled.astype("<f4").tobytes()

    def _end(self, requests: Iterable[Request], error: RequestError | None) -> None:
        """Release what dropped requests hold outside the scheduler, and report their end."""
        reason = FinishReason.ERROR if error else FinishReason.ABORT
        now = self._clock()
        for request in requests:
            self._prompt_logprobs.pop(request.key, None)
            self._pooled.pop(request.key, None)
            self._release(request)
            self._outputs.append(
                RequestOutput(
                    request.request_id,
                    request.index,
                    [],
                    finish_reason=reason.value,
                    error=error,
                    metrics=_metrics(request, now),
                )
            )

    # ==== grammars ====

    def _poll_grammars(self, grammars: Grammars) -> None:
        for grammar, error in grammars.poll():
            if error is None:
                self.scheduler.set_grammar_ready(grammar)
            else:
                self._end(self.scheduler.end_grammar_with_error(grammar), error)

    def _begin_masks(self, batch: ScheduledBatch) -> StepMasks:
        assert self.grammars is not None
        owners = [(i, self.scheduler.owner(batch.requests[i])) for i in batch.grammar_rows]
        rows = [(i, request) for i, request in owners if request is not None]
        return self.grammars.begin(rows, self.scheduler.running)

    def _end_unmasked(self, batch: ScheduledBatch, masks: StepMasks) -> None:
        """End requests whose token was sampled without the mask that it needs."""
        for index, error in masks.errors.items():
            self._end(self.scheduler.end_with_error(batch.requests[index]), error)

    # ==== adapters ====

    def _open_base(self) -> BaseWeights:
        config = self.config
        return BaseWeights(Path(config.source), config.quantization, self.settled.dtype)

    def _load_adapter(self, adapter_folder: AdapterFolder) -> HostAdapter:
        """Load and pack an adapter; called in the host cache's threads."""
        s = self.settled
        weights = load_lora(adapter_folder, self.model.lora_sites, s.dtype, self._open_base)
        check_kinds(weights, s.spec.vocab_size, self.model.kinds, self.model.kernels)
        self._check_token_ids(weights, adapter_folder)
        packed = self.model.pack_adapter(weights)
        most, name = self.config.adapter_memory_bytes, "adapter_memory_bytes"
        if most is None:
            most, name = s.memory_bytes, "memory_bytes"
        if packed.nbytes > most:
            raise AdapterLoadError(
                f"adapter {adapter_folder.digest} needs {packed.nbytes} bytes on the device; "
                f"{name} is {most}"
            )
        if weights.invocation_token_ids:
            self._invocations[weights.digest] = weights.invocation_token_ids
        if self.proofs is not None:
            self.proofs.keep(adapter_folder, weights)
        return packed

    def _check_token_ids(self, weights: LoraWeights, adapter_folder: AdapterFolder) -> None:
        """Check that the adapter has the token ids of its requests, and those that invoke it."""
        vocab_size = max(self.info.vocab_size, weights.vocab_size)
        if adapter_folder.vocab_size > vocab_size:
            raise AdapterLoadError(
                f"adapter {adapter_folder.digest} should have {adapter_folder.vocab_size} token "
                f"ids, and its files have {vocab_size}"
            )
        for token_id in weights.invocation_token_ids:
            if token_id >= vocab_size:
                raise AdapterLoadError(
                    f"alora_invocation_tokens: token id {token_id} is outside the vocabulary "
                    f"[0, {vocab_size - 1}], so the adapter could never act"
                )

    def _poll_adapters(self) -> None:
        for digest in self.runner.arrived():
            self.scheduler.adapters.set_resident(digest)
        for loaded in self.host.poll():
            if loaded.weights is not None:
                self._set_ready(loaded.digest, loaded.weights.nbytes)
                continue
            log.error("adapter %s cannot be used: %s", loaded.digest, loaded.error)
            error = _load_error(loaded)
            if error.kind == ErrorKind.ENGINE_ERROR:
                check_device(self.settled.device)  # its driver pins host memory for packing
            self._end(self.scheduler.end_adapter_with_error(loaded.digest), error)
        self._set_absent(self.host.advance(self.scheduler.adapters.is_in_use))

    def _set_ready(self, digest: str, nbytes: int) -> None:
        invocation = self._invocations.pop(digest, ())
        self.scheduler.adapters.set_ready(digest, nbytes, invocation)
        for request in self.scheduler.end_too_large(digest):
            text = self.scheduler.refusal(request)
            self._end([request], RequestError(ErrorKind.INVALID_REQUEST, text))
        if self.proofs is not None:
            self._probe(self.proofs, digest)

    def _set_absent(self, digests: list[str]) -> None:
        for digest in digests:
            self.scheduler.adapters.set_absent(digest)
        if self.proofs is not None and digests:
            self.proofs.forget(digests)

    def _release(self, request: Request) -> None:
        """Let go of the adapter and the grammar of a request that has ended."""
        if request.sampling.grammar is not None and self.grammars is not None:
            self.grammars.release(request.sampling.grammar)
        if request.adapter_digest:
            self._set_absent(self.host.release(request.adapter_digest))

    # ==== proofs ====

    def _await_proof(self, proofs: Proofs, first: Request, adapter_folder: AdapterFolder) -> None:
        digest = adapter_folder.digest
        if refusal := proofs.refusal(digest):
            self._refuse_adapter(digest, refusal)
        elif proofs.find(digest) is None:
            for choice in [first, *first.forks]:
                choice.awaits_proof = True
            self._probe(proofs, digest)

    def _probe(self, proofs: Proofs, digest: str) -> None:
        """Start the proof of an adapter that is loaded, unless it has been."""
        self._add_probes(proofs, proofs.start(digest))

    def _add_probes(self, proofs: Proofs, probes: list[GenerateRequest]) -> None:
        for probe in probes:
            try:
                self.add_request(probe)
            except InvalidRequest as error:  # memory that small holds no prompt of a client either
                digest = proofs.give_up(probe.request_id)
                log.warning("adapter %s is served without proof: %s", digest, error)
                self.scheduler.set_adapter_proven(digest)

    def _advance_proofs(self, proofs: Proofs, outputs: list[RequestOutput]) -> list[RequestOutput]:
        """Take what belongs to probes from the outputs, and compute a part of what they await."""
        taken = proofs.take(outputs)
        for probe in taken.broken:
            self._end(self.scheduler.end_adapter_with_error(probe.digest), probe.error)
        self._add_probes(proofs, taken.again)
        while proofs.has_work:
            self.is_idle = False
            proof = proofs.advance()
            if proof is not None:
                self._conclude(proof)
            if self.scheduler.running:
                break
        self.is_idle = self.is_idle and not taken.again
        ended, self._outputs = self._outputs, []
        return taken.outputs + [output for output in ended if not is_probe(output.request_id)]

    def _conclude(self, proof: Proof) -> None:
        if proof.failure:
            log.error("%s", proof.failure)
            self._refuse_adapter(proof.digest, proof.failure)
            self.scheduler.discard_adapter(proof.digest)
            self._set_absent(self.host.discard(proof.digest))
            return
        if proof.warning:
            log.warning("%s", proof.warning)
        self.scheduler.set_adapter_proven(proof.digest)

    def _refuse_adapter(self, digest: str, reason: str) -> None:
        error = RequestError(ErrorKind.ADAPTER_INVALID, reason)
        self._end(self.scheduler.end_adapter_with_error(digest), error)


def _has_metrics(request: Request, num_new: int) -> bool:
    """Check if an output needs metrics: the last one, and the first, in case the rest comes from
    another replica."""
    is_first = len(request.output_token_ids) - request.num_resumed_tokens == num_new
    return request.finish_reason is not None or (request.index == 0 and is_first)


def _load_error(loaded: Loaded) -> RequestError:
    if isinstance(loaded.error, AdapterUnreadable):
        text = f"The files of adapter {loaded.digest} cannot be read."
        return RequestError(ErrorKind.ADAPTER_DAMAGED, text)
    if isinstance(loaded.error, AdapterLoadError):
        return RequestError(ErrorKind.ADAPTER_INVALID, str(loaded.error))
    return RequestError(ErrorKind.ENGINE_ERROR, str(loaded.error))


def _metrics(request: Request, now: float) -> RequestMetrics:
    scheduled_s = now if request.first_scheduled_s is None else request.first_scheduled_s
    return RequestMetrics(
        scheduled_s - request.arrival_s,
        request.num_prompt_tokens,
        request.num_cached_tokens or 0,
        len(request.output_token_ids) - request.num_resumed_tokens,
    )
