"""ModelRunner: executes a ScheduledBatch on one device.

    execute(batch) -> StepOutput     moves adapters and blocks, forward, sample

Owns the weights, the KV tensor and the adapters on the device; decides nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.lora.bank import AdapterBank
from engine.lora.weights import LoraWeights
from engine.messages import TokenLogprobs
from engine.model.decoder import Decoder
from engine.runner.inputs import build_inputs
from engine.runner.kv_cache import copy_blocks
from engine.runner.sampler import NotFinite, SampledToken, sample, target_logprobs
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest

LOGITS_ROWS = 128  # rows of [*, V] logits that are in memory at once for prompt logprobs


@dataclass(slots=True)
class RowOutput:
    """What one request got out of a step. `error` excludes everything else."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    error: str | None = None


class ModelRunner:
    def __init__(
        self,
        decoder: Decoder,
        kv_cache: torch.Tensor,
        block_size: int,
        host_weights: Callable[[str], LoraWeights],
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.block_size = block_size
        self.device = kv_cache.device
        self.bank = AdapterBank(self.device)
        self._host_weights = host_weights

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> list[RowOutput]:
        """One output per request of the batch, in its order."""
        self._move(batch)
        if not batch.requests:
            return []
        inputs = build_inputs(batch, self.block_size, self.device, self.bank.batch(batch))
        hidden = self.decoder(inputs, self.kv_cache)
        outputs = [RowOutput() for _ in batch.requests]
        ends = inputs.attention.cu_seqlens_q[1:]
        self._sample(batch, hidden, ends, outputs)
        for request, end, output in zip(batch.requests, ends, outputs, strict=True):
            if request.prompt_targets:
                rows = hidden[end - len(request.token_ids) :][: len(request.prompt_targets)]
                output.prompt_logprobs = self._prompt_logprobs(request, rows)
        return outputs

    def _move(self, batch: ScheduledBatch) -> None:
        for slot in batch.adapter_evictions:
            self.bank.evict(slot)
        for slot, digest in batch.adapter_loads:
            self.bank.load(slot, self._host_weights(digest))
        copy_blocks(self.kv_cache, batch.block_copies)

    def _sample(
        self, batch: ScheduledBatch, hidden: torch.Tensor, ends: list[int], outputs: list[RowOutput]
    ) -> None:
        chosen = [i for i, r in enumerate(batch.requests) if r.samples]
        if not chosen:
            return
        rows = hidden[torch.tensor([ends[i] - 1 for i in chosen], device=self.device)]
        requests = [batch.requests[i] for i in chosen]
        results = sample(requests, self.decoder.logits(rows))
        for i, request, result in zip(chosen, requests, results, strict=True):
            if isinstance(result, NotFinite):
                outputs[i].error = "the model gave logits that are not finite"
                continue
            outputs[i].token_ids = [result.token_id]
            if request.sampling.logprobs is not None:
                outputs[i].logprobs = [_token_logprobs(result)]

    def _prompt_logprobs(
        self, request: ScheduledRequest, hidden: torch.Tensor
    ) -> list[TokenLogprobs]:
        targets, num_top = request.prompt_targets or [], request.sampling.prompt_logprobs or 0
        entries: list[TokenLogprobs] = []
        for i in range(0, len(targets), LOGITS_ROWS):
            logits = self.decoder.logits(hidden[i : i + LOGITS_ROWS])
            picked = target_logprobs(logits, targets[i : i + LOGITS_ROWS], num_top)
            entries += [TokenLogprobs(logprob, top) for logprob, top in picked]
        return entries


def _token_logprobs(token: SampledToken) -> TokenLogprobs:
    assert token.logprob is not None
    return TokenLogprobs(token.logprob, token.top)
