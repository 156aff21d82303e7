"""Tests sampling against brute force, transformers' logits processors and statistics."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.backends.sampler import (
    MAX_NOISE,
    NotFinite,
    TorchPicker,
    _largest,
    gumbel_argmax,
    gumbel_noise,
    sample,
    target_logprobs,
)
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.draws import request_of

VOCAB = 1500


def row(
    sampling: SamplingParams,
    position: int = 7,
    history: tuple[list[int], list[int]] | None = None,
    forbidden: tuple[int, ...] = (),
    index: int = 0,
) -> ScheduledRequest:
    return request_of(sampling, position, index, forbidden, history)


def random_logits(seed: int, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def token_of(sampling: SamplingParams, logits: torch.Tensor, **where: object) -> int:
    (token,) = sample([row(sampling, **where)], logits[None].clone())  # type: ignore[arg-type]
    assert not isinstance(token, NotFinite)
    return token.token_id


def test_draws_follow_the_softmax() -> None:
    """Test chi-square over 8 tokens and 20,000 seeds; 7 degrees of freedom, p = 1e-4 at 29.9."""
    logits = random_logits(0, vocab=8, scale=1.0)
    draws = 20_000
    counts = Counter(gumbel_argmax(logits, seed, 5) for seed in range(draws))
    expected = logits.softmax(-1) * draws
    chi2 = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected.tolist()))
    assert chi2 < 29.9


@pytest.mark.parametrize("vary", ["seed", "position", "token"])
def test_noise_is_uncorrelated_between_seeds_positions_and_tokens(vary: str) -> None:
    n = 4000
    if vary == "token":
        noise = gumbel_noise(torch.arange(n), 1, 1)
    else:
        pairs = [(i, 1) if vary == "seed" else (1, i) for i in range(n)]
        noise = torch.stack([gumbel_noise(torch.tensor([3]), s, p)[0] for s, p in pairs])
    assert noise.mean().item() == pytest.approx(0.5772, abs=5 * 1.2825 / math.sqrt(n))
    assert noise.std().item() == pytest.approx(1.2825, abs=0.12)
    centred = (noise - noise.mean()) / noise.std()
    assert abs((centred[1:] * centred[:-1]).mean().item()) < 5 / math.sqrt(n)


def test_noise_never_exceeds_its_bound() -> None:
    assert gumbel_noise(torch.arange(200_000), 0, 0).max() < MAX_NOISE
    assert -math.log(-math.log(1 - 2**-24)) < MAX_NOISE


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.floats(0.01, 30))
@settings(max_examples=100, deadline=None)
def test_skipping_hopeless_tokens_changes_no_draw(seed: int, position: int, scale: float) -> None:
    logits = random_logits(seed % 1000, scale=scale)
    everything = logits + gumbel_noise(torch.arange(VOCAB), seed, position)
    assert gumbel_argmax(logits, seed, position) == int(everything.argmax())


@pytest.mark.parametrize(
    ("changes", "warper"),
    [
        ({"top_k": 40}, TopKLogitsWarper(40)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"top_p": 0.999}, TopPLogitsWarper(0.999)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
    ids=["top_k", "top_p", "high top_p", "min_p"],
)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_filters_exclude_what_transformers_excludes(
    changes: dict[str, float], warper: object, scale: float
) -> None:
    logits = random_logits(1, scale=scale)
    kept = warper(torch.zeros(1, 1), logits[None])[0].isfinite()  # type: ignore[operator]
    expected = logits.masked_fill(~kept, -torch.inf)
    for seed in range(200):
        params = SamplingParams(seed=seed, **changes)  # type: ignore[arg-type]
        assert token_of(params, logits) == gumbel_argmax(expected, seed, 7)


def test_temperature_divides_the_logits() -> None:
    logits = random_logits(2)
    for seed in range(50):
        token = token_of(SamplingParams(temperature=0.5, seed=seed), logits)
        assert token == gumbel_argmax(logits / 0.5, seed, 7)


def test_repetition_penalty_equals_that_of_transformers() -> None:
    logits, prompt, output = random_logits(3), [5, 9, 9], [700, 5]
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor([prompt + output]), logits[None].clone())[0]
    params = SamplingParams(repetition_penalty=1.7, seed=1)
    assert token_of(params, logits, history=(prompt, output)) == gumbel_argmax(expected, 1, 7)
    best = int(logits.argmax())
    greedy = SamplingParams(repetition_penalty=100.0, temperature=0)
    assert token_of(greedy, logits, history=([best], [])) != best


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    logits = torch.zeros(4)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=1.0, temperature=0)
    (got,) = sample([row(params, history=([0, 0], [1, 1, 2]))], adjusted := logits[None].clone())
    assert not isinstance(got, NotFinite)
    assert adjusted[0].tolist() == [0.0, -2.5, -1.5, 0.0]


def test_logit_bias_and_forbidden_tokens_hold_for_greedy_too() -> None:
    logits = random_logits(4)
    best = int(logits.argmax())
    pushed = SamplingParams(temperature=0, logit_bias=((11, 100.0),))
    assert token_of(pushed, logits) == 11
    assert token_of(SamplingParams(temperature=0), logits, forbidden=(best,)) != best


@given(st.data())
def test_long_lists_change_the_logits_they_name(data: st.DataObject) -> None:
    vocab = 300
    logits = random_logits(data.draw(st.integers(0, 9)), vocab)
    ids = st.integers(0, vocab - 1)
    biases = data.draw(st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=vocab))
    forbidden = data.draw(st.sets(ids, max_size=vocab - 1))
    expected = [
        -math.inf if i in forbidden else float(logits[i] + biases.get(i, 0.0)) for i in range(vocab)
    ]
    params = SamplingParams(temperature=0, logit_bias=tuple(biases.items()))
    sample([row(params, forbidden=tuple(forbidden))], adjusted := logits[None].clone())
    assert adjusted[0].tolist() == expected


def test_a_row_draws_the_same_in_any_batch() -> None:
    params = [SamplingParams(seed=s, temperature=0.5 + s / 4, top_p=0.9) for s in range(6)]
    rows = [row(p, position=3 + i) for i, p in enumerate(params)]
    logits = torch.stack([random_logits(s) for s in range(6)])
    together = sample(rows, logits.clone())
    backwards = sample(rows[::-1], logits.flip(0).clone())[::-1]
    alone = [sample([r], logits[i : i + 1].clone())[0] for i, r in enumerate(rows)]
    assert together == backwards == alone


def test_choice_index_adds_to_the_seed() -> None:
    logits = random_logits(5)
    for index in range(5):
        token = token_of(SamplingParams(seed=10), logits, index=index)
        assert token == token_of(SamplingParams(seed=10 + index), logits)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-42, 1e-50])
@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0])
def test_the_smallest_temperatures_are_greedy(temperature: float, shift: float) -> None:
    logits = random_logits(5) + shift
    for filters in ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}):
        params = SamplingParams(temperature=temperature, seed=3, **filters)  # type: ignore[arg-type]
        assert token_of(params, logits) == int(logits.argmax())


def test_logprobs_are_those_before_temperature_and_filters() -> None:
    logits = random_logits(6)
    params = SamplingParams(temperature=0.2, top_k=3, logprobs=5, logit_bias=((1, 50.0),))
    (token,) = sample([row(params)], logits[None].clone())
    expected = logits.log_softmax(-1)
    assert not isinstance(token, NotFinite) and token.logprob is not None
    assert token.logprob == pytest.approx(expected[token.token_id].item(), abs=1e-5)
    values, ids = expected.topk(5)
    assert [i for i, _ in token.top] == ids.tolist()
    assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("penalized", [False, True])
def test_logprobs_are_of_the_chosen_token_before_penalties(penalized: bool) -> None:
    logits = random_logits(6)
    history = ([3], list(range(VOCAB))) if penalized else None
    params = SamplingParams(seed=2, frequency_penalty=1.5, repetition_penalty=1.2, logprobs=1)
    (token,) = sample([row(params, history=history)], logits[None].clone())
    assert not isinstance(token, NotFinite)
    assert token.logprob == logits.log_softmax(-1)[token.token_id].item()


@pytest.mark.parametrize("vocab", [1, 31, 640, 1500, 32 * 400, 32 * 400 + 31])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_the_top_logits_equal_those_of_a_full_sort(vocab: int, k: int) -> None:
    k = min(k, vocab)
    for logits in (random_logits(1, vocab), torch.arange(vocab) / 7, -torch.arange(vocab) / 7):
        values, ids = _largest(logits, k)
        expected = logits.topk(k)
        assert torch.equal(values, expected.values) and torch.equal(ids, expected.indices)
    values, ids = _largest(random_logits(2, vocab).round(), k)
    assert torch.equal(values, random_logits(2, vocab).round().topk(k).values)
    assert len(set(ids.tolist())) == k, "none twice where many are equal"


def test_only_rows_that_need_it_are_drawn() -> None:
    class Recorder(TorchPicker):
        rows: list[int] | None = None

        def draw(self, logits, rows, requests, best):  # type: ignore[no-untyped-def]
            self.rows = rows
            return super().draw(logits, rows, requests, best)

    logits = torch.stack([random_logits(s) for s in range(4)])
    logits[3, 5] = math.nan
    hot, cold = row(SamplingParams(seed=1)), row(SamplingParams(temperature=0))
    picker = Recorder()
    got = sample([cold, hot, cold, hot], logits.clone(), picker)
    assert picker.rows == [1] and isinstance(got.pop(), NotFinite)
    assert [t.token_id for t in got if not isinstance(t, NotFinite)] == [
        int(logits[0].argmax()),
        gumbel_argmax(logits[1], 1, 7),
        int(logits[2].argmax()),
    ]
    assert sample([cold], logits[:1].clone(), quiet := Recorder()) and quiet.rows is None


def test_target_logprobs_of_each_row() -> None:
    logits = torch.stack([random_logits(i) for i in range(3)])
    expected = logits.log_softmax(-1)
    for i, (value, top) in enumerate(target_logprobs(logits, [4, 5, 6], 2)):
        assert value == pytest.approx(expected[i, 4 + i].item(), abs=1e-5)
        assert top[0][0] == int(logits[i].argmax())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_affect_only_their_own_row(
    bad: float, temperature: float
) -> None:
    logits = torch.stack([random_logits(0), random_logits(1)])
    logits[0, 3] = bad
    rows = [row(SamplingParams(temperature=temperature, seed=1))] * 2
    first, second = sample(rows, logits)
    assert isinstance(first, NotFinite) and not isinstance(second, NotFinite)
