"""DeviceRunner: a Runner whose device computes a step while the host prepares the next.

`launch` gives the device everything at once: what moves in memory, the forward pass, the sampling
and the copy of the results to the host. It never waits for any of that; `result` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.backends.cuda.adapter_copies import AdapterCopies
from engine.backends.cuda.draw import Draw, draw
from engine.backends.cuda.forward import DeviceForward, ForwardOutput
from engine.backends.cuda.inputs import RequestKey, request_key
from engine.backends.cuda.packed_copies import Arrival, Download, Upload
from engine.backends.cuda.sampler import DeviceSampler, Sampled, read_scores, scored
from engine.backends.cuda.streams import Device
from engine.backends.rows import wanted_rows
from engine.backends.sync_runner import LOGITS_ROWS, FinishedStep, RowOutput, StepHandle
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
        self._sampled: dict[RequestKey, int] = {}  # places of what the last step sampled

    def launch(self, batch: ScheduledBatch) -> StepHandle:
        """Raises torch.OutOfMemoryError where this step alone found too little memory."""
        try:
            with torch.inference_mode():
                return self._launch(batch)
        except torch.OutOfMemoryError as error:
            text = str(error)
        # Only here, behind its handler, does the error no longer keep the step's tensors alive
        self._device.release_cached()
        raise torch.OutOfMemoryError(text)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compiles the kernels of eager steps and of sampling, before the first real step."""
        logits = self._forward.logits(self._forward.warm_up())
        request = ScheduledRequest("", 0, [0], 0, (), 0, _ALL_FILTERS, samples=True)
        token_ids = torch.zeros(1, dtype=torch.int32, device=logits.device)
        self._sampler.sample([request], logits, token_ids)
        self._device.synchronize()

    def arrived(self) -> Sequence[str]:
        return self._adapters.arrived()

    def _launch(self, batch: ScheduledBatch) -> StepHandle:
        before, self._sampled = self._sampled, {}
        self._adapters.apply(batch)
        requests = batch.requests
        if not requests:
            return FinishedStep([])
        rows, spans = wanted_rows(requests)
        chosen = [i for i, r in enumerate(requests) if r.samples]
        sample_rows = [spans[i][1] - 1 for i in chosen]
        output = self._forward.hidden(requests, rows, sample_rows, before)
        sampled = self._sample([requests[i] for i in chosen], sample_rows, output)
        prompts = self._score_prompts(requests, spans, output.hidden)
        self._sampled = {request_key(requests[i]): place for place, i in enumerate(chosen)}
        tensors = [sampled.tokens, sampled.is_finite, sampled.scores, *prompts]
        return _Launched(batch, self._download.send(tensors))

    def _sample(
        self, requests: list[ScheduledRequest], rows: list[int], output: ForwardOutput
    ) -> Sampled:
        """Of these hidden states, one for each request; leaves the tokens for the next step."""
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
        sampled = self._sampler.sample(requests, self._forward.logits(hidden), last_inputs)
        self._forward.sampled[: len(rows)].copy_(sampled.tokens)
        return sampled

    def _score_prompts(
        self,
        requests: Sequence[ScheduledRequest],
        spans: list[tuple[int, int]],
        hidden: Tensor,
    ) -> list[Tensor]:
        """`scored` of each request that has prompt targets."""
        asking = [(r, start) for r, (start, _) in zip(requests, spans, strict=True)]
        asking = [(r, start) for r, start in asking if r.prompt_targets]
        if not asking:
            return []
        targets = self._targets.send([np.array(r.prompt_targets, np.int32) for r, _ in asking])
        return [
            self._score(hidden[start : start + len(t)], t, r.sampling.prompt_logprobs or 0)
            for (r, start), t in zip(asking, targets, strict=True)
        ]

    def _score(self, hidden: Tensor, targets: Tensor, num_top: int) -> Tensor:
        parts = zip(hidden.split(LOGITS_ROWS), targets.split(LOGITS_ROWS), strict=True)
        return torch.cat([scored(self._forward.logits(h), t, num_top) for h, t in parts])


_ALL_FILTERS = SamplingParams(top_k=1, top_p=0.5, min_p=0.1)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A StepHandle."""

    batch: ScheduledBatch
    arrival: Arrival

    def result(self) -> list[RowOutput]:
        tokens, is_finite, scores, *prompts = self.arrival.read()
        outputs = [RowOutput() for _ in self.batch.requests]
        chosen = [i for i, r in enumerate(self.batch.requests) if r.samples]
        for i, token_id, fine in zip(chosen, tokens.tolist(), is_finite.tolist(), strict=True):
            if fine:
                outputs[i].token_ids = [token_id]
            else:
                outputs[i].error = "the model gave logits that are not finite"
        self._add_logprobs(outputs, scores)
        self._add_prompt_logprobs(outputs, prompts)
        return outputs

    def _add_logprobs(self, outputs: list[RowOutput], scores: Tensor) -> None:
        asked = [
            (output, r.sampling.logprobs)
            for output, r in zip(outputs, self.batch.requests, strict=True)
            if r.samples and r.sampling.logprobs is not None
        ]
        entries = read_scores(scores, [count for _, count in asked])
        for (output, _), entry in zip(asked, entries, strict=True):
            if output.error is None:
                output.logprobs = [entry]

    def _add_prompt_logprobs(self, outputs: list[RowOutput], prompts: list[Tensor]) -> None:
        asked = [
            (output, r)
            for output, r in zip(outputs, self.batch.requests, strict=True)
            if r.prompt_targets
        ]
        for (output, request), scores in zip(asked, prompts, strict=True):
            num_top = request.sampling.prompt_logprobs or 0
            entries: list[TokenLogprobs] = read_scores(scores, [num_top] * len(scores))
            output.prompt_logprobs = entries
