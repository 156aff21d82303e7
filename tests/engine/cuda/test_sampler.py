"""Tests DeviceSampler against `sample`, and its parts against brute force."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.backends.cuda.draw import gumbel_rows, noise_keys, weighted_floor
from engine.backends.cuda.sampler import DeviceSampler, read_scores
from engine.backends.cuda.streams import HostDevice
from engine.backends.sampler import (
    NotFinite,
    SampledToken,
    _filter,
    gumbel_noise,
    sample,
)
from engine.messages import TokenLogprobs
from engine.scheduler.batch import PENDING, ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.draws import request_of

INF, NAN = math.inf, math.nan
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.4},
    {"top_k": 7},
    {"top_k": 5000},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.2},
]


def random_rows(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """Make flat rows, peaked rows and rows with many ties."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed + vocab))
    logits[1::3] *= 4
    logits[2::3] = (logits[2::3] * 4).round()
    return logits


def random_requests(rows: int, vocab: int, seed: int = 0) -> list[ScheduledRequest]:
    dice = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [dice.randrange(vocab) for _ in range(count)]

    requests = []
    for _ in range(rows):
        penalties = dice.choice(
            [
                {},
                {"repetition_penalty": 1.3},
                {"presence_penalty": 0.7, "frequency_penalty": -0.4},
                {"repetition_penalty": 0.8, "frequency_penalty": 1.1},
            ]
        )
        biases = {i: dice.uniform(-5, 5) for i in ids(dice.choice([0, 0, 3]))}
        sampling = SamplingParams(
            temperature=dice.choice([0.0, 0.1, 0.7, 1.0, 1.3, 10.0]),
            seed=dice.randrange(-(2**63), 2**63),
            logprobs=dice.choice([None, None, 0, 1, 5]),
            logit_bias=tuple(biases.items()),
            **penalties,
            **dice.choice(FILTERS),
        )
        requests.append(
            request_of(
                sampling,
                position=dice.randrange(1, 2**31),
                choice=dice.randrange(4),
                forbidden=tuple(ids(dice.choice([0, 0, 2]))),
                history=(ids(9), ids(dice.choice([0, 12]))) if penalties else None,
                allowed=tuple(ids(20)) if dice.random() < 0.3 else None,
            )
        )
    return requests


def on_device(
    requests: list[ScheduledRequest], logits: Tensor, last_inputs: list[int] | None = None
) -> list[SampledToken | NotFinite]:
    """Return the result of `sample`, computed by the DeviceSampler."""
    inputs = torch.tensor(last_inputs or [0] * len(requests), dtype=torch.int32)
    sampled = DeviceSampler(HostDevice()).sample(requests, logits.clone(), inputs)
    num_top = [r.sampling.logprobs for r in requests if r.sampling.logprobs is not None]
    scores = iter(read_scores(sampled.scores, num_top))
    results: list[SampledToken | NotFinite] = []
    for i, request in enumerate(requests):
        score = None if request.sampling.logprobs is None else next(scores)
        if not sampled.is_finite[i]:
            results.append(NotFinite())
        else:
            token_id = int(sampled.tokens[i])
            results.append(
                SampledToken(token_id, score.logprob, score.top)
                if isinstance(score, TokenLogprobs)
                else SampledToken(token_id)
            )
    return results


def by_torch(requests: list[ScheduledRequest], logits: Tensor) -> list[SampledToken | NotFinite]:
    return sample(requests, logits.clone())


def assert_same(
    got: list[SampledToken | NotFinite], expected: list[SampledToken | NotFinite]
) -> None:
    """Assert equal results; tokens of equal log-probability may be listed in any order."""
    for mine, theirs in zip(got, expected, strict=True):
        if isinstance(theirs, NotFinite):
            assert isinstance(mine, NotFinite)
            continue
        assert isinstance(mine, SampledToken)
        assert (mine.token_id, mine.logprob) == (theirs.token_id, theirs.logprob)
        assert [value for _, value in mine.top] == [value for _, value in theirs.top]
        assert len({token_id for token_id, _ in mine.top}) == len(theirs.top)


@pytest.mark.parametrize(("vocab", "rows"), [(1, 12), (2, 40), (37, 120), (1500, 60), (49152, 4)])
def test_results_are_those_of_the_plain_sampler(vocab: int, rows: int) -> None:
    logits, requests = random_rows(rows, vocab), random_requests(rows, vocab, vocab)
    assert_same(on_device(requests, logits), by_torch(requests, logits))


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits, requests = random_rows(24, 700, seed=1), random_requests(24, 700, seed=1)
    together = on_device(requests, logits)
    assert on_device(requests[::-1], logits.flip(0))[::-1] == together
    alone = [on_device(requests[i : i + 1], logits[i : i + 1])[0] for i in range(24)]
    assert alone == together


def test_greedy_requests_send_nothing_to_the_device() -> None:
    class Quiet(HostDevice):
        def copy(self, target: Tensor, source: Tensor) -> None:
            raise AssertionError("greedy rows need no copy")

    logits = random_rows(5, 300)
    requests = [request_of(SamplingParams(temperature=0))] * 5
    sampled = DeviceSampler(Quiet()).sample(requests, logits, torch.zeros(5, dtype=torch.int32))
    assert sampled.tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("changes", [{"temperature": 0.0}, *FILTERS], ids=str)
def test_a_row_that_is_not_finite_does_not_affect_others(bad: float, changes: dict) -> None:  # type: ignore[type-arg]
    logits, requests = random_rows(5, 600), [request_of(SamplingParams(seed=3, **changes))] * 5
    expected = by_torch(requests, logits)
    logits[1], logits[3, 77] = bad, bad
    got = on_device(requests, logits)
    assert isinstance(got[1], NotFinite)
    assert [got[i] for i in (0, 2, 4)] == [expected[i] for i in (0, 2, 4)]
    assert isinstance(got[3], NotFinite) == (bad != -INF)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-42, 1e-50])
@pytest.mark.parametrize("changes", FILTERS, ids=str)
def test_the_smallest_temperatures_are_greedy(temperature: float, changes: dict[str, Any]) -> None:
    logits = random_rows(9, 400)[1::3]
    logits[0, ::2] = -INF
    requests = [
        request_of(SamplingParams(temperature=temperature, seed=s, **changes)) for s in range(3)
    ]
    got = on_device(requests, logits)
    assert [t.token_id for t in got if isinstance(t, SampledToken)] == logits.argmax(-1).tolist()


def test_a_pending_token_counts_as_the_last_of_the_output() -> None:
    """Penalties must count the token that only the device has, as if the host had it."""
    logits, known, pending = random_rows(6, 40), [], []
    last = [3, 4, 5, 3, 4, 5]
    for i, token_id in enumerate(last):
        sampling = SamplingParams(
            temperature=0.0 if i % 2 else 1.0,
            seed=i,
            repetition_penalty=3.0 if i < 4 else 1.0,
            frequency_penalty=1.5 if i > 1 else 0.0,
        )
        history = [1, 2], [token_id] * (i % 3)
        pending.append(request_of(sampling, history=history, last_input=PENDING))
        known.append(request_of(sampling, history=(history[0], [*history[1], token_id])))
        logits[i, token_id] += 3
    assert on_device(pending, logits, last) == by_torch(known, logits)
    assert on_device(pending, logits, [9] * 6) != by_torch(known, logits)


# ==== parts ====


def test_noise_equals_that_of_the_sampler_bit_for_bit() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 987654321, 2**63 + 1]
    positions = [1, 2, 7, 2**31, 0, 12345, 3, 9]
    low, high = (torch.from_numpy(half) for half in noise_keys(seeds, positions))
    expected = [
        gumbel_noise(torch.arange(5000), seed, position)
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert torch.equal(gumbel_rows(low, high, 5000), torch.stack(expected))


@pytest.mark.parametrize("vocab", [1, 5, 300])
def test_weighted_floor_is_that_of_a_sorted_row(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for values in (
        torch.randn(6, vocab, generator=generator) * 3,
        torch.randn(6, vocab, generator=generator).round(),
        torch.zeros(6, vocab) * torch.tensor([1.0, -1.0])[torch.arange(vocab) % 2],
        torch.randn(6, vocab, generator=generator)
        .mul(80)
        .exp()
        .masked_fill_(torch.rand(6, vocab, generator=generator) < 0.3, -INF),
    ):
        weights = torch.randint(0, 2**40, (6, vocab), generator=generator)
        weights[:, 0] += 1
        needed = (weights.sum(1) * torch.rand(6, generator=generator)).long().clamp(min=1)
        got = weighted_floor(values, weights, needed)
        for row, weight, need, floor in zip(values, weights, needed, got, strict=True):
            reached = [int(weight[row >= value].sum()) >= int(need) for value in row]
            assert floor == max(
                value for value, is_enough in zip(row, reached, strict=True) if is_enough
            )


@pytest.mark.parametrize("changes", FILTERS[1:], ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_filters_keep_the_same_tokens_as_the_sampler(changes: dict[str, Any], ties: bool) -> None:
    row = torch.randn(3000, generator=torch.Generator().manual_seed(5)) * 2
    row = row.round() if ties else row
    requests = [request_of(SamplingParams(seed=s, temperature=1.3, **changes)) for s in range(40)]
    kept = row / 1.3
    _filter(kept, requests[0].sampling)
    noise = torch.stack([gumbel_noise(torch.arange(3000), s, 7) for s in range(40)])
    got = on_device(requests, row.expand(40, -1).contiguous())
    expected = (kept + noise).argmax(-1).tolist()
    assert [t.token_id for t in got if isinstance(t, SampledToken)] == expected


def test_ids_beyond_a_mask_are_not_allowed() -> None:
    """Logits are wider than the grammars' vocabulary if an adapter of the batch has more ids."""
    logits = torch.arange(80.0)[None].repeat(2, 1)
    all_of_64 = np.full(2, 2**32 - 1, np.uint32)
    requests = [request_of(SamplingParams(temperature=0.0)) for _ in range(2)]
    last_inputs = torch.zeros(2, dtype=torch.int32)
    sampled = DeviceSampler(HostDevice()).sample(requests, logits, last_inputs, {1: all_of_64})
    assert sampled.tokens.tolist() == [79, 63]
