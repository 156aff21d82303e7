"""Paged decode: attends one query per request to its own keys, split among programs.

A program takes the query heads of one KV head, padded to the 16 rows that the tensor cores
multiply, and one stretch of keys. It stores its mean of the values and the logarithm of the sum
of its weights; a second kernel combines the stretches (split-KV, or "flash decoding": Dao, Haziza,
Massa and Sizov, 2023). The stretches of a request depend on its own length and on `num_splits`
alone, so a row's bits do not depend on its batch mates.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.backends.cuda.triton.attention_tile import (
    MAX_SPLITS,
    absorb,
    check_scratch,
    check_shapes,
    load_tile,
    score_constants,
    scores_of,
    stretch,
    tile_constants,
)
from engine.backends.cuda.triton.launch import power_of_two

# None of these was measured on real hardware.
PROGRAMS_PER_SM = 4  # target of splitting: more than run concurrently, to even out lengths
MAX_KEYS_PER_SPLIT = 8192  # target in long contexts, so that one row does not delay a batch
MIN_TILES_PER_SPLIT = 2  # a shorter stretch is not worth its cost in the second kernel
NUM_WARPS = 4
NUM_STAGES = 5  # keys are found through the table: with fewer, copies and compute do not overlap


def choose_num_splits(batch: int, kv_heads: int, num_sms: int, max_context_len: int) -> int:
    """Choose into how many stretches `paged_decode` cuts the longest rows.

    Constant for a CUDA graph. Gives enough programs for `num_sms` multiprocessors, and also in
    large batches splits a row of `max_context_len` keys among several programs.
    """
    to_fill = -(-PROGRAMS_PER_SM * num_sms // (batch * kv_heads))
    for_length = min(8, -(-max_context_len // MAX_KEYS_PER_SPLIT))
    useful = -(-max_context_len // (MIN_TILES_PER_SPLIT * 32))
    return max(1, min(max(to_fill, for_length), useful, MAX_SPLITS))


def decode_scratch_numel(batch: int, heads: int, head_dim: int, num_splits: int) -> int:
    """Number of float32 elements of scratch that `paged_decode` needs for the stretches."""
    return 0 if num_splits == 1 else batch * heads * num_splits * (head_dim + 1)


def paged_decode(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    scratch: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    num_splits: int,
) -> None:
    """Compute out [B, H, D] = attention of q [B, H, D] over keys [0, context_lens[i]) of row i.

    kv_layer [blocks, 2, block_size, H_kv, D] strided over blocks, block_tables int32 [B, W],
    context_lens int32 [B]; a length of 0 gives a row of zeros and reads nothing. `scratch` is
    float32 [`decode_scratch_numel`], undefined before and after. Raises ValueError.
    """
    check_shapes(q, kv_layer, out)
    batch, heads, head_dim = q.shape
    needed = decode_scratch_numel(batch, heads, head_dim, num_splits)
    check_scratch(scratch, needed, num_splits)
    block_size, kv_heads = kv_layer.shape[2:4]
    constants = decode_constants(heads, kv_heads, head_dim, block_size, q.dtype, window)
    log_sums = scratch[needed // (head_dim + 1) * head_dim :]
    _decode[batch, kv_heads, num_splits](
        q,
        kv_layer,
        block_tables,
        context_lens,
        out,
        scratch,
        log_sums,
        q.stride(0),
        out.stride(0),
        kv_layer.stride(0),
        block_tables.stride(0),
        num_splits,
        **constants,
        **score_constants(scale, soft_cap),
        SPLIT=num_splits > 1,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    if num_splits > 1:
        _combine[batch, heads](
            context_lens,
            out,
            scratch,
            log_sums,
            out.stride(0),
            num_splits,
            **combine_constants(constants),
            num_warps=NUM_WARPS,
        )


@cache
def decode_constants(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
) -> dict[str, Any]:
    return {
        **tile_constants(heads, kv_heads, head_dim, block_size, dtype),
        "TILE_ROWS": max(16, power_of_two(heads // kv_heads)),
        "WINDOW": window or 0,
        "MIN_TILES": MIN_TILES_PER_SPLIT,
    }


def combine_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Select the first kernel's constants that the second one is specialized for too."""
    names = ("HEAD_DIM", "PADDED_DIM", "TILE_KEYS", "WINDOW", "MIN_TILES")
    return {**{name: constants[name] for name in names}, "MAX_SPLITS": MAX_SPLITS}


@triton.jit
def _tiles_of(context_len, WINDOW: tl.constexpr, TILE_KEYS: tl.constexpr):
    """Return the tiles [first, last) of keys that a query at the end of a context sees."""
    first = tl.maximum(context_len - WINDOW, 0) // TILE_KEYS if WINDOW > 0 else 0
    return first, tl.cdiv(context_len, TILE_KEYS)


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _decode(
    q,
    kv,
    block_tables,
    context_lens,
    out,
    partials,
    log_sums,
    q_stride,
    out_stride,
    block_stride,
    table_stride,
    num_splits,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context_len = tl.load(context_lens + request)
    begin, end = _tiles_of(context_len, WINDOW, TILE_KEYS)
    begin, end = stretch(begin, end, split, num_splits, MIN_TILES)
    if SPLIT:  # noqa: SIM102 (the compile-time condition stands alone)
        if begin >= end:
            return  # the second kernel skips this split
    member = tl.arange(0, TILE_ROWS)
    head = kv_head * GROUP + member
    dims = tl.arange(0, PADDED_DIM)
    inside = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    place = head[:, None] * HEAD_DIM + dims[None, :]
    query = tl.load(q + request.to(tl.int64) * q_stride + place, mask=inside, other=0.0)
    table = block_tables + request.to(tl.int64) * table_stride
    acc = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    high = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    for tile in range(begin, end):
        positions = tile * TILE_KEYS + tl.arange(0, TILE_KEYS)
        seen = positions < context_len
        if WINDOW > 0:
            seen &= positions >= context_len - WINDOW
        k, v = load_tile(
            kv,
            table,
            positions,
            seen,
            kv_head,
            block_stride,
            BLOCK_SIZE,
            KV_HEADS,
            HEAD_DIM,
            PADDED_DIM,
            True,
        )
        scores = scores_of(query, k, SCALE, SOFT_CAP, UPCAST)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        acc, total, high = absorb(acc, total, high, scores, v, SCALE, SOFT_CAP, UPCAST)
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: a row without keys
    if SPLIT:
        row = (request.to(tl.int64) * KV_HEADS * GROUP + head) * num_splits + split
        tl.store(partials + row[:, None] * HEAD_DIM + dims[None, :], mean, mask=inside)
        tl.store(log_sums + row, high + tl.log2(total), mask=member < GROUP)
    else:
        target = out + request.to(tl.int64) * out_stride + place
        tl.store(target, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_splits"])
def _combine(
    context_lens,
    out,
    partials,
    log_sums,
    out_stride,
    num_splits,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Compute out = the stretches' means, weighted by their sums.

    Stretches without keys were never written and are not read.
    """
    request, head = tl.program_id(0), tl.program_id(1)
    context_len = tl.load(context_lens + request)
    split = tl.arange(0, MAX_SPLITS)
    first, last = _tiles_of(context_len, WINDOW, TILE_KEYS)
    begin, end = stretch(first, last, split, num_splits, MIN_TILES)
    used = (begin < end) & (split < num_splits)
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < HEAD_DIM
    row = (request.to(tl.int64) * tl.num_programs(1) + head) * num_splits + split
    log_sum = tl.load(log_sums + row, mask=used, other=float("-inf"))
    parts = partials + row[:, None] * HEAD_DIM + dims[None, :]
    means = tl.load(parts, mask=used[:, None] & inside[None, :], other=0.0)
    highest = tl.max(log_sum, 0)
    weight = tl.exp2(log_sum - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight, 0)
    mean = tl.sum(weight[:, None] * means, 0) / tl.where(total == 0.0, 1.0, total)
    target = out + request.to(tl.int64) * out_stride + head * HEAD_DIM + dims
    tl.store(target, mean.to(out.dtype.element_ty), mask=inside)
