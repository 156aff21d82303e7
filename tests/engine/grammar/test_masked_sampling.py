"""Masks in every sampler: rows with one choose as if other tokens had no probability at all."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.backends.cuda.sampler import DeviceSampler, read_scores
from engine.backends.cuda.streams import HostDevice
from engine.backends.native.library import Context
from engine.backends.native.picker import NativePicker
from engine.backends.runner import TokenMask
from engine.backends.sampler import Picker, SampledToken, sample
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.engine.cuda.test_sampler import random_requests, random_rows
from tests.engine.support.draws import request_of

ROWS = 24


def mask_of(token_ids: set[int], vocab: int) -> TokenMask:
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def random_sets(vocab: int, seed: int) -> dict[int, set[int]]:
    """Choose tokens for two of three rows: one, some or nearly all."""
    dice = random.Random(seed)
    counts = [1, min(3, vocab), max(vocab // 2, 1), vocab]
    return {
        i: set(dice.sample(range(vocab), dice.choice(counts))) for i in range(ROWS) if i % 3 != 1
    }


def restricted(logits: Tensor, allowed: dict[int, set[int]]) -> Tensor:
    logits = logits.clone()
    for i, token_ids in allowed.items():
        others = [t for t in range(logits.shape[1]) if t not in token_ids]
        logits[i, others] = -torch.inf
    return logits


def masks_of(allowed: dict[int, set[int]], vocab: int) -> dict[int, TokenMask]:
    return {i: mask_of(token_ids, vocab) for i, token_ids in allowed.items()}


def without_lists(num: int, vocab: int, seed: int) -> list[ScheduledRequest]:
    """Draw requests; the engine refuses a list of allowed tokens beside a grammar."""
    requests = random_requests(num, vocab, seed)
    return [request._replace(allowed_token_ids=None) for request in requests]


def lifted(requests: list[ScheduledRequest], allowed: dict[int, set[int]]) -> None:
    """Drop the forbidden tokens of a row that allows no others."""
    for i, token_ids in allowed.items():
        if token_ids <= set(requests[i].forbidden_token_ids):
            requests[i] = requests[i]._replace(
                forbidden_token_ids=type(requests[i].forbidden_token_ids)("i")
            )


@pytest.mark.parametrize("vocab", [5, 33, 258, 1501])
@pytest.mark.parametrize("picker", ["torch", "native"])
def test_masked_rows_are_sampled_as_from_logits_without_the_others(vocab: int, picker: str) -> None:
    for seed in range(3):
        requests, logits = without_lists(ROWS, vocab, seed), random_rows(ROWS, vocab, seed)
        allowed = random_sets(vocab, seed)
        chosen: Picker | None = NativePicker(Context(threads=1)) if picker == "native" else None
        found = sample(requests, logits.clone(), chosen, masks_of(allowed, vocab))
        lifted(requests, allowed)
        expected = sample(requests, restricted(logits, allowed), chosen)
        assert found == expected
        for i, token_ids in allowed.items():
            token = found[i]
            assert isinstance(token, SampledToken) and token.token_id in token_ids


@pytest.mark.parametrize("vocab", [5, 33, 258, 1501])
def test_the_device_masks_rows_like_the_host(vocab: int) -> None:
    for seed in range(3):
        requests, logits = without_lists(ROWS, vocab, seed), random_rows(ROWS, vocab, seed)
        masks = masks_of(random_sets(vocab, seed), vocab)
        expected = sample(requests, logits.clone(), None, masks)
        sampled = DeviceSampler(HostDevice()).sample(
            requests, logits.clone(), torch.zeros(ROWS, dtype=torch.int32), masks
        )
        assert sampled.is_finite.all()
        assert sampled.tokens.tolist() == [
            t.token_id for t in expected if isinstance(t, SampledToken)
        ]
        num_top = [r.sampling.logprobs for r in requests if r.sampling.logprobs is not None]
        scores = iter(read_scores(sampled.scores, num_top))
        for token in expected:
            assert isinstance(token, SampledToken)
            if token.logprob is not None:
                score = next(scores)
                assert score.logprob == pytest.approx(token.logprob, abs=1e-5)
                finite = [v for _, v in score.top if v > -1e30]
                own = [v for _, v in token.top if v > -1e30]
                assert finite == pytest.approx(own, abs=1e-5)


def test_forbidden_end_tokens_come_back_only_where_nothing_else_is_allowed() -> None:
    sampling = SamplingParams(temperature=0.0)
    requests = [request_of(sampling, forbidden=(3, 40)) for _ in range(3)]
    sets = ({3, 40}, {3, 7}, {3})
    allowed = {i: mask_of(token_ids, 64) for i, token_ids in enumerate(sets)}
    logits = torch.zeros(3, 64)
    logits[:, 40], logits[:, 3] = 2.0, 1.0
    tokens = sample(requests, logits, None, allowed)
    assert [t.token_id for t in tokens if isinstance(t, SampledToken)] == [40, 7, 3]
