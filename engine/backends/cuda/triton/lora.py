"""Multi-LoRA: applies to every row of a batch its own adapter at its own rank, in two kernels.

    shrink  planes [P, positions, R] = x [N, in] @ A^T   in float32, a plane per part of the inputs
    expand  y [N, out] = y * scale + shift + (sum of planes) @ B     slice by slice, in place

A is [R, in], the ranks of all slices (q, k, v; gate, up) stacked, B of a slice is [r, out_j]. Scale
and shift are float32 [out], each only if the adapter has it at this site. One program of expand
computes all ranks of its columns, so each value of y is scaled once.

All lie in one arena, at multiples of UNIT_BYTES. The table holds their places:

    table  int32 [slots, records, record]
           record 0          start of the adapter's extent in units, rest unused
           record 1 + site   offsets in units from there: of A (1 word), of each slice's B (S words,
                             S = most slices of any site); then 0, and the end of each slice's
                             ranks (S words); then 1 + offset of scale and of shift, 0 for none
           the words behind  of the embedding (EMBEDDING_WORDS), read by `embed`; then 1 + offset
                             of each norm, read by `own`, 0 for none

Grids are constant and everything that changes is read from device memory: the words of a plan
(`lora_work`) and the table. No atomics: a row's result depends on that row, its adapter and the
tile sizes alone. Rows without an adapter are neither read nor written.

Offsets are multiples of UNIT_BYTES from an aligned base, which lets the compiler load 16 bytes at
a time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.backends.cuda.extent import UNIT_BYTES
from engine.backends.cuda.triton import lora_work
from engine.backends.cuda.triton.launch import upcast
from engine.backends.cuda.triton.lora_work import SiteKind, WorkShape


def column_tiles(kind: SiteKind, columns: int) -> list[tuple[int, int, int, int]]:
    """List (slice, first column in slice, first column in y, width of slice) of each tile."""
    tiles: list[tuple[int, int, int, int]] = []
    out0 = 0
    for number, width in enumerate(kind.out_features):
        tiles += [(number, column, out0 + column, width) for column in range(0, width, columns)]
        out0 += width
    return tiles


@dataclass(frozen=True, slots=True)
class LoraMemory:
    """Memory that the kernels read besides a batch's own rows; its addresses never change."""

    arena: Tensor  # [elements], in the adapters' dtype
    floats: Tensor  # the same memory in float32
    longs: Tensor  # the same in int64
    table: Tensor  # int32 [slots, records, record]

    @staticmethod
    def of(arena: Tensor, dtype: torch.dtype, table: Tensor) -> "LoraMemory":
        """Make views of `arena`, uint8, in whole units."""
        whole = arena[: arena.numel() // UNIT_BYTES * UNIT_BYTES]
        views = whole.view(dtype), whole.view(torch.float32), whole.view(torch.int64)
        return LoraMemory(*views, table)


@dataclass(frozen=True, slots=True)
class KindLaunch:
    """Launch settings of both kernels at sites of one kind, for batches of one shape."""

    column_tiles: Tensor  # int32 [tiles, 4], on the device
    shrink_programs: int
    expand_programs: int
    shrink_options: dict[str, int | bool]
    expand_options: dict[str, int | bool]

    @staticmethod
    def make(
        shape: WorkShape, kind_index: int, max_slices: int, dtype: torch.dtype, device: torch.device
    ) -> "KindLaunch":
        tiles = shape.tiles
        of_columns = column_tiles(shape.kinds[kind_index], tiles.expand_columns)
        return KindLaunch(
            column_tiles=torch.tensor(of_columns, dtype=torch.int32, device=device),
            shrink_programs=shape.num_processors * tiles.shrink.programs,
            expand_programs=shape.num_processors * tiles.expand.programs,
            shrink_options=shrink_constants(shape, kind_index, max_slices, dtype)
            | {"num_warps": tiles.shrink.warps, "num_stages": tiles.shrink.stages},
            expand_options=expand_constants(shape, kind_index, max_slices, dtype)
            | {"num_warps": tiles.expand.warps, "num_stages": tiles.expand.stages},
        )


def shrink(
    launch: KindLaunch, memory: LoraMemory, words: Tensor, planes: Tensor, site: int, x: Tensor
) -> None:
    """Compute the planes of x [N, in], adjacent columns, for its rows that have an adapter."""
    _shrink_kernel[(launch.shrink_programs,)](
        x,
        memory.arena,
        planes,
        memory.table,
        words,
        site,
        x.stride(0),
        memory.table.stride(0),
        **launch.shrink_options,
    )


def expand(
    launch: KindLaunch, memory: LoraMemory, words: Tensor, planes: Tensor, site: int, y: Tensor
) -> None:
    """Compute y [N, out] = y * scale + shift + (sum of planes) @ B in place; y has adjacent
    columns."""
    _expand_kernel[(launch.expand_programs,)](
        planes,
        memory.arena,
        memory.floats,
        y,
        memory.table,
        words,
        launch.column_tiles,
        site,
        y.stride(0),
        memory.table.stride(0),
        **launch.expand_options,
    )


def shrink_constants(
    shape: WorkShape, kind_index: int, max_slices: int, dtype: torch.dtype
) -> dict[str, int | bool]:
    return {
        **_constants(shape, kind_index, max_slices, dtype),
        "BLOCKS_AT": lora_work.BLOCKS_AT,
        "NUM_ITEMS": lora_work.NUM_ITEMS,
        "ITEMS_PER_BLOCK": lora_work.ITEMS_PER_BLOCK,
        "PLANES_PER_ITEM": lora_work.PLANES_PER_ITEM,
        "MAX_BLOCKS": lora_work.MAX_BLOCKS,
        "IN": shape.kinds[kind_index].in_features,
        "BLOCK_R": shape.tiles.shrink.ranks,
        "BLOCK_K": shape.tiles.shrink_depth,
    }


def expand_constants(
    shape: WorkShape, kind_index: int, max_slices: int, dtype: torch.dtype
) -> dict[str, int | bool]:
    kind, tiles = shape.kinds[kind_index], shape.tiles
    in_16_bytes = 16 // dtype.itemsize
    is_aligned = all(width % in_16_bytes == 0 for width in kind.out_features)
    return {
        **_constants(shape, kind_index, max_slices, dtype),
        "LISTED_AT": lora_work.LISTED_AT,
        "NUM_LISTED": lora_work.NUM_LISTED,
        "FLOAT_UNIT": UNIT_BYTES // torch.float32.itemsize,
        "TILES": len(column_tiles(kind, tiles.expand_columns)),
        "ALIGNMENT": in_16_bytes if is_aligned else 1,
        "BLOCK_R": tiles.expand.ranks,
        "BLOCK_N": tiles.expand_columns,
    }


def _constants(
    shape: WorkShape, kind_index: int, max_slices: int, dtype: torch.dtype
) -> dict[str, int | bool]:
    kind = shape.kinds[kind_index]
    return {
        "HEADER_AT": kind_index * lora_work.HEADER_WORDS,
        "SEGMENTS_AT": len(shape.kinds) * lora_work.HEADER_WORDS,
        "ROWS_AT": lora_work.ROWS_AT,
        "SEGMENT_WORDS": lora_work.SEGMENT_WORDS,
        "SLICES": max_slices,
        "RECORD": lora_work.record_words(max_slices),
        "UNIT": UNIT_BYTES // dtype.itemsize,
        "PLANES": shape.num_planes(kind),
        "PLANE_ROWS": shape.max_rows,
        "PLANE_WIDTH": shape.plane_width(kind),
        "BLOCK_M": shape.tiles.segment_rows,
        "UPCAST": upcast(dtype),
    }


@triton.jit(do_not_specialize=["site", "table_stride"])
def _shrink_kernel(
    x,
    arena,
    planes,
    table,
    words,
    site,
    x_stride,
    table_stride,
    HEADER_AT: tl.constexpr,
    SEGMENTS_AT: tl.constexpr,
    ROWS_AT: tl.constexpr,
    SEGMENT_WORDS: tl.constexpr,
    SLICES: tl.constexpr,
    RECORD: tl.constexpr,
    UNIT: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_ROWS: tl.constexpr,
    PLANE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCKS_AT: tl.constexpr,
    NUM_ITEMS: tl.constexpr,
    ITEMS_PER_BLOCK: tl.constexpr,
    PLANES_PER_ITEM: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    PER_PLANE: tl.constexpr = (IN + PLANES * BLOCK_K - 1) // (PLANES * BLOCK_K) * BLOCK_K
    header = words + HEADER_AT
    rows_at = tl.load(header + ROWS_AT)
    blocks_at = tl.load(header + BLOCKS_AT)
    num_items = tl.load(header + NUM_ITEMS)
    items_per_block = tl.load(header + ITEMS_PER_BLOCK)
    per_item = tl.load(header + PLANES_PER_ITEM)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        block = tl.load(words + blocks_at + item // items_per_block)
        first_plane = (item % items_per_block) * per_item
        segment = words + SEGMENTS_AT + (block // MAX_BLOCKS) * SEGMENT_WORDS
        start = tl.load(segment)
        end = tl.load(segment + 1)
        extent = table + tl.load(segment + 2).to(tl.int64) * table_stride
        record = extent + (1 + site) * RECORD
        rank = tl.load(record + 1 + 2 * SLICES)
        r = (block % MAX_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
        if (block % MAX_BLOCKS) * BLOCK_R < rank:
            a = arena + (tl.load(extent) + tl.load(record)).to(tl.int64) * UNIT
            position = start + tl.arange(0, BLOCK_M)
            row = tl.load(words + rows_at + position, mask=position < end, other=0)
            x_rows = x + row.to(tl.int64)[:, None] * x_stride
            a_rows = a + r[None, :] * IN
            h = planes + position[:, None] * PLANE_WIDTH + r[None, :]
            for plane in range(first_plane, first_plane + per_item):
                total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                plane_end = tl.minimum((plane + 1) * PER_PLANE, IN)
                for k0 in range(plane * PER_PLANE, plane_end, BLOCK_K):
                    k = tl.multiple_of(k0, BLOCK_K) + tl.arange(0, BLOCK_K)
                    x_mask = (position < end)[:, None]
                    a_mask = (r < rank)[None, :]
                    if IN % BLOCK_K:
                        x_mask &= (k < IN)[None, :]
                        a_mask &= (k < IN)[:, None]
                    x_tile = tl.load(x_rows + k[None, :], mask=x_mask, other=0.0)
                    a_tile = tl.load(a_rows + k[:, None], mask=a_mask, other=0.0)
                    if UPCAST:
                        x_tile = x_tile.to(tl.float32)
                        a_tile = a_tile.to(tl.float32)
                    total = tl.dot(x_tile, a_tile, total, input_precision="ieee")
                h_mask = (position < end)[:, None] & (r < rank)[None, :]
                tl.store(h + plane * (PLANE_ROWS * PLANE_WIDTH), total, mask=h_mask)


@triton.jit(do_not_specialize=["site", "table_stride"])
def _expand_kernel(
    planes,
    arena,
    floats,
    y,
    table,
    words,
    column_tiles,
    site,
    y_stride,
    table_stride,
    HEADER_AT: tl.constexpr,
    SEGMENTS_AT: tl.constexpr,
    ROWS_AT: tl.constexpr,
    SEGMENT_WORDS: tl.constexpr,
    SLICES: tl.constexpr,
    RECORD: tl.constexpr,
    UNIT: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_ROWS: tl.constexpr,
    PLANE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UPCAST: tl.constexpr,
    LISTED_AT: tl.constexpr,
    NUM_LISTED: tl.constexpr,
    FLOAT_UNIT: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    header = words + HEADER_AT
    rows_at = tl.load(header + ROWS_AT)
    listed_at = tl.load(header + LISTED_AT)
    num_items = tl.load(header + NUM_LISTED) * TILES
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        tile = column_tiles + (item % TILES) * 4
        slice_index = tl.load(tile)
        column0 = tl.multiple_of(tl.load(tile + 1), ALIGNMENT)
        y_column0 = tl.multiple_of(tl.load(tile + 2), ALIGNMENT)
        width = tl.multiple_of(tl.load(tile + 3), ALIGNMENT)
        segment = words + SEGMENTS_AT + tl.load(words + listed_at + item // TILES) * SEGMENT_WORDS
        start = tl.load(segment)
        end = tl.load(segment + 1)
        extent = table + tl.load(segment + 2).to(tl.int64) * table_stride
        record = extent + (1 + site) * RECORD
        rank0 = tl.load(record + 1 + SLICES + slice_index)
        rank = tl.load(record + 2 + SLICES + slice_index) - rank0
        scale_at = tl.load(record + 2 + 2 * SLICES).to(tl.int64)
        shift_at = tl.load(record + 3 + 2 * SLICES).to(tl.int64)
        if rank + scale_at + shift_at > 0:
            b = arena + (tl.load(extent) + tl.load(record + 1 + slice_index)).to(tl.int64) * UNIT
            position = start + tl.arange(0, BLOCK_M)
            row = tl.load(words + rows_at + position, mask=position < end, other=0)
            n = tl.arange(0, BLOCK_N)
            in_slice = (column0 + n < width)[None, :]
            y_tile = y + row.to(tl.int64)[:, None] * y_stride + (y_column0 + n)[None, :]
            y_mask = (position < end)[:, None] & in_slice
            before = tl.load(y_tile, mask=y_mask, other=0.0)
            h_rows = planes + position[:, None] * PLANE_WIDTH + rank0
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for r0 in range(0, rank, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                h_mask = (position < end)[:, None] & (r < rank)[None, :]
                h = tl.load(h_rows + r[None, :], mask=h_mask, other=0.0)
                for plane in tl.static_range(1, PLANES):
                    offset = plane * (PLANE_ROWS * PLANE_WIDTH)
                    h += tl.load(h_rows + offset + r[None, :], mask=h_mask, other=0.0)
                b_tile = b + r.to(tl.int64)[:, None] * width + (column0 + n)[None, :]
                b_mask = (r < rank)[:, None] & in_slice
                factors = tl.load(b_tile, mask=b_mask, other=0.0)
                h_cast = h.to(factors.dtype)
                if UPCAST:
                    h_cast = h_cast.to(tl.float32)
                    factors = factors.to(tl.float32)
                total = tl.dot(h_cast, factors, total, input_precision="ieee")
            wide = before.to(tl.float32)
            if scale_at + shift_at > 0:
                affine = floats + (tl.load(extent).to(tl.int64) - 1) * FLOAT_UNIT + y_column0 + n
                scale_end = tl.where(scale_at > 0, width - column0, 0)
                shift_end = tl.where(shift_at > 0, width - column0, 0)
                scale = tl.load(affine + scale_at * FLOAT_UNIT, mask=n < scale_end, other=1.0)
                shift = tl.load(affine + shift_at * FLOAT_UNIT, mask=n < shift_end, other=0.0)
                wide = wide * scale[None, :] + shift[None, :]
            after = wide + total
            tl.store(y_tile, after.to(y.dtype.element_ty), mask=y_mask)
