"""Tests that DevicePositions match their requests, at any capacity."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from engine.backends.cuda.positions import (
    NO_REQUEST,
    Numbers,
    PositionsCapacity,
    copy_positions,
    exact_capacity,
    prefill_tile_tokens,
    write_positions,
)
from engine.scheduler.batch import ScheduledRequest
from engine.scheduler.request import SamplingParams

BLOCK_SIZE = 16


def request(start: int, new: int, first_block: int = 0) -> ScheduledRequest:
    num_blocks = -(-(start + new) // BLOCK_SIZE)
    table = tuple(range(first_block, first_block + num_blocks))
    return ScheduledRequest("", 0, [7] * new, start, table, 0, SamplingParams(), True)


def written(requests: list[ScheduledRequest], capacity: PositionsCapacity) -> dict[str, Numbers]:
    """Write positions to arrays that hold values of an earlier batch."""
    arrays = {n: np.full(shape, 99, np.int32) for n, shape in capacity.shapes().items()}
    write_positions(arrays, requests, capacity)
    return arrays


def test_a_decode_step_is_padded_to_a_larger_graph() -> None:
    capacity = PositionsCapacity(
        num_decodes=4, num_prefills=0, table_width=3, num_tiles=0, tile_tokens=16
    )
    arrays = written([request(20, 1, 5), request(3, 1, 8)], capacity)
    assert arrays["context_lens"].tolist() == [21, 4, 0, 0]
    assert arrays["cu_seqlens_q"].tolist() == [0, 1, 2, 3, 4]
    assert arrays["block_tables"][0, :2].tolist() == [5, 6]
    assert arrays["block_tables"][1, :1].tolist() == [8]


def test_prefills_follow_the_padded_decodes() -> None:
    capacity = PositionsCapacity(
        num_decodes=2, num_prefills=3, table_width=4, num_tiles=5, tile_tokens=16
    )
    arrays = written([request(20, 1, 5), request(0, 20, 8), request(30, 5, 1)], capacity)
    assert arrays["context_lens"].tolist() == [21, 0, 20, 35, 0]
    assert arrays["cu_seqlens_q"].tolist() == [0, 1, 2, 22, 27, 27]
    assert arrays["block_tables"][2, :2].tolist() == [8, 9]
    assert arrays["block_tables"][3, :3].tolist() == [1, 2, 3]
    # sorted by the number of keys seen: 35, 20, 16
    tiles = arrays["tiles"].tolist()
    assert tiles[:3] == [[3, 22], [2, 18], [2, 2]]
    assert [tile[0] for tile in tiles[3:]] == [NO_REQUEST] * 2


@pytest.mark.parametrize("seed", range(20))
def test_tiles_cover_every_prefill_row_once_and_those_with_most_keys_come_first(seed: int) -> None:
    rng = random.Random(seed)
    prefills = [request(rng.randrange(100), rng.randint(2, 70)) for _ in range(rng.randint(0, 5))]
    requests = [request(rng.randrange(50), 1) for _ in range(rng.randint(0, 3))] + prefills
    tile_tokens = rng.choice([1, 4, 32])
    capacity = exact_capacity(requests, tile_tokens)
    arrays = written(requests, capacity)
    starts = arrays["cu_seqlens_q"].tolist()
    covered: list[int] = []
    keys: list[int] = []
    for i, first in arrays["tiles"].tolist():
        rows = range(first, min(first + tile_tokens, starts[i + 1]))
        assert rows and rows[0] >= starts[i]
        covered += rows
        keys.append(requests[i].end - (starts[i + 1] - rows[-1] - 1))
    assert sorted(covered) == list(range(capacity.num_decodes, starts[-1]))
    assert all(a >= b for a, b in pairwise(keys))


def test_copied_positions_are_exactly_their_requests() -> None:
    requests = [request(20, 1, 5), request(0, 20, 8)]
    positions = copy_positions(requests, 8, torch.device("cpu"), max_context_len=512)
    assert positions.num_decodes == 1
    assert positions.max_context_len == 512
    assert positions.context_lens.tolist() == [21, 20]
    assert positions.block_tables.tolist() == [[5, 6], [8, 9]]
    assert positions.tiles.tolist() == [[1, 17], [1, 9], [1, 1]]


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([request(0, 1)] * 3, "3 decodes: there is room for 2"),
        ([request(0, 5)] * 3, "3 prefills: there is room for 2"),
        ([request(99, 1)], "7 blocks of one request: there is room for 4"),
        ([request(0, 40)], "5 prefill tiles: there is room for 3"),
        ([request(0, 5), request(0, 1)], "a prefill comes before a decode"),
    ],
)
def test_batches_beyond_the_capacity_are_refused(
    requests: list[ScheduledRequest], words: str
) -> None:
    capacity = PositionsCapacity(
        num_decodes=2, num_prefills=2, table_width=4, num_tiles=3, tile_tokens=8
    )
    with pytest.raises(ValueError, match=words):
        written(requests, capacity)


def test_heads_of_a_group_share_a_tiles_rows() -> None:
    assert prefill_tile_tokens(32, 8, 128) == 32
    assert prefill_tile_tokens(14, 2, 64) == 16  # groups of 7 heads are padded to 8
    assert prefill_tile_tokens(16, 8, 256) == 32
    assert prefill_tile_tokens(256, 1, 64) == 1
