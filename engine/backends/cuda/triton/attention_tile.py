"""Parts of paged decode and paged prefill: load a tile of keys, score it, update the softmax.

M rows are queries that share one KV head: queries of one or several positions times the query
heads of the group. The softmax is computed online, tile after tile (Milakov and Gimelshein, "Online
normalizer calculation for softmax"; Dao et al., "FlashAttention"): `high` [M] is the highest
score so far, `total` [M] the sum of 2^(score - high), `acc` [M, PADDED_DIM] the sum of the values
with the same weights. Scores include a factor of log2(e), so that powers of two suffice.

Keys that no row may see are not read, and their values are zeros: if a stale slot holds NaN or
infinity, a weight of 0 times that would be NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from engine.backends.cuda.triton.launch import power_of_two, upcast

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_HEAD_DIM = 256
MAX_SPLITS = 32


def tile_constants(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the constants that both kernels are specialized for. Raises ValueError.

    A tile has at most 16 KiB of keys, or 32 KiB in float32, which is for tests.
    """
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {head_dim}: need a multiple of 8 from 8 to {MAX_HEAD_DIM}")
    if block_size < 16 or block_size % 16:
        raise ValueError(f"block_size {block_size}: need a multiple of 16")
    padded = max(16, power_of_two(head_dim))
    return {
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded,
        "BLOCK_SIZE": block_size,
        "TILE_KEYS": 64 if padded <= 128 and dtype.itemsize == 2 else 32,
        "UPCAST": upcast(dtype),
    }


def score_constants(scale: float, soft_cap: float | None) -> dict[str, float]:
    """Return the constants of scoring. Raises ValueError unless both are above 0.

    Scores are scaled after their maximum is taken, so scaling must preserve their order.
    """
    if not scale > 0 or (soft_cap is not None and not soft_cap > 0):
        raise ValueError(f"scale {scale} and soft_cap {soft_cap}: need numbers above 0")
    return {"SCALE": scale, "SOFT_CAP": soft_cap or 0.0}


def check_scratch(scratch: torch.Tensor, numel: int, num_splits: int) -> None:
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits {num_splits}: need 1 to {MAX_SPLITS}")
    if scratch.numel() < numel or scratch.dtype != torch.float32:
        raise ValueError(f"scratch {scratch.dtype} of {scratch.numel()}: need float32 of {numel}")


def check_shapes(q: torch.Tensor, kv_layer: torch.Tensor, out: torch.Tensor) -> None:
    """Raise ValueError unless shapes, strides and dtypes are as the kernels require.

    q and out [N, H, D] with contiguous rows, kv_layer [blocks, 2, block_size, H_kv, D] with
    contiguous blocks.
    """
    _, two, block_size, kv_heads, head_dim = kv_layer.shape
    side = kv_heads * head_dim
    if two != 2 or kv_layer.stride()[1:] != (block_size * side, side, head_dim, 1):
        raise ValueError(
            f"kv_layer {tuple(kv_layer.shape)} with strides {kv_layer.stride()}: need "
            "[blocks, 2, block_size, H_kv, D] whose blocks are contiguous"
        )
    if q.shape != out.shape or q.shape[2] != head_dim or q.shape[1] % kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)} and out {tuple(out.shape)}: need [N, H, {head_dim}] with H a "
            f"multiple of {kv_heads}"
        )
    for tensor in (q, out):
        if tensor.stride()[1:] != (head_dim, 1) or tensor.dtype != kv_layer.dtype:
            raise ValueError(
                f"{tensor.dtype} with strides {tensor.stride()}: need {kv_layer.dtype} with "
                f"strides (any, {head_dim}, 1)"
            )


@triton.jit
def load_tile(
    kv,
    table,
    positions,
    readable,
    kv_head,
    block_stride,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load keys and values [keys, PADDED_DIM] of one request's positions; zeros if not readable.

    Without MASKED all of them are readable. A block starts at a multiple of 16 elements, a head at
    a multiple of HEAD_DIM: both are known at compile time, which allows 16-byte loads.
    """
    entries = table + positions // BLOCK_SIZE
    dims = tl.arange(0, PADDED_DIM)
    inside = (dims < HEAD_DIM)[None, :]
    if MASKED:
        block = tl.load(entries, mask=readable, other=0)
        inside = inside & readable[:, None]
    else:
        block = tl.load(entries)
    row = tl.multiple_of(block.to(tl.int64) * block_stride, 16)
    row += (positions % BLOCK_SIZE * KV_HEADS + kv_head) * HEAD_DIM
    keys = kv + row[:, None] + dims[None, :]
    values = keys + BLOCK_SIZE * KV_HEADS * HEAD_DIM
    if MASKED or HEAD_DIM < PADDED_DIM:
        k = tl.load(keys, mask=inside, other=0.0)
        v = tl.load(values, mask=inside, other=0.0)
    else:
        k = tl.load(keys)
        v = tl.load(values)
    return k, v


@triton.jit
def scores_of(q, k, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr, UPCAST: tl.constexpr):
    """Return q @ k^T [M, keys], which `absorb` scales.

    With a cap, returns tanh(q @ k^T * SCALE / SOFT_CAP), which `absorb` multiplies by the cap.
    """
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFT_CAP > 0:
        power = tl.exp2(scores * (2 * LOG2_E * SCALE / SOFT_CAP))
        scores = 1 - 2 / (power + 1)  # tanh, correct for infinite powers too
    return scores


@triton.jit
def absorb(
    acc,
    total,
    high,
    scores,
    v,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Update acc, total and high with one more tile; scores of keys a row cannot see are -inf.

    Scores are scaled here, because scaling and subtraction are one instruction.
    """
    factor: tl.constexpr = LOG2_E * (SOFT_CAP if SOFT_CAP > 0 else SCALE)
    new_high = tl.maximum(high, tl.max(scores, 1) * factor)
    # a row that has seen no key yet would compute -inf - (-inf)
    base = tl.where(new_high == float("-inf"), 0.0, new_high)
    weights = tl.exp2(scores * factor - base[:, None])
    shrink = tl.exp2(high - base)
    total = total * shrink + tl.sum(weights, 1)
    if UPCAST:
        v = v.to(tl.float32)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_high


@triton.jit
def stretch(first, last, split, num_splits, MIN_TILES: tl.constexpr):
    """Return the part [begin, end) of the tiles [first, last) for one split, or a tensor of them.

    At least MIN_TILES except in the last non-empty split; begin >= end: the split is empty.
    """
    tiles = tl.maximum(tl.cdiv(last - first, num_splits), MIN_TILES)
    begin = first + split * tiles
    return begin, tl.minimum(begin + tiles, last)
