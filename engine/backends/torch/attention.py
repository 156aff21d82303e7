"""Computes paged attention with torch: gathers each request's slots from the KV cache.

Gathers single slots instead of whole blocks, which costs the same and lets padding repeat a slot of
the same request, so that no other request's KV is ever read. Slots and masks, which depend on the
batch alone, are computed in the first layer and reused by the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.inputs import AttentionInputs

# ==== KV cache as rows ====


def _rows(kv_layer: Tensor) -> Tensor:
    """View the cache, from this layer's first key on, as rows of one slot's H_kv * D values.

    Blocks of one layer are not neighbours (other layers lie between them), but the distance is
    a whole number of rows, so a slot's key is row `_key_rows(...)` and its value follows
    block_size rows later.
    """
    blocks, _, block_size, heads, dim = kv_layer.shape
    width = heads * dim
    num_rows = (blocks - 1) * (kv_layer.stride(0) // width) + 2 * block_size
    return kv_layer.as_strided((num_rows, width), (width, 1))


def _key_rows(block: Tensor, offset: Tensor, kv_layer: Tensor) -> Tensor:
    return block * (kv_layer.stride(0) // kv_layer.stride(2)) + offset


def store_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slot_mapping: Tensor) -> None:
    block_size = kv_layer.shape[2]
    block = slot_mapping.div(block_size, rounding_mode="floor")
    key_rows = _key_rows(block, slot_mapping - block * block_size, kv_layer)
    rows = _rows(kv_layer)
    rows.index_copy_(0, key_rows, k.flatten(1))
    rows.index_copy_(0, key_rows + block_size, v.flatten(1))


# ==== Paged attention ====

# q [X, Y, M, D], k and v [X, Y, L, D], additive mask or None, causal -> [X, Y, M, D]
_Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]


@dataclass(frozen=True, slots=True)
class _Group:
    """Decodes of similar length, computed together. Shapes: G requests, L keys each."""

    rows: Tensor | slice  # which rows of q
    kv_rows: Tensor  # [2 G L]: rows of all keys, then of all values
    mask: Tensor | None  # [G, 1, 1, L], 0 or -inf; None if all lengths are equal


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One request's prefill: M queries over L keys."""

    rows: slice
    kv_rows: Tensor  # [2 L]
    mask: Tensor | None  # [M, L], 0 or -inf; None: plain causal, M = L


@dataclass(frozen=True, slots=True)
class _AttentionPlan:
    groups: tuple[_Group, ...]
    chunks: tuple[_Chunk, ...]


class GatheredAttention:
    """Computes attention; keeps the plan of the current step, one per window size.

    A plan belongs to one AttentionInputs object, compared by identity, and ends with it.
    """

    def __init__(self) -> None:
        self._attention: AttentionInputs | None = None
        self._plans: dict[int | None, _AttentionPlan] = {}

    def __call__(
        self,
        q: Tensor,
        kv_layer: Tensor,
        attention: AttentionInputs,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        plan = self._plan(q.dtype, kv_layer, attention, window)
        attend = _plain_attend(scale) if soft_cap is None else _capped_attend(scale, soft_cap)
        out = torch.empty_like(q)
        for group in plan.groups:
            out[group.rows] = _attend_group(q[group.rows], kv_layer, group, attend)
        for chunk in plan.chunks:
            out[chunk.rows] = _attend_chunk(q[chunk.rows], kv_layer, chunk, attend)
        return out

    def _plan(
        self,
        dtype: torch.dtype,
        kv_layer: Tensor,
        attention: AttentionInputs,
        window: int | None,
    ) -> _AttentionPlan:
        if self._attention is not attention:
            self._attention, self._plans = attention, {}
        if window not in self._plans:
            self._plans[window] = _make_plan(dtype, kv_layer, attention, window)
        return self._plans[window]


def _attend_group(q: Tensor, kv_layer: Tensor, group: _Group, attend: _Attend) -> Tensor:
    """Attend with heads that share a key as that key head's queries: [G, H_kv, H / H_kv, D]."""
    num, dim, heads = q.shape[0], q.shape[2], kv_layer.shape[3]
    k, v = _gather(kv_layer, group.kv_rows)
    k = k.view(num, -1, heads, dim).transpose(1, 2)
    v = v.view(num, -1, heads, dim).transpose(1, 2)
    return attend(q.view(num, heads, -1, dim), k, v, group.mask, False).reshape(q.shape)


def _attend_chunk(q: Tensor, kv_layer: Tensor, chunk: _Chunk, attend: _Attend) -> Tensor:
    """Attend with key heads as the batch, so that a group shares its keys without copies."""
    num, dim, heads = q.shape[0], q.shape[2], kv_layer.shape[3]
    k, v = _gather(kv_layer, chunk.kv_rows)
    grouped = q.view(num, heads, -1, dim).permute(1, 2, 0, 3)  # [H_kv, H / H_kv, M, D]
    k = k.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1)
    v = v.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1)
    out = attend(grouped, k, v, chunk.mask, chunk.mask is None)
    return out.permute(2, 0, 1, 3).reshape(q.shape)


def _gather(kv_layer: Tensor, kv_rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows(kv_layer).index_select(0, kv_rows)
    k, v = rows.view(2, -1, *kv_layer.shape[3:])
    return k, v


def _plain_attend(scale: float) -> _Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)

    return attend


def _capped_attend(scale: float, soft_cap: float) -> _Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        scores = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale / soft_cap)
        scores.tanh_().mul_(soft_cap)
        if is_causal:
            mask = _causal_mask(q.shape[-2], k.shape[-2], None, q.dtype, q.device)
        if mask is not None:
            scores += mask
        return torch.matmul(scores.softmax(-1), v.float()).to(q.dtype)

    return attend


# ==== The plan ====


def _make_plan(
    dtype: torch.dtype, kv_layer: Tensor, attention: AttentionInputs, window: int | None
) -> _AttentionPlan:
    num_decodes = attention.num_decodes
    groups = _similar([_visible(n, window) for n in attention.context_lens[:num_decodes]])
    chunks = range(num_decodes, len(attention.context_lens))
    return _AttentionPlan(
        groups=tuple(_plan_group(g, dtype, kv_layer, attention, window) for g in groups),
        chunks=tuple(_plan_chunk(i, dtype, kv_layer, attention, window) for i in chunks),
    )


def _similar(lengths: list[int]) -> list[list[int]]:
    """Group indices such that the longest is at most twice the shortest, to bound the padding."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] <= 2 * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _plan_group(
    members: list[int],
    dtype: torch.dtype,
    kv_layer: Tensor,
    attention: AttentionInputs,
    window: int | None,
) -> _Group:
    device = kv_layer.device
    members = sorted(members)
    lengths = [attention.context_lens[i] for i in members]
    visible = [_visible(length, window) for length in lengths]
    ends = torch.tensor(lengths, device=device)[:, None]
    counts = torch.tensor(visible, device=device)[:, None]
    column = torch.arange(max(visible), device=device)
    positions = ends - counts + torch.minimum(column, counts - 1)  # padding: the last key again
    whole = len(members) == attention.num_decodes
    rows = slice(0, len(members)) if whole else torch.tensor(members, device=device)
    ragged = min(visible) < max(visible)
    return _Group(
        rows=rows,
        kv_rows=_kv_rows(positions, attention.block_tables[rows], kv_layer),
        mask=_additive(column < counts, dtype)[:, None, None] if ragged else None,
    )


def _visible(length: int, window: int | None) -> int:
    return length if window is None else min(length, window)


def _plan_chunk(
    i: int,
    dtype: torch.dtype,
    kv_layer: Tensor,
    attention: AttentionInputs,
    window: int | None,
) -> _Chunk:
    start, end = attention.cu_seqlens_q[i], attention.cu_seqlens_q[i + 1]
    num, length, device = end - start, attention.context_lens[i], kv_layer.device
    first = 0 if window is None else max(0, length - num - window + 1)
    positions = torch.arange(first, length, device=device)[None]
    plain = num == length and (window is None or length <= window)
    return _Chunk(
        rows=slice(start, end),
        kv_rows=_kv_rows(positions, attention.block_tables[i : i + 1], kv_layer),
        mask=None if plain else _causal_mask(num, length - first, window, dtype, device),
    )


def _kv_rows(positions: Tensor, block_tables: Tensor, kv_layer: Tensor) -> Tensor:
    """Turn positions [G, L] of G requests into [2 G L] rows of keys, then of values."""
    block_size = kv_layer.shape[2]
    index = positions.div(block_size, rounding_mode="floor")
    block = block_tables.gather(1, index)
    key_rows = _key_rows(block, positions - index * block_size, kv_layer).flatten()
    return torch.cat([key_rows, key_rows + block_size])


def _causal_mask(
    num: int, length: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Make a mask [num, length] for queries at the last `num` of `length` positions."""
    key = torch.arange(length, device=device)
    query = torch.arange(length - num, length, device=device)[:, None]
    visible = key <= query
    return _additive(visible if window is None else visible & (key > query - window), dtype)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -torch.inf)
