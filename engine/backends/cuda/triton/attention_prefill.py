"""Paged prefill: attends the new tokens of several requests to their own keys, old and new.

A program takes a tile of adjacent query rows times the query heads of one KV head and loops over
the keys that any of them sees. Only tiles of keys at either end of that range are masked: most
keys of a long context are seen by every row, and need no comparison.

A few new tokens after a long context, as in the next turn of a conversation, give too few tiles
for a GPU. Then the keys of a tile are split among programs, as in `attention_decode`.
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

MIN_TILES_PER_SPLIT = 4  # a shorter stretch is not worth storing its sums; not measured
COMBINED_ROWS = 16  # rows of a tile that one program combines


def choose_prefill_splits(num_tiles: int, kv_heads: int, num_sms: int, max_context_len: int) -> int:
    """Choose into how many stretches `paged_prefill` cuts the longest contexts.

    At most one program for each of `num_sms` multiprocessors.
    """
    useful = -(-max_context_len // (MIN_TILES_PER_SPLIT * 32))
    return max(1, min(num_sms // (num_tiles * kv_heads), useful, MAX_SPLITS))


def prefill_scratch_numel(
    num_tiles: int, heads: int, kv_heads: int, head_dim: int, tile_tokens: int, num_splits: int
) -> int:
    """Number of float32 elements of scratch that `paged_prefill` needs for the stretches."""
    rows = num_tiles * kv_heads * num_splits * _tile_rows(heads, kv_heads, tile_tokens)
    return 0 if num_splits == 1 else rows * (head_dim + 1)


def _tile_rows(heads: int, kv_heads: int, tile_tokens: int) -> int:
    return max(16, tile_tokens * power_of_two(heads // kv_heads))


def paged_prefill(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    tiles: Tensor,
    out: Tensor,
    scratch: Tensor,
    *,
    tile_tokens: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    num_splits: int,
) -> None:
    """Compute out [N, H, D] = causal attention of the rows of q [N, H, D] that lie in `tiles`.

    The other arguments are as in `engine.backends.cuda.positions`: int32 block_tables [B, W],
    context_lens [B], cu_seqlens_q [B + 1] and tiles [T, 2] of `tile_tokens` query rows, a power of
    two. Rows outside all tiles are not touched. `scratch` is float32 [`prefill_scratch_numel`],
    undefined before and after. Raises ValueError.
    """
    check_shapes(q, kv_layer, out)
    if tile_tokens < 1 or tile_tokens & (tile_tokens - 1):
        raise ValueError(f"tile_tokens {tile_tokens}: need a power of two")
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = kv_layer.shape[2:4]
    constants = prefill_constants(
        heads, kv_heads, head_dim, block_size, q.dtype, tile_tokens, window
    )
    shape = (len(tiles), heads, kv_heads, head_dim, tile_tokens, num_splits)
    needed = prefill_scratch_numel(*shape)
    check_scratch(scratch, needed, num_splits)
    log_sums = scratch[needed // (head_dim + 1) * head_dim :]
    _prefill[len(tiles), kv_heads, num_splits](
        q,
        kv_layer,
        block_tables,
        context_lens,
        cu_seqlens_q,
        tiles,
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
        **prefill_options(constants),
    )
    if num_splits > 1:
        _combine[len(tiles), kv_heads, constants["TILE_ROWS"] // COMBINED_ROWS](
            context_lens,
            cu_seqlens_q,
            tiles,
            out,
            scratch,
            log_sums,
            out.stride(0),
            num_splits,
            **combine_constants(constants),
            num_warps=4,
        )


@cache
def prefill_constants(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    tile_tokens: int,
    window: int | None,
) -> dict[str, Any]:
    return {
        **tile_constants(heads, kv_heads, head_dim, block_size, dtype),
        "PADDED_GROUP": power_of_two(heads // kv_heads),
        "TILE_TOKENS": tile_tokens,
        "TILE_ROWS": _tile_rows(heads, kv_heads, tile_tokens),
        "WINDOW": window or 0,
        "MIN_TILES": MIN_TILES_PER_SPLIT,
    }


def combine_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Select the first kernel's constants that the second one is specialized for too."""
    kept = {n: value for n, value in constants.items() if n not in ("BLOCK_SIZE", "UPCAST")}
    return {**kept, "MAX_SPLITS": MAX_SPLITS, "ROWS": COMBINED_ROWS}


def prefill_options(constants: dict[str, Any]) -> dict[str, int]:
    """Choose warps and stages; not measured on real hardware.

    Keys are found through the table: on an sm_80, copies and compute overlap only from 5 stages
    on; for wide heads 5 stages take more shared memory than smaller GPUs have.
    """
    padded = constants["PADDED_DIM"]
    return {
        "num_warps": 8 if constants["TILE_ROWS"] * padded >= 128 * 64 else 4,
        "num_stages": 5 if padded <= 128 else 3,
    }


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def _prefill(
    q,
    kv,
    block_tables,
    context_lens,
    cu_seqlens_q,
    tiles,
    out,
    partials,
    log_sums,
    q_stride,
    out_stride,
    block_stride,
    table_stride,
    num_splits,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = tl.load(tiles + 2 * tile)
    if request < 0:
        return
    first_row, end_row, shift = _rows_of(tiles, tile, cu_seqlens_q, context_lens, TILE_TOKENS)
    first, last = first_row + shift, end_row - 1 + shift
    lowest, begin, full_begin, full_end, end = _tiles_of(first, last, WINDOW, TILE_KEYS)
    if SPLIT:
        begin, end = stretch(begin, end, split, num_splits, MIN_TILES)
        if begin >= end:
            return  # the second kernel skips this split
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, begin), end)

    place = tl.arange(0, TILE_ROWS)
    row, member = first_row + place // PADDED_GROUP, place % PADDED_GROUP
    dims = tl.arange(0, PADDED_DIM)
    inside = ((row < end_row) & (member < GROUP))[:, None] & (dims < HEAD_DIM)[None, :]
    column = (kv_head * GROUP + member)[:, None] * HEAD_DIM + dims[None, :]
    wide_row = row.to(tl.int64)[:, None]
    query = tl.load(q + wide_row * q_stride + column, mask=inside, other=0.0)
    acc = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    high = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    table = block_tables + request.to(tl.int64) * table_stride
    if WINDOW > 0:
        acc, total, high = _walk(
            acc, total, high, query, row + shift, lowest, last, begin, full_begin,
            kv, table, kv_head, block_stride, KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE,
            TILE_KEYS, SCALE, WINDOW, SOFT_CAP, UPCAST, True,
        )  # fmt: skip
    acc, total, high = _walk(
        acc, total, high, query, row + shift, lowest, last, full_begin, full_end,
        kv, table, kv_head, block_stride, KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE,
        TILE_KEYS, SCALE, WINDOW, SOFT_CAP, UPCAST, False,
    )  # fmt: skip
    acc, total, high = _walk(
        acc, total, high, query, row + shift, lowest, last, full_end, end,
        kv, table, kv_head, block_stride, KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE,
        TILE_KEYS, SCALE, WINDOW, SOFT_CAP, UPCAST, True,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # 0: a row that saw no key
    mean = acc / total[:, None]
    if SPLIT:
        part = ((tile * KV_HEADS + kv_head) * num_splits + split).to(tl.int64) * TILE_ROWS + place
        target = partials + part[:, None] * HEAD_DIM + dims[None, :]
        tl.store(target, mean, mask=(dims < HEAD_DIM)[None, :])
        tl.store(log_sums + part, high + tl.log2(total))
    else:
        tl.store(out + wide_row * out_stride + column, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_splits"])
def _combine(
    context_lens,
    cu_seqlens_q,
    tiles,
    out,
    partials,
    log_sums,
    out_stride,
    num_splits,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    WINDOW: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Compute out = the stretches' means, weighted by their sums, for ROWS rows of a tile."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    if tl.load(tiles + 2 * tile) < 0:
        return
    first_row, end_row, shift = _rows_of(tiles, tile, cu_seqlens_q, context_lens, TILE_TOKENS)
    first, last = first_row + shift, end_row - 1 + shift
    _, first_tile, _, _, last_tile = _tiles_of(first, last, WINDOW, TILE_KEYS)
    split = tl.arange(0, MAX_SPLITS)
    begin, end = stretch(first_tile, last_tile, split, num_splits, MIN_TILES)
    used = (begin < end) & (split < num_splits)  # the others were never written

    place = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    part = ((tile * KV_HEADS + kv_head) * num_splits).to(tl.int64) * TILE_ROWS + place
    every = log_sums + part[None, :] + split[:, None] * TILE_ROWS
    highest = tl.max(tl.load(every, mask=used[:, None], other=float("-inf")), 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # a row past the last query
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for _ in range(tl.sum(used.to(tl.int32), 0)):
        weight = tl.exp2(tl.load(log_sums + part) - highest)
        means = partials + part[:, None] * HEAD_DIM + dims[None, :]
        acc += weight[:, None] * tl.load(means, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        total += weight
        part += TILE_ROWS
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row, member = first_row + place // PADDED_GROUP, place % PADDED_GROUP
    inside = ((row < end_row) & (member < GROUP))[:, None] & (dims < HEAD_DIM)[None, :]
    column = (kv_head * GROUP + member)[:, None] * HEAD_DIM + dims[None, :]
    target = out + row.to(tl.int64)[:, None] * out_stride + column
    tl.store(target, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows_of(tiles, tile, cu_seqlens_q, context_lens, TILE_TOKENS: tl.constexpr):
    """Return a tile's query rows [first_row, end_row), and the offset from row to position."""
    request, first_row = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    end_row = tl.load(cu_seqlens_q + request + 1)
    shift = tl.load(context_lens + request) - end_row
    return first_row, tl.minimum(end_row, first_row + TILE_TOKENS), shift


@triton.jit
def _tiles_of(first, last, WINDOW: tl.constexpr, TILE_KEYS: tl.constexpr):
    """Return the keys that queries at positions first .. last see: the lowest, and the tiles.

    Tiles [begin, end) hold all keys that any query sees; every query sees all keys of
    [full_begin, full_end).
    """
    lowest = tl.maximum(first - WINDOW + 1, 0) if WINDOW > 0 else first * 0
    seen_by_all = tl.maximum(last - WINDOW + 1, 0) if WINDOW > 0 else first * 0
    end = last // TILE_KEYS + 1
    full_begin = tl.minimum(tl.cdiv(seen_by_all, TILE_KEYS), end)
    full_end = tl.maximum((first + 1) // TILE_KEYS, full_begin)
    return lowest, lowest // TILE_KEYS, full_begin, full_end, end


@triton.jit
def _walk(
    acc, total, high, query, position, lowest, last, begin, end,
    kv, table, kv_head, block_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Absorb the tiles [begin, end) of keys; without MASKED every row sees all of them.

    Row i is the query at position[i]; keys below `lowest` or above `last` are not read.
    """
    for tile in range(begin, end):
        key = tile * TILE_KEYS + tl.arange(0, TILE_KEYS)
        readable = (key >= lowest) & (key <= last)
        k, v = load_tile(
            kv, table, key, readable, kv_head, block_stride,
            BLOCK_SIZE, KV_HEADS, HEAD_DIM, PADDED_DIM, MASKED,
        )  # fmt: skip
        scores = scores_of(query, k, SCALE, SOFT_CAP, UPCAST)
        if MASKED:
            seen = readable[None, :] & (key[None, :] <= position[:, None])
            if WINDOW > 0:
                seen &= key[None, :] > position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        acc, total, high = absorb(acc, total, high, scores, v, SCALE, SOFT_CAP, UPCAST)
    return acc, total, high
