"""SyncRunner: a Runner that computes a step when it is launched; torch and native share it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.backends.row_outputs import row_outputs
from engine.backends.rows import LOGITS_ROWS, pooled_sum, sampled_rows, wanted_rows
from engine.backends.runner import FinishedStep, RowOutput, TokenMask, TokenMasks
from engine.backends.sampler import (
    NotFinite,
    Picker,
    SampledToken,
    certain,
    sample,
    target_logprobs,
    target_ranks,
)
from engine.messages import TokenLogprobs
from engine.scheduler.batch import AdapterLoad, Move, ScheduledBatch, ScheduledRequest


class ForwardPass(Protocol):
    """Computes the model with its KV cache and adapters; each backend has an implementation."""

    def load_adapter(self, load: AdapterLoad, packed: Any) -> None:
        """Load an adapter; `packed` is the result of the backend's own `pack_adapter`."""
        ...

    def evict_adapter(self, slot: int) -> None: ...

    def move(self, moves: Sequence[Move]) -> None:
        """Move KV blocks and adapters, one after the other."""
        ...

    def hidden(self, batch: ScheduledBatch, output_rows: list[int]) -> Tensor:
        """Compute all rows and write their KV; return the chosen rows' hidden states [M, E],
        which stay valid until the next call."""
        ...

    def logits(self, hidden: Tensor, adapter_slots: Sequence[int]) -> Tensor:
        """Compute logits: hidden [M, E], each row with its adapter -> [M, V] in float32.

        V is the base's, or that of the row's adapter with most token ids; where a row's own adapter
        has no such id, its logit is -inf.
        """
        ...

    @property
    def picker(self) -> Picker:
        """The picker that chooses tokens from the logits."""
        ...


class SyncRunner:
    """A Runner without any asynchrony: `launch` returns when the step is done."""

    pipeline_depth = 0
    loads_are_immediate = True

    def __init__(self, model: ForwardPass, host_adapter: Callable[[str], Any]) -> None:
        self.model = model
        self._host_adapter = host_adapter

    def launch(self, batch: ScheduledBatch, masks: TokenMasks | None = None) -> FinishedStep:
        return FinishedStep(self.execute(batch, masks))

    def arrived(self) -> tuple[str, ...]:
        return ()  # `launch` loads adapters itself

    def execute(self, batch: ScheduledBatch, masks: TokenMasks | None = None) -> list[RowOutput]:
        """Compute the step; return one output per request of the batch, in its order."""
        if torch.is_inference_mode_enabled():  # by the thread: to enter it takes microseconds
            return self._execute(batch, masks)
        with torch.inference_mode():
            return self._execute(batch, masks)

    def _execute(self, batch: ScheduledBatch, masks: TokenMasks | None) -> list[RowOutput]:
        self._move(batch)
        if not batch.requests:
            return []
        rows, spans = wanted_rows(batch.requests)
        hidden = self.model.hidden(batch, rows)
        sampled = self._sample(batch.requests, hidden, spans, masks)
        sampling = [r.sampling for r in batch.requests if r.samples]
        return row_outputs(
            batch.requests,
            [
                [token.token_id if isinstance(token, SampledToken) else None for token in tokens]
                for tokens in sampled
            ],
            [
                [] if wanted.logprobs is None else [_token_logprobs(token) for token in tokens]
                for wanted, tokens in zip(sampling, sampled, strict=True)
            ],
            self._score_prompts(batch.requests, hidden, spans),
            [
                pooled_sum(hidden[start:end]).cpu().numpy()
                for request, (start, end) in zip(batch.requests, spans, strict=True)
                if request.pooled
            ],
        )

    def _move(self, batch: ScheduledBatch) -> None:
        for slot in batch.adapter_evictions:
            self.model.evict_adapter(slot)
        self.model.move(batch.moves)
        for load in batch.adapter_loads:
            self.model.load_adapter(load, self._host_adapter(load.digest))

    def _sample(
        self,
        requests: Sequence[ScheduledRequest],
        hidden: Tensor,
        spans: list[tuple[int, int]],
        masks: TokenMasks | None,
    ) -> list[list[SampledToken | NotFinite]]:
        """Sample for each request that samples, in their order: a token before each of its guesses
        and one after them. Tokens that must follow are added."""
        chosen = [i for i, r in enumerate(requests) if r.samples]
        if not chosen:
            return []
        firsts, last, rows = list[int](), list[int](), list[ScheduledRequest]()
        for i in chosen:
            request, end = requests[i], spans[i][1]
            firsts.append(len(rows))
            if request.num_drafts:
                rows += sampled_rows(request)
                last += range(end - 1 - request.num_drafts, end)
            else:
                rows.append(request)
                last.append(end - 1)
        if last != list(range(hidden.shape[0])):
            hidden = hidden[torch.tensor(last)]
        logits = self.model.logits(hidden, [r.adapter_slot for r in rows])
        allowed = None if masks is None else masks.wait()
        ends = [*firsts[1:], len(rows)]
        by_row: dict[int, TokenMask] = {}
        for at, i in enumerate(chosen if allowed else ()):
            if allowed and i in allowed:
                ends[at] = firsts[at] + len(allowed[i])  # no guess behind is right
                by_row.update(enumerate(allowed[i], firsts[at]))
        sampled = sample(rows, logits, self.model.picker, by_row)
        tokens = [sampled[first:end] for first, end in zip(firsts, ends, strict=True)]
        forced = None if masks is None else masks.forced
        for at, i in enumerate(chosen if forced else ()):
            if forced and i in forced and isinstance(tokens[at][0], SampledToken):
                num_top, vocab_size = requests[i].sampling.logprobs, logits.shape[1]
                tokens[at] += [certain(t, num_top, vocab_size) for t in forced[i][1:]]
        return tokens

    def _score_prompts(
        self,
        requests: Sequence[ScheduledRequest],
        hidden: Tensor,
        spans: list[tuple[int, int]],
    ) -> list[list[TokenLogprobs]]:
        """Compute log-probabilities for the prompt targets of each request that has any."""
        return [
            self._score(hidden[start:end], request)
            for request, (start, end) in zip(requests, spans, strict=True)
            if request.prompt_targets
        ]

    def _score(self, hidden: Tensor, request: ScheduledRequest) -> list[TokenLogprobs]:
        targets, num_top = request.prompt_targets or [], request.sampling.prompt_logprobs or 0
        entries: list[TokenLogprobs] = []
        slots = request.row_slots
        for i in range(0, len(targets), LOGITS_ROWS):
            few = targets[i : i + LOGITS_ROWS]
            end = i + len(few)
            logits = self.model.logits(hidden[i:end], slots[i:end])
            picked = target_logprobs(logits, few, num_top)
            ranks = target_ranks(logits, torch.tensor(few, device=logits.device)).tolist()
            entries += [
                TokenLogprobs(logprob, top, rank)
                for (logprob, top), rank in zip(picked, ranks, strict=True)
            ]
        return entries


def _token_logprobs(token: SampledToken | NotFinite) -> TokenLogprobs | None:
    if isinstance(token, NotFinite) or token.logprob is None:
        return None
    return TokenLogprobs(token.logprob, token.top)
