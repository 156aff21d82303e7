"""Compute one adapter from several, module by module, as PEFT's add_weighted_adapter does.

    cat           sum over i of w_i s_i B_i A_i, exactly: A and B of the members side by side
    linear        A and B are summed by themselves, each by the root of w_i s_i
    ties          before that, small elements are dropped, and signs that are outvoted
    dare_linear   before that, elements are dropped at random, and the others enlarged
    dare_ties     both: dropped at random, and outvoted

s_i is a member's own scaling, so the result has a scaling of 1. What is dropped at random follows
from the result's digest: the same everywhere. All arithmetic is in float32.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adapter_store.recipes import ELECTING, Recipe

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Factors:
    """One member's part of one module: A [r, in], B [out, r]; `weight` includes the scaling."""

    a: Matrix
    b: Matrix
    weight: float
    key: str  # names the member among all of the recipe


def merge_factors(
    factors: Sequence[Factors], recipe: Recipe, digest: str, module: str
) -> tuple[Matrix, Matrix]:
    """Combine the members that adapt a module. All but `cat` need equal shapes."""
    if recipe.method == "cat":
        scaled = [each.b * np.float32(each.weight) for each in factors]
        return np.concatenate([each.a for each in factors]), np.concatenate(scaled, axis=1)
    roots = [math.sqrt(abs(each.weight)) for each in factors]
    signed = [math.copysign(root, each.weight) for root, each in zip(roots, factors, strict=True)]
    sides: list[Matrix] = []
    for side, tensors, weights in (
        ("A", [each.a for each in factors], signed),
        ("B", [each.b for each in factors], roots),
    ):
        seeds = [f"{digest} {each.key} {module} {side}" for each in factors]
        sides.append(_combine(tensors, weights, seeds, recipe))
    return sides[0], sides[1]


def _combine(
    tensors: Sequence[Matrix], weights: Sequence[float], seeds: Sequence[str], recipe: Recipe
) -> Matrix:
    if recipe.method == "ties":
        tensors = [keep_largest(tensor, recipe.density) for tensor in tensors]
    elif recipe.method in ("dare_linear", "dare_ties"):
        pairs = zip(tensors, seeds, strict=True)
        tensors = [keep_some(tensor, recipe.density, seed) for tensor, seed in pairs]
    weighted = [t * np.float32(w) for t, w in zip(tensors, weights, strict=True)]
    if recipe.method not in ELECTING:
        return _sum(weighted)
    votes = [np.sign(t) if recipe.majority_sign == "frequency" else t for t in tensors]
    elected = np.where(_sum(votes) >= 0, np.float32(1), np.float32(-1))
    agrees = [np.sign(tensor) == elected for tensor in tensors]
    num_agreeing = _sum([each.astype(np.float32) for each in agrees])
    total = _sum([w * each for w, each in zip(weighted, agrees, strict=True)])
    return (total / np.maximum(num_agreeing, np.float32(1))).astype(np.float32, copy=False)


def _sum(tensors: Sequence[Matrix]) -> Matrix:
    total = tensors[0].copy()
    for tensor in tensors[1:]:
        total += tensor
    return total


def keep_largest(tensor: Matrix, density: float) -> Matrix:
    """Keep this part of the elements, the largest; among equal ones the first."""
    if density >= 1.0:
        return tensor
    sizes = np.abs(tensor).ravel()
    num_kept = int(density * sizes.size)
    kept = np.zeros(sizes.size, dtype=bool)
    if num_kept:
        least = np.partition(sizes, sizes.size - num_kept)[sizes.size - num_kept]
        kept = sizes > least
        equal = np.flatnonzero(sizes == least)
        kept[equal[: num_kept - int(kept.sum())]] = True
    return tensor * kept.reshape(tensor.shape)


def keep_some(tensor: Matrix, density: float, seed: str) -> Matrix:
    """Keep each element with this probability, and divide by it."""
    if density >= 1.0:
        return tensor
    return tensor * random_mask(tensor.shape, density, seed) / np.float32(density)


def random_mask(shape: tuple[int, ...], density: float, seed: str) -> npt.NDArray[np.bool_]:
    """Draw the elements that are kept: of this seed always the same."""
    key = np.frombuffer(hashlib.sha256(seed.encode()).digest()[:16], dtype="<u8")
    raw: Any = np.random.Philox(key=key).random_raw(math.prod(shape))
    return ((raw >> np.uint64(11)) * 2.0**-53 < density).reshape(shape)
