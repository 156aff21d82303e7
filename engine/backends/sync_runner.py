"""What executes ScheduledBatches: the Runner protocol, and the ModelRunner, which computes at once.

    launch(batch) -> StepHandle                     starts the step
    handle.result() -> one RowOutput per request    waits for it

A runner decides nothing: what is computed is the batch's business, how is the ForwardPass's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.backends.rows import wanted_rows
from engine.backends.sampler import NotFinite, Picker, SampledToken, sample, target_logprobs
from engine.lora.weights import LoraWeights
from engine.messages import TokenLogprobs
from engine.scheduler.batch import AdapterLoad, Move, ScheduledBatch, ScheduledRequest

LOGITS_ROWS = 32  # rows of [*, V] logits that are in memory at once for prompt logprobs


class ForwardPass(Protocol):
    """The model with its KV cache and adapters, on one device and in one implementation."""

    def load_adapter(self, load: AdapterLoad, weights: LoraWeights) -> None: ...

    def evict_adapter(self, slot: int) -> None: ...

    def move(self, moves: Sequence[Move]) -> None:
        """KV blocks and adapters, one after the other."""
        ...

    def hidden(self, batch: ScheduledBatch, output_rows: list[int]) -> Tensor:
        """Computes all rows, writing their KV; returns the chosen rows' hidden states [M, E],
        which stay valid until the next call."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, E] -> [M, V] in float32."""
        ...

    @property
    def picker(self) -> Picker:
        """What chooses tokens from the logits."""
        ...


@dataclass(slots=True)
class RowOutput:
    """What one request got out of a step. `error` excludes everything else."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    error: str | None = None


class StepHandle(Protocol):
    """A step that was launched."""

    def result(self) -> list[RowOutput]:
        """One output per request of the batch, in its order; waits until they are there.

        Called once, in the order of the launches. Raises what the step raised.
        """
        ...


class Runner(Protocol):
    """Executes batches one after the other, in the order of their launches."""

    @property
    def pipeline_depth(self) -> int:
        """How many steps may be launched before the result of the one before them is taken.

        At 1, a row may hold PENDING: the token that the step before sampled for the same request
        and life. After a step that raised, rows that hold a PENDING of that step may give
        anything: nobody reads them.
        """
        ...

    @property
    def loads_are_immediate(self) -> bool:
        """Whether a step's adapters are in place before it is computed; else see `arrived`."""
        ...

    def launch(self, batch: ScheduledBatch) -> StepHandle:
        """Start the step. What it raises has happened to this batch alone."""
        ...

    def arrived(self) -> Sequence[str]:
        """Digests of adapters that came to be usable on the device since the last call."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    outputs: list[RowOutput]

    def result(self) -> list[RowOutput]:
        return self.outputs


@dataclass(frozen=True, slots=True)
class FailedStep:
    """A step that raised before it was under way."""

    error: Exception

    def result(self) -> list[RowOutput]:
        raise self.error


class ModelRunner:
    """A Runner without any asynchrony: `launch` returns when the step is done."""

    pipeline_depth = 0
    loads_are_immediate = True

    def __init__(self, model: ForwardPass, host_weights: Callable[[str], LoraWeights]) -> None:
        self.model = model
        self._host_weights = host_weights

    def launch(self, batch: ScheduledBatch) -> FinishedStep:
        return FinishedStep(self.execute(batch))

    def arrived(self) -> tuple[str, ...]:
        return ()  # `launch` loads adapters itself

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> list[RowOutput]:
        """One output per request of the batch, in its order."""
        self._move(batch)
        if not batch.requests:
            return []
        rows, spans = wanted_rows(batch.requests)
        hidden = self.model.hidden(batch, rows)
        outputs = [RowOutput() for _ in batch.requests]
        self._sample(batch, hidden, spans, outputs)
        for request, (start, end), output in zip(batch.requests, spans, outputs, strict=True):
            if request.prompt_targets:
                targets = hidden[start:end][: len(request.prompt_targets)]
                output.prompt_logprobs = self._prompt_logprobs(request, targets)
        return outputs

    def _move(self, batch: ScheduledBatch) -> None:
        for slot in batch.adapter_evictions:
            self.model.evict_adapter(slot)
        self.model.move(batch.moves)
        for load in batch.adapter_loads:
            self.model.load_adapter(load, self._host_weights(load.digest))

    def _sample(
        self,
        batch: ScheduledBatch,
        hidden: Tensor,
        spans: list[tuple[int, int]],
        outputs: list[RowOutput],
    ) -> None:
        chosen = [i for i, r in enumerate(batch.requests) if r.samples]
        if not chosen:
            return
        last = [spans[i][1] - 1 for i in chosen]
        rows = hidden if last == list(range(len(hidden))) else hidden[torch.tensor(last)]
        requests = [batch.requests[i] for i in chosen]
        results = sample(requests, self.model.logits(rows), self.model.picker)
        for i, request, result in zip(chosen, requests, results, strict=True):
            if isinstance(result, NotFinite):
                outputs[i].error = "the model gave logits that are not finite"
                continue
            outputs[i].token_ids = [result.token_id]
            if request.sampling.logprobs is not None:
                outputs[i].logprobs = [_token_logprobs(result)]

    def _prompt_logprobs(self, request: ScheduledRequest, hidden: Tensor) -> list[TokenLogprobs]:
        targets, num_top = request.prompt_targets or [], request.sampling.prompt_logprobs or 0
        entries: list[TokenLogprobs] = []
        for i in range(0, len(targets), LOGITS_ROWS):
            logits = self.model.logits(hidden[i : i + LOGITS_ROWS])
            picked = target_logprobs(logits, targets[i : i + LOGITS_ROWS], num_top)
            entries += [TokenLogprobs(logprob, top) for logprob, top in picked]
        return entries


def _token_logprobs(token: SampledToken) -> TokenLogprobs:
    assert token.logprob is not None
    return TokenLogprobs(token.logprob, token.top)
