"""Tests the drawing kernels against torch's version, which equals the plain sampler."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.backends.cuda import draw as device_draw
from engine.backends.cuda.assembly import triton_draw
from engine.backends.cuda.draw import Draws, noise_keys
from engine.backends.cuda.triton.draw import floors

INF = float("inf")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_draws(count: int, vocab: int, seed: int) -> tuple[torch.Tensor, Draws]:
    """Make flat and peaked rows of logits, with ties, in another order than the draws."""
    dice = random.Random(seed)
    logits = torch.randn(count + 2, vocab + 3, generator=torch.Generator().manual_seed(seed))
    logits[1::3] *= 4
    logits[2::3] = (logits[2::3] * 4).round()
    logits[0, ::2] = -INF
    low, high = noise_keys(
        [dice.randrange(-(2**63), 2**63) for _ in range(count)], list(range(5, 5 + count))
    )

    def floats(*choices: float) -> torch.Tensor:
        return torch.tensor([dice.choice(choices) for _ in range(count)], device=DEVICE)

    draws = Draws(
        rows=torch.tensor(dice.sample(range(count + 2), count), dtype=torch.int32, device=DEVICE),
        temperature=floats(0.1, 0.7, 1.0, 1.7, 10.0),
        top_k=floats(0, 0, 1, 7, vocab, vocab + 9).int(),
        top_p=floats(1.0, 1.0, 0.3, 0.9, 0.999),
        min_p=floats(0.0, 0.0, 0.05),
        key_low=torch.from_numpy(low).to(DEVICE),
        key_high=torch.from_numpy(high).to(DEVICE),
        has_filters=True,
    )
    return logits.to(DEVICE)[:, :vocab], draws


@pytest.mark.parametrize(("vocab", "count"), [(1, 3), (37, 14), (5000, 8)])
def test_floors_keep_the_same_tokens_as_torch(vocab: int, count: int) -> None:
    logits, draws = random_draws(count, vocab, seed=vocab)
    scaled = logits[draws.rows.long()] / draws.temperature[:, None]
    expected = device_draw.floors(scaled, draws)
    highest = scaled.amax(-1)
    found = highest + draws.min_p.log()
    floors(logits, draws.rows, draws.temperature, draws.top_k, draws.top_p, found)
    assert torch.equal(scaled >= found[:, None], scaled >= expected[:, None])


@pytest.mark.parametrize(("vocab", "count"), [(1, 2), (37, 20), (9000, 6)])
def test_tokens_equal_those_of_torch(vocab: int, count: int) -> None:
    logits, draws = random_draws(count, vocab, seed=vocab + 1)
    highest, best = logits.max(-1)
    expected = device_draw.draw(logits, draws, highest, best)
    found = triton_draw(logits, draws, highest, best)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [1e-6, 1e-42])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits, draws = random_draws(6, 50, seed=4)
    draws = replace(draws, temperature=torch.full((6,), temperature, device=DEVICE))
    logits = logits + torch.arange(50, device=DEVICE) * 1e-3  # no ties
    logits[4] = torch.nan
    highest, best = logits.max(-1)
    with np.errstate(all="ignore"):  # numpy warns where a GPU would not
        found = triton_draw(logits, draws, highest, best)
    assert found.tolist() == best[draws.rows.long()].tolist()
