"""Tests draw against torch's draw and brute force, and each row alone against its batch.

Native and torch round differently (a subtraction before the division by the temperature, other
logarithms), by about 1e-6 of a noisy value: another token may win only if two are that close, and
1e-4 is allowed.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.native.library import Context, supported_isas
from engine.backends.native.picker import NativePicker
from engine.backends.sampler import (
    NotFinite,
    SampledToken,
    TorchPicker,
    _filter,
    gumbel_noise,
    sample,
)
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.draws import request_of

CLOSE = 1e-4
INF, NAN = math.inf, math.nan
SMALL = {1: 40, 2: 200, 17: 1000, 258: 1500}  # vocabulary: cases
LARGE = {49152: 24, 151936: 12}
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.4},
    {"top_k": 7},
    {"top_k": 1000},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.2},
]


def random_rows(rows: int, vocab: int, seed: int = 0) -> Tensor:
    """Make flat rows, peaked rows and rows with many ties, within a wider buffer of NaN."""
    generator = torch.Generator().manual_seed(seed + vocab)
    logits = torch.full((rows, vocab + 3), NAN)[:, :vocab]
    logits[:] = torch.randn(rows, vocab, generator=generator)
    logits[1::3] *= 4
    logits[2::3] = (logits[2::3] * 4).round()
    return logits


def random_requests(rows: int, seed: int = 0) -> list[ScheduledRequest]:
    dice = random.Random(seed)
    return [
        request_of(
            SamplingParams(
                temperature=dice.choice([0.1, 0.7, 1.0, 1.3, 10.0]),
                seed=dice.randrange(-(2**63), 2**63),
                **dice.choice(FILTERS),
            ),
            position=dice.randrange(1, 2**31),
            choice=dice.randrange(4),
        )
        for _ in range(rows)
    ]


def draw(context: Context, logits: Tensor, requests: Sequence[ScheduledRequest]) -> list[int]:
    picker = NativePicker(context)
    best, _ = picker.best(logits)
    return picker.draw(logits, list(range(len(requests))), requests, best)


def seeded(count: int, **changes: Any) -> list[ScheduledRequest]:
    return [request_of(SamplingParams(seed=seed, **changes)) for seed in range(count)]


# ==== against torch ====


@cache
def noise_of_seeds(count: int, vocab: int) -> Tensor:
    """Return the noise [count, vocab] of the requests of `seeded`."""
    return torch.stack([gumbel_noise(torch.arange(vocab), seed, 7) for seed in range(count)])


def noisy_by_torch(row: Tensor, request: ScheduledRequest) -> Tensor:
    """Return logits / temperature + noise by torch; -inf for tokens that filters exclude."""
    row = row / request.sampling.temperature
    _filter(row, request.sampling)
    seed = request.sampling.seed + request.choice
    return row + gumbel_noise(torch.arange(row.numel()), seed, request.end)


@cache
def cases(vocab: int) -> tuple[Tensor, list[ScheduledRequest], list[int], list[Tensor]]:
    """Make logits, requests, torch's drawn tokens and the noisy values that they maximise."""
    count = {**SMALL, **LARGE}[vocab]
    logits, requests = random_rows(count, vocab), random_requests(count, vocab)
    noisy = [noisy_by_torch(row, r) for row, r in zip(logits, requests, strict=True)]
    tokens = TorchPicker().draw(logits, list(range(count)), requests, [0] * count)
    assert tokens == [int(values.argmax()) for values in noisy]
    return logits, requests, tokens, noisy


@pytest.mark.parametrize("vocab", [*SMALL, *LARGE])
def test_tokens_equal_those_of_torch_except_for_ties_within_rounding(
    context: Context, vocab: int
) -> None:
    logits, requests, tokens, noisy = cases(vocab)
    drawn = draw(context, logits, requests)
    for token, expected, values in zip(drawn, tokens, noisy, strict=True):
        assert token == expected or values[expected] - values[token] < CLOSE
    different = sum(a != b for a, b in zip(drawn, tokens, strict=True))
    assert different <= 2, "ties this close are rare"


def test_noise_equals_that_of_torch(context: Context) -> None:
    """Use two tokens whose difference is just below and just above that of their noise."""
    dice, vocab, margin = random.Random(0), 100_003, 1e-5
    logits = torch.full((2, vocab), -INF)
    for _ in range(60):
        first, second = dice.sample(range(vocab), 2)
        seed, position = dice.randrange(-(2**63), 2**63), dice.randrange(1, 2**31)
        noise = gumbel_noise(torch.tensor([first, second]), seed, position)
        lead = float(noise[0] - noise[1])
        logits[:, first] = 0.0
        logits[:, second] = torch.tensor([lead - margin, lead + margin])
        requests = [request_of(SamplingParams(seed=seed), position)] * 2
        assert draw(context, logits, requests) == [first, second]
        logits[:, [first, second]] = -INF


def test_seed_and_choice_count_modulo_two_to_the_64(context: Context) -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32)]
    requests = [
        request_of(SamplingParams(seed=seed), position, choice)
        for seed in seeds
        for choice in (0, 1, 5)
        for position in range(1, 11)
    ]
    logits, rows = torch.zeros(len(requests), 50), list(range(len(requests)))
    expected = TorchPicker().draw(logits, rows, requests, [0] * len(requests))
    assert draw(context, logits, requests) == expected
    first = request_of(SamplingParams(seed=2**63 - 1), choice=2)
    same = request_of(SamplingParams(seed=-(2**63)), choice=1)
    assert draw(context, logits[:1], [first]) == draw(context, logits[:1], [same])


def test_draws_follow_the_softmax(context: Context) -> None:
    """Test chi-square over 17 tokens and 20,000 seeds; 16 degrees of freedom, p = 1e-4 at 45.9."""
    logits, count = torch.randn(17, generator=torch.Generator().manual_seed(3)), 20_000
    drawn = Counter(draw(context, logits.expand(count, 17), seeded(count, temperature=0.8)))
    expected = (logits / 0.8).softmax(-1) * count
    assert sum((drawn[i] - e) ** 2 / e for i, e in enumerate(expected.tolist())) < 45.9


# ==== the filters ====


def kept_by_definition(row: list[float], sampling: SamplingParams) -> set[int]:
    """Return the token ids that the filters keep, in double precision, token by token."""
    kept = sorted(range(len(row)), key=lambda i: -row[i])
    top = row[kept[0]]
    if 0 < sampling.top_k < len(row):
        kept = [i for i in kept if row[i] >= row[kept[sampling.top_k - 1]]]
    masses = {i: math.exp((row[i] - top) / sampling.temperature) for i in kept}
    nucleus, mass = [kept[0]], masses[kept[0]]
    for i in kept[1:]:
        if row[i] == row[nucleus[-1]] or mass < sampling.top_p * sum(masses.values()):
            nucleus.append(i)
        mass += masses[i]
    least = math.log(sampling.min_p) if sampling.min_p else -INF
    return {i for i in nucleus if (row[i] - top) / sampling.temperature >= least}


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize(
    "changes",
    [
        *FILTERS[1:],
        *({"top_k": 1}, {"top_k": 36}, {"top_k": 37}, {"top_k": 2**31 - 1}),
        *({"top_p": 0.05}, {"top_p": 0.99}, {"min_p": 1.0}, {"min_p": 0.5}),
        {"top_k": 10, "top_p": 0.5, "temperature": 3.0},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 0.6},
    ],
    ids=str,
)
def test_filters_keep_the_tokens_of_their_definition(
    context: Context, changes: dict[str, Any], ties: bool
) -> None:
    count, vocab = 300, 37
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 2
    row = row.round() if ties else row
    requests = seeded(count, **changes)
    kept = sorted(kept_by_definition(row.tolist(), requests[0].sampling))
    noisy = row / requests[0].sampling.temperature + noise_of_seeds(count, vocab)
    expected = torch.tensor(kept)[noisy[:, kept].argmax(-1)]
    assert draw(context, row.expand(count, vocab), requests) == expected.tolist()


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "equal"])
@pytest.mark.parametrize("top_k", [1, 100, 4999])
def test_top_k_works_in_any_order(context: Context, order: str, top_k: int) -> None:
    row = torch.linspace(-1, 1, 5000)
    if order != "ascending":
        shuffled = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
        row = {"descending": row.flip(0), "shuffled": row[shuffled], "equal": row * 0}[order]
    kept = (row >= row.sort(descending=True).values[top_k - 1]).nonzero().flatten()
    noisy = (row + noise_of_seeds(60, 5000))[:, kept]
    drawn = draw(context, row.expand(60, 5000), seeded(60, top_k=top_k))
    assert drawn == kept[noisy.argmax(-1)].tolist()


# ==== extremes ====


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-42, 1e-50])
@pytest.mark.parametrize("changes", FILTERS, ids=str)
def test_the_smallest_temperatures_are_greedy(
    context: Context, temperature: float, changes: dict[str, Any]
) -> None:
    logits = random_rows(30, 1000)[1::3]
    logits[0, ::2] = -INF
    requests = seeded(len(logits), temperature=temperature, **changes)
    assert draw(context, logits, requests) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-42, 1e-50])
def test_of_equal_logits_any_may_win_at_the_smallest_temperatures(
    context: Context, temperature: float
) -> None:
    logits = torch.zeros(200, 3) - torch.tensor([0, 1e-3, 0])
    drawn = draw(context, logits, seeded(200, temperature=temperature, top_p=0.9))
    assert set(drawn) == {0, 2}


@pytest.mark.parametrize("changes", [*FILTERS, {"top_p": 1e-300}], ids=str)
def test_forbidden_tokens_never_win(context: Context, changes: dict[str, Any]) -> None:
    logits = torch.full((100, 70), -INF)
    logits[:50, [3, 69]] = torch.tensor([-50.0, -50.5])
    logits[50:, 33] = -1e30
    drawn = draw(context, logits, seeded(100, temperature=5.0, **changes))
    assert set(drawn[:50]) <= {3, 69} and set(drawn[50:]) == {33}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("changes", FILTERS, ids=str)
def test_a_row_that_is_not_finite_does_not_affect_others(
    context: Context, bad: float, changes: dict[str, Any]
) -> None:
    logits = random_rows(5, 2000)
    requests = seeded(5, **changes)
    expected = draw(context, logits, requests)
    logits[1], logits[3, 77] = bad, bad
    drawn = draw(context, logits, requests)
    assert [drawn[i] for i in (0, 2, 4)] == [expected[i] for i in (0, 2, 4)]
    assert all(0 <= token < 2000 for token in drawn)


# ==== each row alone ====


@pytest.mark.parametrize("vocab", [17, 5000, 49152])
def test_a_row_draws_the_same_in_any_batch(context: Context, vocab: int) -> None:
    logits, requests = random_rows(24, vocab, seed=1), random_requests(24)
    together = draw(context, logits, requests)
    assert draw(context, logits.flip(0), requests[::-1])[::-1] == together
    alone = [draw(context, logits[i : i + 1], requests[i : i + 1])[0] for i in range(24)]
    assert alone == together


def test_every_isa_and_number_of_threads_draws_the_same(isa: str) -> None:
    logits, requests = random_rows(600, 2500, seed=2), random_requests(600, 2)
    drawn = []
    for name in supported_isas():
        for threads in (1, 4):
            context = Context(name, threads)
            drawn.append(draw(context, logits, requests))
            context.close()
    assert all(tokens == drawn[0] for tokens in drawn)


# ==== used by the sampler ====


def test_a_mixed_batch_is_sampled_as_in_torch(context: Context) -> None:
    requests = [
        request_of(SamplingParams(temperature=0)),
        request_of(SamplingParams(seed=3, top_p=0.9, logprobs=3)),
        request_of(SamplingParams(seed=4)),
        request_of(SamplingParams(temperature=0, logprobs=0), forbidden=(5,)),
        request_of(
            SamplingParams(seed=5, repetition_penalty=1.3, frequency_penalty=0.7, logprobs=2),
            history=([1, 2, 2, 3], [4, 5, 5, 9]),
        ),
        request_of(SamplingParams(seed=6, logit_bias=((7, 30.0),))),
    ]
    logits = random_rows(len(requests), 3000)
    logits[2, 11] = NAN
    native = sample(requests, logits.clone(), NativePicker(context))
    by_torch = sample(requests, logits.clone(), TorchPicker())
    assert isinstance(native.pop(2), NotFinite) and isinstance(by_torch.pop(2), NotFinite)
    assert all(isinstance(token, SampledToken) for token in native)
    assert native == by_torch


def test_greedy_rows_alone_need_no_draw(context: Context) -> None:
    logits = random_rows(4, 100)
    tokens = sample([request_of(SamplingParams(temperature=0))] * 4, logits, NativePicker(context))
    assert tokens == [SampledToken(i) for i in logits.argmax(-1).tolist()]
