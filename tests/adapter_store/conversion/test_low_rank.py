"""Factors are the best of their rank, and what they miss is what is reported."""

import numpy as np
import pytest

from adapter_store.conversion.change import Kronecker, Product, Turned
from adapter_store.conversion.low_rank import low_rank

RANDOM = np.random.default_rng(0)


def decaying(out_features: int, in_features: int, power: float = 1.0) -> np.ndarray:
    """A matrix whose singular values fall like 1 / n, as those of trained changes do."""
    size = min(out_features, in_features)
    u = np.linalg.qr(RANDOM.standard_normal((out_features, size)))[0]
    v = np.linalg.qr(RANDOM.standard_normal((in_features, size)))[0]
    values = 1.0 / np.arange(1, size + 1) ** power
    return ((u * values) @ v.T).astype(np.float32)


def optimum(matrix: np.ndarray, lora_rank: int) -> float:
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.linalg.norm(values[lora_rank:]) / np.linalg.norm(values))


def check(
    change: np.ndarray | Product | Kronecker | Turned, whole: np.ndarray, lora_rank: int
) -> None:
    factors, residual = low_rank(change, lora_rank)
    assert factors.a.shape[0] <= lora_rank
    missed = float(np.linalg.norm(whole - factors.b @ factors.a) / np.linalg.norm(whole))
    best = optimum(whole, lora_rank)
    assert residual == pytest.approx(missed, rel=1e-3, abs=1e-6)
    assert missed <= 1.01 * best + 1e-6


@pytest.mark.parametrize("lora_rank", [8, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("power", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_large_matrix_is_sketched(lora_rank: int, power: float) -> None:
    matrix = decaying(700, 600, power)
    check(matrix, matrix, lora_rank)


def test_without_leading_values_what_is_missed_is_still_true() -> None:
    matrix = RANDOM.standard_normal((900, 640), dtype=np.float32)
    factors, residual = low_rank(matrix, 32)
    missed = float(np.linalg.norm(matrix - factors.b @ factors.a) / np.linalg.norm(matrix))
    assert residual == pytest.approx(missed, rel=1e-4)
    assert missed <= 1.02 * optimum(matrix, 32)  # iterations would gain hardly more


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_turned_blocks_are_never_multiplied_out(spread: float) -> None:
    blocks = RANDOM.standard_normal((20, 32, 32), dtype=np.float32)
    blocks *= spread ** np.linspace(0, 1, 20, dtype=np.float32)[:, None, None]
    turned = Turned(decaying(600, 640, 0.5), blocks)
    whole = turned.weight @ block_diagonal(blocks)
    np.testing.assert_allclose(turned.whole(), whole, atol=1e-5)
    check(turned, whole, 16)


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    size = blocks.shape[1]
    whole = np.zeros((len(blocks) * size,) * 2, np.float32)
    for at, block in enumerate(blocks):
        whole[at * size : (at + 1) * size, at * size : (at + 1) * size] = block
    return whole


def test_a_small_matrix_is_decomposed() -> None:
    matrix = decaying(48, 32)
    check(matrix, matrix, 5)
    check(matrix, matrix, 48)


def test_a_product_and_a_kronecker_product_are_never_multiplied_out() -> None:
    b, a = decaying(200, 20), decaying(20, 100)
    check(Product(b, a), b @ a, 7)
    left, right = decaying(6, 4), decaying(20, 30)
    check(Kronecker(left, right), np.kron(left, right), 9)


def test_a_change_of_small_rank_gets_no_larger_one() -> None:
    b, a = decaying(64, 3), decaying(3, 64)
    factors, residual = low_rank(b @ a, 32)
    assert factors.a.shape[0] == 3 and residual < 1e-6
    factors, residual = low_rank(np.zeros((8, 8), np.float32), 4)
    assert factors.a.shape == (1, 8) and residual == 0.0 and not factors.b.any()
