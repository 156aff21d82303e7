"""Turns the qkv layer's output into attention's input: head norms, rotary positions, KV cache.

In one pass, queries are rotated in place, keys are rotated and written to the cache, and values
are copied there.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from engine.backends.cuda.triton.launch import power_of_two
from engine.backends.cuda.triton.own import OwnWeights, own_arguments, own_weight

TILE_VALUES = 512  # per program: two 16-byte loads per thread of a warp in two-byte types


@triton.jit
def turn(
    from_ptr,
    to_ptr,
    cos_ptr,
    sin_ptr,
    norm_ptr,  # None: heads are not normalised
    table_ptr,  # None: no row has an adapter
    floats_ptr,
    words_ptr,
    table_stride,
    place,
    row,
    heads,
    inside,
    eps,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Normalise heads [TILE] of one row, round, and rotate by the row's cosines and sines."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    dtype: tl.constexpr = from_ptr.dtype.element_ty
    column = tl.arange(0, HALF_BLOCK)
    turned = column < HALF
    at = heads[:, None] * DIM + column[None, :]
    mask = inside[:, None] & turned[None, :]
    first = tl.load(from_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(from_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if ROTARY_DIM < DIM:
        rest_column = ROTARY_DIM + tl.arange(0, REST_BLOCK)
        kept = rest_column < DIM
        rest_at = heads[:, None] * DIM + rest_column[None, :]
        rest_mask = inside[:, None] & kept[None, :]
        rest = tl.load(from_ptr + rest_at, mask=rest_mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if ROTARY_DIM < DIM:
            squares += tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(squares / DIM + eps)[:, None]
        weight = tl.load(norm_ptr + column, mask=turned, other=0.0).to(tl.float32)
        more = tl.load(norm_ptr + HALF + column, mask=turned, other=0.0).to(tl.float32)
        if table_ptr is not None:
            own = (table_ptr, floats_ptr, words_ptr, table_stride, place, row)
            weight = own_weight(weight, *own, column, turned)
            more = own_weight(more, *own, HALF + column, turned)
        first = (first * inverse * weight[None, :]).to(dtype).to(tl.float32)
        second = (second * inverse * more[None, :]).to(dtype).to(tl.float32)
        if ROTARY_DIM < DIM:
            last = tl.load(norm_ptr + rest_column, mask=kept, other=0.0).to(tl.float32)
            if table_ptr is not None:
                own = (table_ptr, floats_ptr, words_ptr, table_stride, place, row)
                last = own_weight(last, *own, rest_column, kept)
            rest = rest * inverse * last[None, :]
    cos = tl.load(cos_ptr + column, mask=turned, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + HALF + column, mask=turned, other=0.0).to(tl.float32)[None, :]
    to_type: tl.constexpr = to_ptr.dtype.element_ty
    tl.store(to_ptr + at, (first * cos - second * sin).to(to_type), mask=mask)
    tl.store(to_ptr + at + HALF, (second * cos + first * sin).to(to_type), mask=mask)
    if ROTARY_DIM < DIM:
        tl.store(to_ptr + rest_at, rest.to(to_type), mask=rest_mask)


@triton.jit(do_not_specialize=["table_stride", "q_place", "k_place"])
def rotate_and_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    kv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    table_ptr,
    floats_ptr,
    words_ptr,
    qkv_stride,
    block_stride,
    value_stride,
    slot_stride,
    table_stride,
    q_place,
    k_place,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Process TILE heads of one kind in a program: tiles of queries, then keys, then values."""
    Q_TILES: tl.constexpr = (HEADS + TILE - 1) // TILE
    KV_TILES: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    q_ptr = qkv_ptr + row * qkv_stride
    position = tl.load(positions_ptr + row).to(tl.int64)
    cos_ptr += position * ROTARY_DIM
    sin_ptr += position * ROTARY_DIM
    member = tl.arange(0, TILE)
    if tile < Q_TILES:
        heads = tile * TILE + member
        turn(
            q_ptr,
            q_ptr,
            cos_ptr,
            sin_ptr,
            q_norm_ptr,
            table_ptr,
            floats_ptr,
            words_ptr,
            table_stride,
            q_place,
            row,
            heads,
            heads < HEADS,
            eps,
            DIM,
            ROTARY_DIM,
            HALF_BLOCK,
            REST_BLOCK,
        )
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        if slot >= 0:
            k_ptr = q_ptr + HEADS * DIM
            at = kv_ptr + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
            if tile < Q_TILES + KV_TILES:
                heads = (tile - Q_TILES) * TILE + member
                turn(
                    k_ptr,
                    at,
                    cos_ptr,
                    sin_ptr,
                    k_norm_ptr,
                    table_ptr,
                    floats_ptr,
                    words_ptr,
                    table_stride,
                    k_place,
                    row,
                    heads,
                    heads < KV_HEADS,
                    eps,
                    DIM,
                    ROTARY_DIM,
                    HALF_BLOCK,
                    REST_BLOCK,
                )
            else:
                heads = (tile - Q_TILES - KV_TILES) * TILE + member
                column = tl.arange(0, DIM_BLOCK)
                cell = heads[:, None] * DIM + column[None, :]
                inside = (heads < KV_HEADS)[:, None] & (column < DIM)[None, :]
                value = tl.load(k_ptr + KV_HEADS * DIM + cell, mask=inside, other=0.0)
                tl.store(at + value_stride + cell, value.to(kv_ptr.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_layer: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    own: OwnWeights | None = None,
    names: tuple[str, str] | None = None,
) -> None:
    """Rotate queries of qkv [N, (H + 2 H_kv) D] in place; write keys and values to the cache.

    Keys are rotated as they are written; those in qkv stay unchanged. cos and sin [positions, R]
    are RotaryTable's, in float32; dimensions of a head from R on are not rotated. positions and
    slot_mapping [N] are int32 or int64; a row whose slot is -1 writes nothing to kv_layer
    [blocks, 2, block_size, H_kv, D], whose last two dimensions are contiguous. With q_norm and
    k_norm [D], heads are first divided by their rms, multiplied by these and rounded. `own`:
    adapters of the rows, which may have weights of their own; `names` of the two norms, as an
    adapter names them.
    """
    _, _, block_size, kv_heads, dim = kv_layer.shape
    num_heads, rotary_dim = qkv.shape[1] // dim - 2 * kv_heads, cos.shape[1]
    assert kv_layer.stride(3) == dim and kv_layer.stride(4) == 1
    assert cos.is_contiguous() and sin.is_contiguous()
    tiles, constants = head_tiles(num_heads, kv_heads, dim, rotary_dim, block_size)
    table, floats, words, *numbers = own_arguments(own if names else None, *names or (None, None))
    if len(qkv):
        rotate_and_store_kernel[(len(qkv), tiles)](
            qkv,
            cos,
            sin,
            positions,
            slot_mapping,
            kv_layer,
            q_norm,
            k_norm,
            table,
            floats,
            words,
            qkv.stride(0),
            kv_layer.stride(0),
            kv_layer.stride(1),
            kv_layer.stride(2),
            *numbers,
            eps,
            **constants,
            num_warps=1,
        )


@cache
def head_tiles(
    heads: int, kv_heads: int, dim: int, rotary_dim: int, block_size: int
) -> tuple[int, dict[str, int]]:
    """Return the number of programs per row, and the constants that they are specialized for."""
    dim_block = power_of_two(dim)
    tile = max(1, TILE_VALUES // dim_block)
    return -(-heads // tile) + 2 * -(-kv_heads // tile), {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "ROTARY_DIM": rotary_dim,
        "BLOCK_SIZE": block_size,
        "TILE": tile,
        "DIM_BLOCK": dim_block,
        "HALF_BLOCK": power_of_two(rotary_dim // 2),
        "REST_BLOCK": power_of_two(max(dim - rotary_dim, 1)),
    }
