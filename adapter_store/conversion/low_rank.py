"""Approximate changes of weights by two factors, and measure what they miss."""

import numpy as np

from adapter_store.conversion.change import Kronecker, Product, Turned
from adapter_store.conversion.tensor_file import Matrix

OVERSAMPLING = 16
MAX_ITERATIONS = 2
ENOUGH = 0.05  # a smaller part of what is missed, gained by an iteration, is the last gain
NEGLIGIBLE = 1e-7  # of the largest singular value: what float32 cannot hold
# Below this residual the difference of two squares has lost its digits, so it is measured
_PRECISE = 0.01
_SMALL = 512  # such a matrix is decomposed as it is


def low_rank(
    change: Matrix | Product | Kronecker | Turned, lora_rank: int, exact_rank: int | None = None
) -> tuple[Product, float]:
    """Return the best factors of at most this rank that were found, and their relative residual.

    A product of at most `exact_rank` is left as it is. The residual is ||change - factors|| /
    ||change|| in Frobenius norms. Singular values below float32's precision are dropped.
    """
    if isinstance(change, Kronecker):
        return _of_kronecker(change, lora_rank)
    if isinstance(change, Product):
        if change.a.shape[0] <= (exact_rank or lora_rank):
            return change, 0.0
        if 2 * change.a.shape[0] <= min(change.b.shape[0], change.a.shape[1]):
            return _reduce(change, lora_rank)
        change = change.b @ change.a
    if min(change.shape) > max(_SMALL, 2 * (lora_rank + OVERSAMPLING)):
        return _sketch(change, lora_rank)
    matrix = change.whole() if isinstance(change, Turned) else change
    u, s, vt = _svd(matrix)
    factors = _truncate(u, s, vt, lora_rank)
    return factors, _residual(matrix, factors)


def _of_kronecker(change: Kronecker, lora_rank: int) -> tuple[Product, float]:
    """Pair the singular values of both sides: their products are those of the whole."""
    u1, s1, vt1 = _svd(change.left)
    u2, s2, vt2 = _svd(change.right)
    values = np.outer(s1, s2).ravel()
    order = np.argsort(-values, kind="stable")
    largest = order[:lora_rank]
    at1, at2 = np.divmod(largest, len(s2))
    u = (u1[:, None, at1] * u2[None, :, at2]).reshape(-1, len(largest))
    vt = (vt1[at1, :, None] * vt2[at2, None, :]).reshape(len(largest), -1)
    factors = _truncate(u, values[largest], vt, lora_rank)
    return factors, _missing(values[order], factors.a.shape[0])


def _missing(values: Matrix, num_kept: int) -> float:
    """Return the norm of the singular values behind the first ones, relative to all."""
    squares = values.astype(np.float64) ** 2
    total = squares.sum()
    return float(np.sqrt(squares[num_kept:].sum() / total)) if total else 0.0


def _svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def _sketch(change: Matrix | Turned, lora_rank: int) -> tuple[Product, float]:
    """Find the leading singular vectors in the image of random ones (Halko et al., 2011).

    Each iteration turns the image towards them, and tells how much of the change it holds. Where
    one gains nearly nothing there are no leading ones, or they are found.
    """
    random = np.random.default_rng(0)  # the same factors, and digest, every time
    size = lora_rank + OVERSAMPLING
    start = random.standard_normal((change.shape[1], size), dtype=np.float32)
    total = _square(change)
    basis = _orthonormal(change @ start)
    rows = change.T @ basis
    held = _square(rows)
    for _ in range(MAX_ITERATIONS):
        if total - held <= NEGLIGIBLE * total:
            break
        basis = _orthonormal(change @ _orthonormal(rows))
        rows = change.T @ basis
        before, held = held, _square(rows)
        if held - before <= ENOUGH * (total - held):
            break
    right, triangle = np.linalg.qr(rows)
    u, s, vt = _svd(triangle.T)
    factors = _truncate(basis @ u, s, vt @ right.T, lora_rank)
    missed = total - float((s[: factors.a.shape[0]].astype(np.float64) ** 2).sum())
    if missed > _PRECISE**2 * total:
        return factors, float(np.sqrt(missed / total))
    return factors, _residual(change.whole() if isinstance(change, Turned) else change, factors)


def _orthonormal(matrix: Matrix) -> Matrix:
    """Make columns orthonormal by their inner products, as few and long ones allow.

    Done twice, it is as exact as the usual way, and three times as fast.
    """
    columns = matrix.astype(np.float64)
    try:
        for _ in range(2):
            lower = np.linalg.cholesky(columns.T @ columns)
            columns = columns @ np.linalg.inv(lower).T
    except np.linalg.LinAlgError:  # they depend on each other
        return np.linalg.qr(matrix)[0]
    return columns.astype(np.float32)


def _square(change: Matrix | Turned) -> float:
    """Return the square of the Frobenius norm."""
    if isinstance(change, Turned):
        return change.square()
    return sum(float(np.dot(row, row)) for row in change.reshape(len(change), -1))


def _reduce(change: Product, lora_rank: int) -> tuple[Product, float]:
    """Decompose a product through its factors' triangles, without the product itself."""
    left, left_r = np.linalg.qr(change.b)
    right, right_r = np.linalg.qr(change.a.T)
    u, s, vt = _svd(left_r @ right_r.T)
    factors = _truncate(left @ u, s, vt @ right.T, lora_rank)
    return factors, _missing(s, factors.a.shape[0])


def _truncate(u: Matrix, s: Matrix, vt: Matrix, lora_rank: int) -> Product:
    """Keep the leading singular values, half of each in either factor; at least one."""
    rank = max(1, min(lora_rank, int((s > NEGLIGIBLE * s[0]).sum())))
    root = np.sqrt(s[:rank])
    return Product(u[:, :rank] * root, root[:, None] * vt[:rank])


def _residual(change: Matrix, factors: Product) -> float:
    total = float(np.linalg.norm(change))
    return float(np.linalg.norm(change - factors.b @ factors.a)) / total if total else 0.0
