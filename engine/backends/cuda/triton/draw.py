"""Draws a token from each of many rows of logits, by its own temperature, filters and noise.

    floors   the smallest logit / temperature that a row's top-k and top-p keep
    draw     argmax of logit / temperature + Gumbel noise over the tokens at or above the floor

Semantics and results equal those of `engine.backends.cuda.draw`: the noise is the same hash, and
the floors count tokens and probabilities as integers, so that sums do not depend on their order. A
floor is found from the highest bits of a number to the lowest, two at a time, with one pass over
the row for each: nothing is sorted, and nothing of the size of the logits is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from engine.backends.cuda.triton.launch import interpreting

MASS_SCALE = tl.constexpr(float(2**40))  # a probability of 1 relative to the likeliest token's
_LOG2_E = tl.constexpr(1.4426950408889634)
_KEY_OF_NOTHING = tl.constexpr(-2139095041)  # key of minus infinity
FLOOR_BLOCK, FLOOR_WARPS = 4096, 16
DRAW_BLOCK, DRAW_WARPS = 1024, 4
DRAW_PART = 8192  # tokens per program


def floors(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    floor: Tensor,
) -> None:
    """Set floor [D] = max(floor, logit / temperature at which top-k and then top-p cut).

    logits [B, V] float32 with adjacent columns; rows [D] int32 indices into them; temperature and
    top_p [D] float32; top_k [D] int32. top_k 0 and top_p 1 are off.
    """
    _floors_kernel[(len(rows),)](
        logits,
        rows,
        temperature,
        top_k,
        top_p,
        floor,
        logits.stride(0),
        logits.shape[1],
        BLOCK=FLOOR_BLOCK,
        num_warps=FLOOR_WARPS,
    )


def draw(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    floor: Tensor,
    key_low: Tensor,
    key_high: Tensor,
) -> Tensor:
    """Draw int64 [D]: one of the tokens whose logit / temperature is at least the floor [D].

    key_low and key_high [D] int32 are the halves of each row's noise key.
    """
    num_parts = triton.cdiv(logits.shape[1], DRAW_PART)
    best = torch.empty(len(rows), num_parts, device=logits.device)
    token_ids = torch.empty(len(rows), num_parts, dtype=torch.int32, device=logits.device)
    _draw_kernel[(len(rows), num_parts)](
        logits,
        rows,
        temperature,
        floor,
        key_low,
        key_high,
        best,
        token_ids,
        logits.stride(0),
        logits.shape[1],
        num_parts,
        PART=DRAW_PART,
        BLOCK=DRAW_BLOCK,
        IS_INTERPRETED=interpreting(),
        num_warps=DRAW_WARPS,
    )
    return token_ids.gather(1, best.argmax(1, keepdim=True))[:, 0].long()


@triton.jit
def _floors_kernel(
    logits,
    rows,
    temperature,
    top_k,
    top_p,
    floor,
    logits_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    """Find the smallest kept logit and divide only that: division preserves order."""
    draw = tl.program_id(0)
    row = logits + tl.load(rows + draw).to(tl.int64) * logits_stride
    t = tl.load(temperature + draw)
    k = tl.load(top_k + draw)
    p = tl.load(top_p + draw)
    kept = tl.full((), _KEY_OF_NOTHING, tl.int32)
    if (k > 0) & (k < vocab):
        kept = _key_of_floor(row, 0.0, 0.0, kept, k, vocab, False, BLOCK)
    if p < 1.0:
        top = _highest(row, vocab, BLOCK)
        rate = tl.minimum(tl.div_rn(_LOG2_E, t), 3e38)  # finite: 0 times it is 0
        masses = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, vocab, BLOCK):
            values = _logits(row, start, vocab, BLOCK)
            masses += _mass(values, _key(values) >= kept, top, rate)
        total = tl.sum(masses, 0)
        needed = tl.ceil(total.to(tl.float64) * p.to(tl.float64)).to(tl.int64)
        needed = tl.maximum(tl.minimum(needed, total), 1)
        kept = _key_of_floor(row, top, rate, kept, needed, vocab, True, BLOCK)
    least = tl.div_rn(_value(kept), t)
    tl.store(floor + draw, tl.maximum(tl.load(floor + draw), least))


@triton.jit
def _key_of_floor(row, top, rate, kept, needed, vocab, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest key such that all tokens of at least this key weigh `needed` or more.

    A token weighs 1, or with BY_MASS its mass, which is 0 below `kept`. Never less than `kept`.
    """
    WEIGHT: tl.constexpr = tl.int64 if BY_MASS else tl.int32
    chosen = tl.full((), -2147483648, tl.int32)
    step = tl.full((), 1 << 30, tl.int32)
    for _ in range(16):
        second = chosen + step
        third = second + step
        fourth = third + step
        from_second = tl.zeros((BLOCK,), WEIGHT)
        from_third = tl.zeros((BLOCK,), WEIGHT)
        from_fourth = tl.zeros((BLOCK,), WEIGHT)
        for start in range(0, vocab, BLOCK):
            values = _logits(row, start, vocab, BLOCK)
            key = _key(values)
            weight = _mass(values, key >= kept, top, rate) if BY_MASS else 1
            from_second += tl.where(key >= second, weight, 0)
            from_third += tl.where(key >= third, weight, 0)
            from_fourth += tl.where(key >= fourth, weight, 0)
        chosen = tl.where(tl.sum(from_second, 0) >= needed, second, chosen)
        chosen = tl.where(tl.sum(from_third, 0) >= needed, third, chosen)
        chosen = tl.where(tl.sum(from_fourth, 0) >= needed, fourth, chosen)
        step = step >> 2
    return tl.maximum(chosen, kept)


@triton.jit
def _highest(row, vocab, BLOCK: tl.constexpr):
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        highest = tl.maximum(highest, _logits(row, start, vocab, BLOCK))
    return tl.max(highest, 0)


@triton.jit
def _logits(row, start, vocab, BLOCK: tl.constexpr):
    """Load BLOCK logits from `start` on; minus infinity past the end of the vocabulary."""
    ids = start + tl.arange(0, BLOCK)
    return tl.load(row + ids, mask=ids < vocab, other=float("-inf"))


@triton.jit
def _mass(values, counts, top, rate):
    share = tl.exp2((values - top) * rate)
    return tl.where(counts, (share * MASS_SCALE + 0.5).to(tl.int64), 0)


@triton.jit
def _key(values):
    """Map float32 to int32 in the same order; both zeros get one key."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _draw_kernel(
    logits,
    rows,
    temperature,
    floor,
    key_low,
    key_high,
    best,
    token_ids,
    logits_stride,
    vocab,
    num_parts,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    draw = tl.program_id(0)
    part = tl.program_id(1)
    row = logits + tl.load(rows + draw).to(tl.int64) * logits_stride
    t = tl.load(temperature + draw)
    least = tl.load(floor + draw)
    low = tl.load(key_low + draw).to(tl.uint32, bitcast=True)
    high = tl.load(key_high + draw).to(tl.uint32, bitcast=True)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    winners = part * PART + tl.arange(0, BLOCK)
    for start in range(part * PART, min((part + 1) * PART, vocab), BLOCK):
        values, mask = _scaled(row, t, start, vocab, BLOCK)
        ids = start + tl.arange(0, BLOCK)
        noisy = values + _gumbel(ids, low, high, IS_INTERPRETED)
        is_better = mask & (values >= least) & (noisy > highest)
        highest = tl.where(is_better, noisy, highest)
        winners = tl.where(is_better, ids, winners)
    value = tl.max(highest, 0)
    place = draw * num_parts + part
    tl.store(best + place, value)
    tl.store(token_ids + place, tl.min(tl.where(highest == value, winners, 0x7FFFFFFF), 0))


@triton.jit
def _scaled(row, t, start, vocab, BLOCK: tl.constexpr):
    ids = start + tl.arange(0, BLOCK)
    mask = ids < vocab
    return tl.div_rn(tl.load(row + ids, mask=mask, other=0.0), t), mask


@triton.jit
def _gumbel(ids, low, high, IS_INTERPRETED: tl.constexpr):
    words = _mix32(_mix32(ids.to(tl.uint32) ^ low) + high)
    uniform = ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
    if IS_INTERPRETED:
        return -tl.log(-tl.log(uniform))
    return -libdevice.log(-libdevice.log(uniform))  # tl.log is wrong where its result is near 0


@triton.jit
def _mix32(x):
    """MurmurHash3's 32-bit finalizer (Appleby)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
