"""Paged prefill: the new tokens of several requests, each over its own keys, old and new.

A program takes a tile of neighbouring query rows times the query heads of one KV head and walks
over the keys that any of them sees. Only tiles of keys at either edge of that range are masked:
most keys of a long context are seen by every row, and nothing is compared for them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.attention_tile import (
    absorb,
    check_shapes,
    load_tile,
    score_constants,
    scores_of,
    tile_constants,
)


def paged_prefill(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    tile_tokens: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """out [N, H, D] = causal attention of the rows of q [N, H, D] that lie in `tiles`.

    The other arguments are as in `engine.kernels.device_positions`: int32 block_tables [B, W],
    context_lens [B], cu_seqlens_q [B + 1] and tiles [T, 2] of `tile_tokens` query rows, a power of
    two. Rows of no tile are not touched. Raises ValueError.
    """
    check_shapes(q, kv_layer, out)
    if tile_tokens < 1 or tile_tokens & (tile_tokens - 1):
        raise ValueError(f"tile_tokens {tile_tokens}: need a power of two")
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = kv_layer.shape[2:4]
    constants = prefill_constants(heads, kv_heads, head_dim, block_size, q.dtype, tile_tokens)
    _prefill[len(tiles), kv_heads](
        q,
        kv_layer,
        block_tables,
        context_lens,
        cu_seqlens_q,
        tiles,
        out,
        q.stride(0),
        out.stride(0),
        kv_layer.stride(0),
        block_tables.stride(0),
        **constants,
        **score_constants(scale, soft_cap),
        WINDOW=window or 0,
        **prefill_options(constants),
    )


def prefill_constants(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    tile_tokens: int,
) -> dict[str, Any]:
    padded_group = triton.next_power_of_2(heads // kv_heads)
    return {
        **tile_constants(heads, kv_heads, head_dim, block_size, dtype),
        "PADDED_GROUP": padded_group,
        "TILE_TOKENS": tile_tokens,
        "TILE_ROWS": max(16, tile_tokens * padded_group),
    }


def prefill_options(constants: dict[str, Any]) -> dict[str, int]:
    """Not measured on a card. Keys are found through the table: with less than 5 stages, no copy
    runs on an sm_80 while a tile is used; with so many, wide heads take more shared memory than
    smaller cards have."""
    padded = constants["PADDED_DIM"]
    return {
        "num_warps": 8 if constants["TILE_ROWS"] * padded >= 128 * 64 else 4,
        "num_stages": 5 if padded <= 128 else 3,
    }


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q,
    kv,
    block_tables,
    context_lens,
    cu_seqlens_q,
    tiles,
    out,
    q_stride,
    out_stride,
    block_stride,
    table_stride,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    request = tl.load(tiles + 2 * tile)
    if request < 0:
        return
    first_row = tl.load(tiles + 2 * tile + 1)
    end_row = tl.load(cu_seqlens_q + request + 1)
    # the position of row r is r + shift
    shift = tl.load(context_lens + request) - end_row
    end_row = tl.minimum(end_row, first_row + TILE_TOKENS)

    place = tl.arange(0, TILE_ROWS)
    row, member = first_row + place // PADDED_GROUP, place % PADDED_GROUP
    dims = tl.arange(0, PADDED_DIM)
    inside = ((row < end_row) & (member < GROUP))[:, None] & (dims < HEAD_DIM)[None, :]
    column = (kv_head * GROUP + member)[:, None] * HEAD_DIM + dims[None, :]
    wide_row = row.to(tl.int64)[:, None]
    query = tl.load(q + wide_row * q_stride + column, mask=inside, other=0.0)

    first, last = first_row + shift, end_row - 1 + shift  # positions of the tile's queries
    begin, full_begin = 0, 0
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(first - WINDOW + 1, 0)
        begin = lowest // TILE_KEYS
        full_begin = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), TILE_KEYS)
    end = last // TILE_KEYS + 1
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum((first + 1) // TILE_KEYS, full_begin)

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
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: a row behind the last query
    tl.store(out + wide_row * out_stride + column, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _walk(
    acc, total, high, query, position, lowest, last, begin, end,
    kv, table, kv_head, block_stride,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tiles [begin, end) of keys; without MASKED every row sees all of them.

    Row i is the query at position[i]; keys below `lowest` or above `last` are read by none.
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
