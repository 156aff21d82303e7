"""DeviceRunner: a Runner whose device computes one step while the host prepares the next.

`launch` queues everything at once: memory moves, the forward pass, the sampling and the copy of the
results to the host. It never waits for any of that; `result` does. Once the forward pass is queued,
it waits for the masks of grammars, which the host computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.backends.cuda.adapter_copies import AdapterCopies
from engine.backends.cuda.draw import Draw, draw
from engine.backends.cuda.forward import DeviceForward, ForwardOutput
from engine.backends.cuda.head import WIDTH_STEP
from engine.backends.cuda.inputs import RequestKey, request_key
from engine.backends.cuda.packed_copies import Arrival, Download, Upload
from engine.backends.cuda.sampler import DeviceSampler, Sampled, read_scores, scored
from engine.backends.cuda.streams import Device
from engine.backends.row_outputs import row_outputs
from engine.backends.rows import LOGITS_ROWS, pooled_sum, wanted_rows
from engine.backends.runner import (
    FinishedStep,
    RowOutput,
    StepHandle,
    TokenMask,
    TokenMasks,
)
from engine.backends.sampler import target_ranks
from engine.messages import TokenLogprobs
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.request import SamplingParams


class DeviceRunner:
    pipeline_depth = 1
    loads_are_immediate = False

    def __init__(
        self,
        device: Device,
        forward: DeviceForward,
        adapters: AdapterCopies,
        draw: Draw = draw,
    ) -> None:
        self._device = device
        self._forward = forward
        self._adapters = adapters
        self._sampler = DeviceSampler(device, draw)
        self._targets = Upload(device)
        self._download = Download(device)
        self._sampled: dict[RequestKey, int] = {}  # indexes of the last step's tokens

    def launch(self, batch: ScheduledBatch, masks: TokenMasks | None = None) -> StepHandle:
        """Start the step. Raises torch.OutOfMemoryError if only this step ran out of memory."""
        try:
            with torch.inference_mode():
                return self._launch(batch, masks)
        except torch.OutOfMemoryError as error:
            text = str(error)
        # Only here, after its handler, the error no longer keeps the step's tensors alive
        self._device.release_cached()
        raise torch.OutOfMemoryError(text)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels of eager steps and of sampling, before the first real step."""
        logits = self._forward.logits(self._forward.warm_up(), [0])
        request = ScheduledRequest("", 0, [0], 0, (), 0, _ALL_FILTERS, samples=True)
        token_ids = torch.zeros(1, dtype=torch.int32, device=logits.device)
        wide = -(-logits.shape[1] // WIDTH_STEP) * WIDTH_STEP
        for width in {logits.shape[1], wide}:
            self._sampler.sample([request], logits.new_zeros(1, width), token_ids)
        self._device.synchronize()

    def arrived(self) -> Sequence[str]:
        return self._adapters.arrived()

    def _launch(self, batch: ScheduledBatch, masks: TokenMasks | None) -> StepHandle:
        before, self._sampled = self._sampled, {}
        self._adapters.apply(batch)
        requests = batch.requests
        if not requests:
            return FinishedStep([])
        rows, spans = wanted_rows(requests)
        chosen = [i for i, r in enumerate(requests) if r.samples]
        sample_rows = [spans[i][1] - 1 for i in chosen]
        output = self._forward.hidden(requests, rows, sample_rows, before)
        allowed = None if masks is None else masks.wait()  # the device computes meanwhile
        if allowed:
            allowed = {at: allowed[i][0] for at, i in enumerate(chosen) if i in allowed}
        sampled = self._sample([requests[i] for i in chosen], sample_rows, output, allowed)
        prompts = self._score_prompts(requests, spans, output.hidden)
        self._sampled = {request_key(requests[i]): place for place, i in enumerate(chosen)}
        pooled = [  # words, as all that is downloaded
            pooled_sum(output.hidden[start:end]).view(torch.int32)
            for r, (start, end) in zip(requests, spans, strict=True)
            if r.pooled
        ]
        tensors = [sampled.tokens, sampled.is_finite, sampled.scores, *prompts, *pooled]
        return _Launched(batch, self._download.send(tensors))

    def _sample(
        self,
        requests: list[ScheduledRequest],
        rows: list[int],
        output: ForwardOutput,
        allowed: Mapping[int, TokenMask] | None,
    ) -> Sampled:
        """Sample a token for each request from its row; keep the tokens for the next step."""
        inputs, hidden = output.inputs, output.hidden
        if not requests:
            none = inputs.token_ids[:0]
            return Sampled(none, none, none.view(0, 1))
        places = inputs.sample_rows[: len(rows)]
        if rows != list(range(len(hidden))):
            hidden = hidden.index_select(0, places)
        last_inputs = inputs.token_ids
        if any(r.history is not None for r in requests):
            last_inputs = last_inputs.index_select(0, inputs.output_rows.index_select(0, places))
        logits = self._forward.logits(hidden, [r.adapter_slot for r in requests])
        sampled = self._sampler.sample(requests, logits, last_inputs, allowed)
        self._forward.sampled[: len(rows)].copy_(sampled.tokens)
        return sampled

    def _score_prompts(
        self,
        requests: Sequence[ScheduledRequest],
        spans: list[tuple[int, int]],
        hidden: Tensor,
    ) -> list[Tensor]:
        """Compute `scored` of each request that has prompt targets."""
        asking = [(r, start) for r, (start, _) in zip(requests, spans, strict=True)]
        asking = [(r, start) for r, start in asking if r.prompt_targets]
        if not asking:
            return []
        targets = self._targets.send([np.array(r.prompt_targets, np.int32) for r, _ in asking])
        return [
            self._score(hidden[start : start + len(t)], t, r)
            for (r, start), t in zip(asking, targets, strict=True)
        ]

    def _score(self, hidden: Tensor, targets: Tensor, request: ScheduledRequest) -> Tensor:
        """Return each target's rank, then `scored`."""
        parts: list[Tensor] = []
        num_top = request.sampling.prompt_logprobs or 0
        slots = request.row_slots
        for i in range(0, len(targets), LOGITS_ROWS):
            t = targets[i : i + LOGITS_ROWS]
            end = i + len(t)
            logits = self._forward.logits(hidden[i:end], slots[i:end])
            ranks = target_ranks(logits, t).int()[:, None]
            parts.append(torch.cat([ranks, scored(logits, t, num_top)], 1))
        return torch.cat(parts)


_ALL_FILTERS = SamplingParams(top_k=1, top_p=0.5, min_p=0.1)


@dataclass(frozen=True, slots=True)
class _Launched:
    """The StepHandle of a launched step."""

    batch: ScheduledBatch
    arrival: Arrival

    def result(self) -> list[RowOutput]:
        tokens, is_finite, scores, *more = self.arrival.read()
        requests = self.batch.requests
        scored = [r for r in requests if r.prompt_targets]
        prompts, pooled = more[: len(scored)], more[len(scored) :]
        found = zip(tokens.tolist(), is_finite.tolist(), strict=True)
        return row_outputs(
            requests,
            [[token_id if fine else None] for token_id, fine in found],
            _logprobs([r.sampling.logprobs for r in requests if r.samples], scores),
            _prompt_logprobs(scored, prompts),
            [words.numpy().view(np.float64) for words in pooled],
        )


def _logprobs(asked: list[int | None], scores: Tensor) -> list[list[TokenLogprobs | None]]:
    """Make an entry per sampling request: `asked` alternatives each, None for no logprobs."""
    entries = iter(read_scores(scores, [count for count in asked if count is not None]))
    return [[None if count is None else next(entries)] for count in asked]


def _prompt_logprobs(
    requests: list[ScheduledRequest], prompts: list[Tensor]
) -> list[list[TokenLogprobs]]:
    entries: list[list[TokenLogprobs]] = []
    for request, scores in zip(requests, prompts, strict=True):
        ranks: list[int] = scores[:, 0].tolist()
        found = read_scores(scores[:, 1:], [request.sampling.prompt_logprobs or 0] * len(scores))
        entries.append([replace(e, rank=rank) for e, rank in zip(found, ranks, strict=True)])
    return entries
