"""Draws tokens for many rows at once, without the host; `sampler` does the same row by row.

The noise is equal in every bit, so a request draws the same tokens on any device. Top-k and top-p
need no sorting: both need the largest value at or above which there are enough tokens, or enough
probability, and histograms find it digit by digit (a radix selection). Probabilities are counted as
integers, so that sums do not depend on their order and a result depends on its row alone.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.sampler import NOISE_BITS

MASS_BITS = 40  # a probability of 1 relative to the likeliest token's is 2**40
DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of a 32-bit number, the highest first


@dataclass(frozen=True, slots=True)
class Draws:
    """The D rows to draw for. Temperatures are above 0; top_k 0, top_p 1 and min_p 0 are off."""

    rows: Tensor  # [D] int32: which rows of the logits
    temperature: Tensor  # [D] float32
    top_k: Tensor  # [D] int32
    top_p: Tensor  # [D] float32
    min_p: Tensor  # [D] float32
    key_low: Tensor  # [D] int32: the noise's key
    key_high: Tensor  # [D] int32
    has_filters: bool  # any row has a top_k, top_p or min_p


class Draw(Protocol):
    def __call__(self, logits: Tensor, draws: Draws, highest: Tensor, best: Tensor) -> Tensor:
        """Draw tokens [D] int64 from logits [B, V] float32.

        `highest` and `best` [B] are each row's largest logit and its token. Gives the likeliest
        token if the temperature is so small that dividing by it overflows.
        """
        ...


def draw(logits: Tensor, draws: Draws, highest: Tensor, best: Tensor) -> Tensor:
    """Implement Draw with torch, in about twenty times the memory of the rows' logits."""
    rows = logits.index_select(0, draws.rows)
    scaled = rows / draws.temperature[:, None]
    noisy = gumbel_rows(draws.key_low, draws.key_high, rows.shape[1]).add_(scaled)
    if draws.has_filters:
        noisy.masked_fill_(scaled < floors(scaled, draws)[:, None], -torch.inf)
    return likeliest_unless_finite(noisy.argmax(-1), draws, highest, best)


def likeliest_unless_finite(drawn: Tensor, draws: Draws, highest: Tensor, best: Tensor) -> Tensor:
    """Return drawn [D] int64 where the largest logit / temperature is finite, else `best`."""
    is_finite = (highest.index_select(0, draws.rows) / draws.temperature).isfinite()
    return torch.where(is_finite, drawn, best.index_select(0, draws.rows))


# ==== top-k, top-p, min-p ====


def floors(scaled: Tensor, draws: Draws) -> Tensor:
    """Return, per row of scaled logits [D, V], the least one [D] that its filters leave."""
    vocab = scaled.shape[1]
    highest = scaled.amax(-1)
    floor = highest + draws.min_p.log()
    ones = torch.ones_like(scaled, dtype=torch.int64)
    kth = weighted_floor(scaled, ones, draws.top_k.long().clamp(1, vocab))
    has_top_k = (draws.top_k > 0) & (draws.top_k < vocab)
    kth = torch.where(has_top_k, kth, -torch.inf)
    mass = ((scaled - highest[:, None]).exp().double() * 2.0**MASS_BITS).round().long()
    mass = mass.masked_fill_(scaled < kth[:, None], 0)
    total = mass.sum(-1)
    needed = (total.double() * draws.top_p.double()).ceil().long()
    nucleus = weighted_floor(scaled, mass, torch.minimum(needed, total).clamp(min=1))
    nucleus = torch.where(draws.top_p < 1, nucleus, -torch.inf)
    return torch.maximum(torch.maximum(floor, kth), nucleus)


def weighted_floor(values: Tensor, weights: Tensor, needed: Tensor) -> Tensor:
    """Find the largest value of each row such that it and larger ones weigh at least `needed`.

    values float32 [D, V], weights int64 [D, V]; needed int64 [D], at most the row's total weight.
    Returns [D].
    """
    keys = _sortable(values)
    chosen = torch.zeros_like(needed)
    for shift, bits in DIGITS:
        digits = (keys >> shift) & (2**bits - 1)
        mass = torch.zeros(len(values), 2**bits, dtype=torch.int64, device=values.device)
        mass.scatter_add_(1, digits, weights)
        reached = mass.flip(1).cumsum(1).flip(1)  # weight of this digit and all above it
        digit = (reached >= needed[:, None]).sum(1, keepdim=True).sub_(1).clamp_(min=0)
        needed = needed - (reached - mass).gather(1, digit)[:, 0]
        weights = weights.masked_fill(digits != digit, 0)
        chosen = (chosen << bits) | digit[:, 0]
    return _from_sortable(chosen)


def _sortable(values: Tensor) -> Tensor:
    """Map float32 to int64 in [0, 2**32), keeping the order; both zeros become one value."""
    bits = (values + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 2**31


def _from_sortable(keys: Tensor) -> Tensor:
    bits = (keys - 2**31).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


# ==== noise ====


def gumbel_rows(key_low: Tensor, key_high: Tensor, vocab: int) -> Tensor:
    """Compute Gumbel noise [D, vocab] float32: `sampler.gumbel_noise` of every row's key."""
    words = torch.arange(vocab, dtype=torch.int32, device=key_low.device) ^ key_low[:, None]
    shifted = torch.empty_like(words)
    _mix32_(words, shifted)
    words += key_high[:, None]
    _mix32_(words, shifted)
    bits = (words >> (32 - NOISE_BITS)) & (2**NOISE_BITS - 1)
    uniform = bits.float().add_(0.5).mul_(2.0**-NOISE_BITS)
    return uniform.log_().neg_().log_().neg_()


def noise_keys(seeds: list[int], positions: list[int]) -> tuple[NDArray[np.int32], ...]:
    """Compute the keys of `sampler.gumbel_noise`, as two halves of [D] each."""
    seed = np.array([s & (2**64 - 1) for s in seeds], dtype=np.uint64)
    place = np.array(positions, dtype=np.uint64) + np.uint64(1)
    key = _mix64(seed ^ _mix64(place))
    return (key & np.uint64(2**32 - 1)).astype(np.uint32).view(np.int32), (
        key >> np.uint64(32)
    ).astype(np.uint32).view(np.int32)


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finalizer (Steele et al. 2014); unsigned arrays wrap silently."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix32_(x: Tensor, scratch: Tensor) -> None:
    """Apply MurmurHash3's 32-bit finalizer (Appleby) in place, to int32 that wraps."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        scratch &= 2 ** (32 - shift) - 1  # a logical shift
        x ^= scratch
        if factor != 1:
            x *= factor - 2**32
