"""Drives generations step by step, without scheduler or engine, and computes expected results.

The driver may run a step ahead of the results, as an engine does; the reference computes one token
after the other, for one request alone.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.backends.cuda.adapter_copies import PackedAdapter
from engine.backends.runner import RowOutput, Runner, StepHandle
from engine.backends.sampler import SampledToken, sample
from engine.lora.weights import LoraWeights
from engine.model.decoder import Decoder
from engine.scheduler.batch import PENDING, AdapterLoad, Move, ScheduledBatch, ScheduledRequest
from engine.scheduler.request import SamplingParams
from engine.scheduler.token_rules import token_biases
from tests.engine.support.draws import request_of
from tests.engine.support.driver import prompt_of
from tests.engine.support.tiny import OneRequest


@dataclass
class Generation:
    """One request. Its blocks are allocated from the start."""

    prompt: list[int]
    sampling: SamplingParams
    slot: int = 0
    blocks: tuple[int, ...] = ()
    block_size: int = 4
    life: int = 1
    output: list[int] = field(default_factory=list[int])
    results: list[RowOutput] = field(default_factory=list[RowOutput])
    computed: int = 0
    pending: int = 0


def drive(
    runner: Runner,
    generations: list[Generation],
    *,
    budget: int,
    depth: int,
    seed: int = 0,
    between: Callable[[int], ScheduledBatch | None] = lambda step: None,
) -> None:
    """Run until each has max_tokens; requests join and pause at random, without effect."""
    dice = random.Random(seed)
    in_flight: list[tuple[ScheduledBatch, list[Generation], StepHandle]] = []
    step = 0
    while True:
        chosen = _choose(generations, dice, budget, depth)
        extra = between(step)
        if chosen or extra:
            batch = _batch(chosen, generations, extra)
            runner_handle = runner.launch(batch)
            in_flight.append((batch, [s for s, _ in chosen], runner_handle))
        step += 1
        while len(in_flight) > (depth if chosen else 0):
            _take(*in_flight.pop(0))
        if not chosen and all(_is_done(s) for s in generations):
            return


def _is_done(s: Generation) -> bool:
    return len(s.output) >= s.sampling.max_tokens


def _choose(
    generations: list[Generation], dice: random.Random, budget: int, depth: int
) -> list[tuple[Generation, int]]:
    chosen: list[tuple[Generation, int]] = []
    for s in generations:
        if len(s.output) + s.pending >= s.sampling.max_tokens or dice.random() < 0.2:
            continue
        count = min(len(s.prompt) + len(s.output) + s.pending - s.computed, budget)
        if count > 1:
            count = dice.randint(1, count)
        if count:
            chosen.append((s, count))
            budget -= count
    return sorted(chosen, key=lambda pair: pair[1])


def _batch(
    chosen: list[tuple[Generation, int]],
    generations: list[Generation],
    extra: ScheduledBatch | None,
) -> ScheduledBatch:
    requests: list[ScheduledRequest] = []
    for s, count in chosen:
        known, start = [*s.prompt, *s.output], s.computed
        end = s.computed = start + count
        samples = end == len(known) + s.pending
        token_ids = [PENDING] if s.pending and samples else known[start:end]
        uses_history = s.sampling.uses_penalties
        targets = None
        if s.sampling.prompt_logprobs is not None and start < len(s.prompt) - 1:
            targets = s.prompt[start + 1 : end + 1]
        requests.append(
            ScheduledRequest(
                request_id=str(next(i for i, other in enumerate(generations) if other is s)),
                choice=0,
                token_ids=token_ids,
                start=start,
                block_table=s.blocks[: -(-end // s.block_size)],
                adapter_slot=s.slot,
                sampling=s.sampling,
                samples=samples,
                history=(list(s.prompt), list(s.output)) if uses_history else None,
                prompt_targets=targets,
                life=s.life,
                biases=token_biases(s.sampling.logit_bias),
            )
        )
        s.pending += samples
    moves: tuple[Move, ...] = extra.moves if extra else ()
    return ScheduledBatch(
        tuple(requests),
        adapter_evictions=extra.adapter_evictions if extra else (),
        moves=moves,
        adapter_loads=extra.adapter_loads if extra else (),
    )


def _take(batch: ScheduledBatch, chosen: list[Generation], handle: StepHandle) -> None:
    outputs = handle.result()
    for s, request, output in zip(chosen, batch.requests, outputs, strict=True):
        s.results.append(output)
        s.output += output.token_ids
        s.pending -= request.samples
        assert output.error is None


# ==== expected results ====


class OneAdapter:
    """A LoraBatch that gives every row the same adapter."""

    def __init__(self, weights: LoraWeights) -> None:
        self.weights = weights

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        own = self.weights.sites.get((layer, site))
        for r0, r1, out0, out1, b in own.expands if own else ():
            y[:, out0:out1] += (x @ own.a[r0:r1].T) @ b


@torch.inference_mode()
def expected(decoder: Decoder, s: Generation, adapter: LoraWeights | None) -> list[SampledToken]:
    """Compute the expected tokens, one at a time, for this request alone."""
    one = OneRequest(decoder, lora=OneAdapter(adapter) if adapter else None)
    tokens: list[SampledToken] = []
    new_ids = s.prompt
    for end in range(len(s.prompt), len(s.prompt) + s.sampling.max_tokens):
        history = (s.prompt, [t.token_id for t in tokens]) if s.sampling.uses_penalties else None
        row = request_of(s.sampling, end, history=history)
        (token,) = sample([row], one.forward(new_ids)[-1:].clone())
        assert isinstance(token, SampledToken)
        tokens.append(token)
        new_ids = [token.token_id]
    return tokens


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **changes)


def generations_of(
    samplings: Sequence[SamplingParams], slots: Sequence[int], block_size: int = 4
) -> list[Generation]:
    """Make generations with prompts of 3 to 30 tokens, and blocks at the arena's low end."""
    made: list[Generation] = []
    for i, (sampling, slot) in enumerate(zip(samplings, slots, strict=True)):
        length = 3 + 7 * i % 28
        num_blocks = -(-(length + sampling.max_tokens) // block_size)
        blocks = tuple(range(i, i + 16 * num_blocks, 16))  # scattered, and used by no other request
        made.append(Generation(prompt_of(length, i), sampling, slot, blocks, block_size))
    return made


def loads_at_the_end(
    packed: Iterable[PackedAdapter], slots: Sequence[int], arena_bytes: int
) -> tuple[AdapterLoad, ...]:
    end, loads = arena_bytes, []
    for slot, adapter in zip(slots, packed, strict=True):
        end -= adapter.nbytes
        loads.append(AdapterLoad(slot, adapter.extent.digest, end, adapter.nbytes))
    return tuple(loads)
