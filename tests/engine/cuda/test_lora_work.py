"""Tests that the work lists contain every product of every row exactly once."""

import random

import numpy as np
import pytest

from engine.backends.cuda.triton import lora_work
from engine.backends.cuda.triton.lora_work import (
    DECODE_ROWS,
    HEADER_WORDS,
    MAX_BLOCKS,
    SEGMENT_WORDS,
    SiteKind,
    Words,
    WorkShape,
    build_words,
    rounded_rows,
)
from tests.engine.cuda.adapters import TRAFFIC, row_slots

KINDS = (SiteKind(4096, (4096, 1024, 1024)), SiteKind(14336, (4096,)), SiteKind(64, (64,)))
NUM_SLOTS = 40


def make_shape(rows: int, *, num_processors: int = 4, max_adapters: int = NUM_SLOTS) -> WorkShape:
    return WorkShape(KINDS, rounded_rows(rows), max_adapters, 256, num_processors)


def random_ranks(seed: int) -> np.ndarray:
    """Draw ranks [kinds, slots], often 0."""
    rng = random.Random(seed)
    ranks = np.zeros((len(KINDS), NUM_SLOTS + 1), np.int32)
    for number, kind in enumerate(KINDS):
        for slot in range(1, NUM_SLOTS + 1):
            most = 256 * len(kind.out_features)
            ranks[number, slot] = rng.choice([0, 1, 8, 16, rng.randint(1, most), most])
    return ranks


def segments_of(shape: WorkShape, words: Words) -> list[tuple[list[int], int]]:
    """Decode (rows, slot) of each segment; segments end where the rows begin."""
    begin = len(shape.kinds) * HEADER_WORDS
    rows_at = words[lora_work.ROWS_AT]
    found = words[begin:rows_at].reshape(-1, SEGMENT_WORDS)
    rows = words[rows_at:]
    return [(rows[start:end].tolist(), int(slot)) for start, end, slot, _ in found]


def products_of(shape: WorkShape, words: Words, kind: int) -> list[tuple[int, int, int]]:
    """List (segment, first rank row, plane) of all products of shrink's items."""
    header = words[kind * HEADER_WORDS :]
    per_block, per_item = header[lora_work.ITEMS_PER_BLOCK], header[lora_work.PLANES_PER_ITEM]
    products: list[tuple[int, int, int]] = []
    for item in range(header[lora_work.NUM_ITEMS]):
        segment, block = divmod(
            int(words[header[lora_work.BLOCKS_AT] + item // per_block]), MAX_BLOCKS
        )
        first = item % per_block * per_item
        rank0 = block * shape.tiles.shrink.ranks
        products += [(segment, rank0, plane) for plane in range(first, first + per_item)]
    return products


@pytest.mark.parametrize("kind", TRAFFIC)
@pytest.mark.parametrize("rows", [1, 16, 100, 256, 257, 1500])
def test_every_row_with_an_adapter_is_in_one_segment_of_its_slot(kind: str, rows: int) -> None:
    slots = row_slots(kind, NUM_SLOTS, rows)
    shape = make_shape(rows)
    segments = segments_of(shape, build_words(shape, slots, random_ranks(0)))
    seen = [(row, slot) for of_segment, slot in segments for row in of_segment]
    assert sorted(seen) == [(row, slot) for row, slot in enumerate(slots) if slot]
    assert all(1 <= len(of_segment) <= shape.tiles.segment_rows for of_segment, _ in segments)
    fewest = sum(-(-slots.count(s) // shape.tiles.segment_rows) for s in set(slots) - {0})
    assert len(segments) == fewest


@pytest.mark.parametrize("kind", TRAFFIC)
@pytest.mark.parametrize("rows", [1, 100, 256, 600])
@pytest.mark.parametrize("num_processors", [1, 132])
def test_every_product_is_listed_once_at_the_adapters_own_rank(
    kind: str, rows: int, num_processors: int
) -> None:
    slots, ranks = row_slots(kind, NUM_SLOTS, rows), random_ranks(rows)
    affine = random_ranks(rows + 1) > 16
    shape = make_shape(rows, num_processors=num_processors)
    words = build_words(shape, slots, ranks, affine)
    segments = segments_of(shape, words)
    for number, site in enumerate(KINDS):
        step, planes = shape.tiles.shrink.ranks, shape.num_planes(site)
        wanted = [
            (i, rank0, plane)
            for i, (_, slot) in enumerate(segments)
            for rank0 in range(0, ranks[number, slot], step)
            for plane in range(planes)
        ]
        assert sorted(products_of(shape, words, number)) == wanted
        header = words[number * HEADER_WORDS :]
        listed = words[header[lora_work.LISTED_AT] :][: header[lora_work.NUM_LISTED]]
        has_any = (ranks[number] > 0) | affine[number]
        assert listed.tolist() == [i for i, (_, slot) in enumerate(segments) if has_any[slot]]


@pytest.mark.parametrize("rows", [1, 8, 256, 257, 1024, 5000])
@pytest.mark.parametrize("max_adapters", [1, 7, NUM_SLOTS])
def test_the_longest_lists_have_exactly_the_largest_size(rows: int, max_adapters: int) -> None:
    """Use the most adapters, of the largest rank; one of them has all remaining rows."""
    shape = make_shape(rows, max_adapters=max_adapters)
    adapters = min(rows, max_adapters)
    slots = [*range(1, adapters + 1), *[1] * (rows - adapters)]
    ranks = np.zeros((len(KINDS), NUM_SLOTS + 1), np.int32)
    ranks[:, 1:] = [[shape.plane_width(kind)] for kind in KINDS]
    owns = np.ones(NUM_SLOTS + 1, np.bool_)
    words = build_words(shape, slots, ranks, owns=owns)
    assert words.size == shape.max_words(rows)
    assert words[words[lora_work.SLOTS_AT] :].tolist() == slots


def test_a_batch_without_adapters_has_no_work() -> None:
    shape = make_shape(4)
    words = build_words(shape, [0, 0, 0, 0], random_ranks(0))
    header = words.reshape(len(KINDS), HEADER_WORDS)
    assert not header[:, [lora_work.NUM_ITEMS, lora_work.NUM_LISTED]].any()
    nobody = np.arange(NUM_SLOTS + 1) == 3
    assert not build_words(shape, [1, 2, 0], random_ranks(0), owns=nobody)[lora_work.SLOTS_AT]
    assert build_words(shape, [], random_ranks(0)).tolist() == words.tolist()


def test_few_blocks_are_split_finer() -> None:
    ranks = np.full((len(KINDS), NUM_SLOTS + 1), 16, np.int32)
    distinct = list(range(1, NUM_SLOTS + 1))
    for num_processors, slots, wanted in ((132, [1], 1), (8, distinct, 4), (1, distinct, 8)):
        shape = make_shape(256, num_processors=num_processors)
        words = build_words(shape, slots, ranks)
        assert shape.num_planes(KINDS[0]) == 8
        assert words[lora_work.PLANES_PER_ITEM] == wanted
        assert words[lora_work.NUM_ITEMS] == len(slots) * 8 // wanted


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 512, 513, 8192, 20000])
def test_row_counts_are_rounded_up_to_few_shapes(rows: int) -> None:
    rounded = rounded_rows(rows)
    assert rows <= rounded < max(2 * rows, DECODE_ROWS + 1)
    assert rounded & (rounded - 1) == 0
    shape = make_shape(rows)
    for kind in KINDS:
        planes = shape.num_planes(kind)
        assert 1 <= planes <= shape.tiles.max_planes and planes & (planes - 1) == 0
        assert shape.plane_words >= planes * rounded * shape.plane_width(kind)
