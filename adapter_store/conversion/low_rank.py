"""Approximate changes of weights by two factors, and measure what they miss."""

from functools import lru_cache

import numpy as np

from adapter_store.conversion.change import Kronecker, Product, Turned
from adapter_store.conversion.tensor_file import Matrix

OVERSAMPLING = 16
MAX_ITERATIONS = 2
ENOUGH = 0.05  # a smaller part of what is missed, gained by an iteration, is the last gain
THIN = 16  # columns that try an iteration first
NEGLIGIBLE = 1e-7  # of the largest singular value: what float32 cannot hold
# Below this residual the difference of two squares has lost its digits, so it is measured
_PRECISE = 0.01
WELL_CONDITIONED = 1e3  # a triangle: inner products then lose less than float32 holds
_PIECE = 4096  # numbers whose squares are added up in float32
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
    one gains nearly nothing there are no leading ones, or they are found; a few columns, in a third
    of the time, tell beforehand.
    """
    size = lora_rank + OVERSAMPLING
    total = _square(change)
    basis, rows = _image(change, _drawn(change.shape[1], size))
    held = _square(rows)
    if _gain(change, rows[:, :THIN]) * size > ENOUGH * (total - held) * THIN:
        for _ in range(MAX_ITERATIONS):
            if total - held <= NEGLIGIBLE * total:
                break
            basis, rows = _image(change, _orthonormal(rows)[0])
            before, held = held, _square(rows)
            if held - before <= ENOUGH * (total - held):
                break
    right, triangle = _orthonormal(rows)
    u, s, vt = _svd(triangle.T)
    factors = _truncate(basis @ u, s, vt @ right.T, lora_rank)
    missed = total - float((s[: factors.a.shape[0]].astype(np.float64) ** 2).sum())
    if missed > _PRECISE**2 * total:
        return factors, float(np.sqrt(missed / total))
    return factors, _residual(change.whole() if isinstance(change, Turned) else change, factors)


@lru_cache(maxsize=4)  # most modules of a model have one of a few widths
def _drawn(length: int, count: int) -> Matrix:
    """Return random columns: the same ones, and so the same factors and digest, every time."""
    return np.random.default_rng(0).standard_normal((length, count), dtype=np.float32)


def _image(change: Matrix | Turned, columns: Matrix) -> tuple[Matrix, Matrix]:
    """Return orthonormal columns of the change's image, and the change's rows along them."""
    basis = _orthonormal(change @ columns)[0]
    return basis, change.T @ basis


def _gain(change: Matrix | Turned, rows: Matrix) -> float:
    """Return how much more of the change an iteration of these rows holds, at most of what is
    worth anything."""
    return _square(_image(change, _orthonormal(rows)[0])[1]) - _square(rows)


def _orthonormal(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """Return Q and R of a matrix with few and long columns, by their inner products.

    As exact as the usual way if it is done twice where columns nearly depend on each other, and
    three times as fast.
    """
    columns, upper = matrix.astype(np.float64), np.eye(matrix.shape[1])
    try:
        for _ in range(2):
            lower = np.linalg.cholesky(columns.T @ columns)
            columns, upper = columns @ np.linalg.inv(lower).T, lower.T @ upper
            if np.linalg.cond(lower) < WELL_CONDITIONED:
                break
    except np.linalg.LinAlgError:  # they depend on each other
        q, r = np.linalg.qr(matrix)
        return q, r
    return columns.astype(np.float32), upper.astype(np.float32)


def _square(change: Matrix | Turned) -> float:
    """Return the square of the Frobenius norm."""
    if isinstance(change, Turned):
        return change.square()
    numbers = np.ascontiguousarray(change).reshape(-1)
    pieces = (numbers[i : i + _PIECE] for i in range(0, numbers.size, _PIECE))
    return sum(float(np.dot(piece, piece)) for piece in pieces)


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
