"""Builds the work lists of the multi-LoRA kernels: rows per adapter, and blocks to multiply.

Plain numpy on the host, once per step. Rows are sorted by adapter slot and cut into segments of
at most `LoraTiles.segment_rows` rows of one adapter; a segment's A is cut into blocks of rank rows.
The kernels iterate over these lists with a grid of constant size, so that a CUDA graph replays for
any adapters. A list is only as long as the work: nothing is padded to the largest rank.

All lists are one int32 array, the words of a plan:

    header     HEADER_WORDS per kind of site: the fields below; zeros mean no work. SLOTS_AT is that
               of all kinds, and 0 if no row's adapter has norms or an embedding of its own
    segments   SEGMENT_WORDS each: first and last + 1 position in rows, adapter slot
    rows       row of the batch at each position
    blocks     segment * MAX_BLOCKS + block, kind by kind
    listed     segments whose adapter has anything at sites of a kind, kind by kind
    slots      adapter slot of each row of the batch, if SLOTS_AT is not 0

    x [rows, in] --shrink--> planes [P, positions, R] float32 --expand--> y [rows, out] += ...

The inputs are summed in P planes. A work item of shrink is one block in some of the planes, in
more of them if there are many blocks; a plane's sum depends neither on that nor on any other row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HEADER_WORDS = 8  # per kind of site
ROWS_AT, BLOCKS_AT, NUM_ITEMS, ITEMS_PER_BLOCK, PLANES_PER_ITEM, LISTED_AT, NUM_LISTED = range(7)
SLOTS_AT = 7
SEGMENT_WORDS = 4
EMBEDDING_WORDS = 7  # of a slot's part of the table
MAX_BLOCKS = 256  # per segment and site

DECODE_ROWS = 256  # up to this many rows, each may have its own adapter: segments are short
PLANE_ROWS = 8192  # most positions times planes, to limit the memory of the planes
PLANE_INPUTS = 256  # least inputs of a plane: fewer are not worth one

Words = NDArray[np.int32]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class LoraTiles:
    """Tile sizes of one program.

    Shrink multiplies [rows, depth] by [depth, ranks], expand [rows, ranks] by [ranks, columns].
    """

    segment_rows: int
    max_planes: int
    shrink: "Launch"
    expand: "Launch"
    shrink_depth: int
    expand_columns: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Launch settings of one kernel; `programs` of it are resident on a processor at once."""

    ranks: int
    warps: int
    stages: int
    programs: int


# Chosen so that the programs fit the registers and shared memory of an sm_90 processor and keep
# enough bytes in flight for its memory. Their speed was not measured.
DECODE = LoraTiles(16, 8, Launch(16, 2, 4, 4), Launch(16, 4, 3, 3), 128, 256)
PREFILL = LoraTiles(64, 4, Launch(32, 4, 4, 3), Launch(16, 4, 2, 3), 64, 64)


@dataclass(frozen=True, slots=True)
class SiteKind:
    """Sites of one shape, which share lists and compiled kernels."""

    in_features: int
    out_features: tuple[int, ...]  # of each slice


@dataclass(frozen=True, slots=True)
class WorkShape:
    """Sizes that are fixed for batches of up to `max_rows` rows, a result of `rounded_rows`.

    A row's result has the same bits in all batches of one shape.
    """

    kinds: tuple[SiteKind, ...]
    max_rows: int
    max_adapters: int  # of one batch
    max_lora_rank: int  # of one slice
    num_processors: int

    @property
    def tiles(self) -> LoraTiles:
        return DECODE if self.max_rows <= DECODE_ROWS else PREFILL

    @property
    def min_items(self) -> int:
        """Number of shrink items below which the work is split finer."""
        return 2 * self.num_processors * self.tiles.shrink.programs

    def num_planes(self, kind: SiteKind) -> int:
        """Number of planes: a power of two, the same for every batch of this shape."""
        wanted = min(self.tiles.max_planes, kind.in_features // PLANE_INPUTS)
        return _power_of_two(min(wanted, PLANE_ROWS // self.max_rows))

    def plane_width(self, kind: SiteKind) -> int:
        """Number of columns of a plane: the largest possible sum of the slices' ranks."""
        return len(kind.out_features) * self.max_lora_rank

    @property
    def plane_words(self) -> int:
        """Number of float32 words that suffice for the planes of any site."""
        sizes = [self.num_planes(kind) * self.plane_width(kind) for kind in self.kinds]
        return self.max_rows * max(sizes)

    def max_words(self, num_rows: int) -> int:
        """Upper bound on the words of the lists of a batch of this many rows."""
        adapters = min(self.max_adapters, num_rows)
        segments = adapters + (num_rows - adapters) // self.tiles.segment_rows
        blocks = [-(-self.plane_width(kind) // self.tiles.shrink.ranks) for kind in self.kinds]
        per_segment = SEGMENT_WORDS + sum(blocks) + len(blocks)
        return len(self.kinds) * HEADER_WORDS + 2 * num_rows + segments * per_segment


def record_words(max_slices: int) -> int:
    """Return the words of a site's record in the kernels' table."""
    return 4 + 2 * max_slices


def rounded_rows(num_rows: int) -> int:
    """Round up to one of few sizes, so that kernels can be compiled for all of them beforehand."""
    return max(DECODE_ROWS, 1 << (num_rows - 1).bit_length())


def build_words(
    shape: WorkShape,
    row_slots: Sequence[int] | NDArray[np.int32],
    ranks: NDArray[np.int32],
    affine: NDArray[np.bool_] | None = None,
    owns: NDArray[np.bool_] | None = None,
) -> Words:
    """Build the words of a batch whose row i has the adapter in slot `row_slots[i]`, 0 for none.

    `ranks` [kinds, slots] is the largest sum of slice ranks of a slot at any site of a kind;
    `affine` [kinds, slots]: if it has a scale or a shift at any of them; `owns` [slots]: if it has
    norms or an embedding of its own. None: no adapter has.
    """
    slots = np.asarray(row_slots, np.int32)
    rows, segments = _segments(slots, shape.tiles.segment_rows)
    num_blocks = -(-ranks[:, segments[:, 2]] // shape.tiles.shrink.ranks)  # [kinds, segments]
    owner, block = _spread(num_blocks.reshape(-1))
    blocks = owner % max(len(segments), 1) * MAX_BLOCKS + block
    is_listed = num_blocks > 0 if affine is None else (num_blocks > 0) | affine[:, segments[:, 2]]
    listed_kind, listed = is_listed.nonzero()

    header = np.zeros((len(shape.kinds), HEADER_WORDS), np.int32)
    totals, num_listed = num_blocks.sum(1), np.bincount(listed_kind, minlength=len(header))
    per_item = _planes_per_item(shape, totals.tolist())
    per_block = [shape.num_planes(kind) // n for kind, n in zip(shape.kinds, per_item, strict=True)]
    header[:, ROWS_AT] = rows_at = header.size + segments.size
    header[:, BLOCKS_AT] = rows_at + rows.size + totals.cumsum() - totals
    header[:, NUM_ITEMS] = totals * per_block
    header[:, ITEMS_PER_BLOCK] = per_block
    header[:, PLANES_PER_ITEM] = per_item
    header[:, LISTED_AT] = rows_at + rows.size + blocks.size + num_listed.cumsum() - num_listed
    header[:, NUM_LISTED] = num_listed
    parts = [header.reshape(-1), segments.reshape(-1), rows, blocks, listed]
    if owns is not None and owns[segments[:, 2]].any():
        header[:, SLOTS_AT] = sum(part.size for part in parts)
        parts.append(slots)
    return np.concatenate(parts, dtype=np.int32, casting="same_kind")


def _segments(row_slots: NDArray[np.int32], segment_rows: int) -> tuple[Indices, Words]:
    """Return the rows that have an adapter, sorted by slot, and segments [S, SEGMENT_WORDS]."""
    rows = row_slots.argsort(kind="stable")[row_slots.size - np.count_nonzero(row_slots) :]
    slots = row_slots[rows]
    begins = np.flatnonzero(np.diff(slots, prepend=0))
    counts = np.diff(begins, append=rows.size)
    pieces = -(-counts // segment_rows)
    owner, piece = _spread(pieces)
    first, offset = begins[owner], piece * segment_rows
    segments = np.zeros((owner.size, SEGMENT_WORDS), np.int32)
    segments[:, 0] = first + offset
    segments[:, 1] = first + np.minimum(offset + segment_rows, counts[owner])
    segments[:, 2] = slots[first]
    return rows, segments


def _planes_per_item(shape: WorkShape, num_blocks: list[int]) -> list[int]:
    """Choose the planes per item, for each kind: as many as leave enough items for all programs.

    Fewer items read x and the tables less often.
    """
    found: list[int] = []
    for kind, blocks in zip(shape.kinds, num_blocks, strict=True):
        planes = per_item = shape.num_planes(kind)
        while per_item > 1 and blocks * (planes // per_item) < shape.min_items:
            per_item //= 2
        found.append(per_item)
    return found


def _spread(counts: NDArray[np.signedinteger]) -> tuple[Indices, Indices]:
    """Expand counts [2, 0, 3] to owners [0, 0, 2, 2, 2] and indices therein [0, 1, 0, 1, 2]."""
    ends = counts.cumsum()
    owner = np.arange(counts.size).repeat(counts)
    return owner, np.arange(owner.size) - (ends - counts)[owner]


def _power_of_two(limit: int) -> int:
    """Return the largest power of two up to `limit`, at least 1."""
    return 1 << max(limit, 1).bit_length() - 1
