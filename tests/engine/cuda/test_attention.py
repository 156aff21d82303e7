"""Tests Triton's paged attention against plain torch, and for independence of batch mates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.backends.cuda.forward import WARM_UP_ROWS
from engine.backends.cuda.positions import (
    DevicePositions,
    PositionsCapacity,
    copy_positions,
    write_positions,
)
from engine.backends.cuda.triton.attention import TritonAttention
from engine.backends.cuda.triton.attention_decode import (
    choose_num_splits,
    decode_scratch_numel,
    paged_decode,
)
from engine.backends.cuda.triton.attention_prefill import (
    choose_prefill_splits,
    paged_prefill,
    prefill_scratch_numel,
)
from engine.backends.cuda.triton.attention_tile import check_shapes
from tests.engine.cuda.attention_batch import Batch, Request, make_batch, oracle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE, MAX_CONTEXT_LEN = 0.3, 256
# float32: sums in another order, of scores up to 30; other dtypes round weights and results
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
MIXED = [Request(5), Request(70), Request(40, 40), Request(133, 3)]


def attend(batch: Batch, *, tile_tokens: int = 8, num_sms: int = 4, **settings: Any) -> Tensor:
    attention = make_attention(batch.q.shape[1], *batch.kv_layer.shape[3:], num_sms)
    positions = copy_positions(batch.scheduled, tile_tokens, DEVICE, MAX_CONTEXT_LEN)
    settings = {"scale": SCALE, "window": None, "soft_cap": None, **settings}
    return attention(batch.q.to(DEVICE), _to_device(batch.kv_layer), positions, **settings).cpu()


def make_attention(heads: int, kv_heads: int, head_dim: int, num_sms: int) -> TritonAttention:
    return TritonAttention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_decodes=8,
        max_context_len=MAX_CONTEXT_LEN,
        num_sms=num_sms,
        device=DEVICE,
    )


def decode(
    batch: Batch, num_splits: int, window: int | None = None, scratch_numel: int | None = None
) -> Tensor:
    """Run `paged_decode` with scratch and results full of NaN."""
    positions = copy_positions(batch.scheduled, 1, DEVICE, MAX_CONTEXT_LEN)
    q, out = batch.q.to(DEVICE), torch.full_like(batch.q, torch.nan, device=DEVICE)
    numel = scratch_numel or decode_scratch_numel(*q.shape, num_splits)
    paged_decode(
        q,
        _to_device(batch.kv_layer),
        positions.block_tables,
        positions.context_lens,
        out,
        torch.full((numel,), torch.nan, device=DEVICE),
        scale=SCALE,
        window=window,
        soft_cap=None,
        num_splits=num_splits,
    )
    return out.cpu()


def prefill(batch: Batch, num_splits: int, **settings: Any) -> Tensor:
    """Run `paged_prefill` with scratch and results full of NaN."""
    positions = copy_positions(batch.scheduled, 8, DEVICE, 512)
    q, out = batch.q.to(DEVICE), torch.full_like(batch.q, torch.nan, device=DEVICE)
    shape = (len(positions.tiles), q.shape[1], batch.kv_layer.shape[3], q.shape[2], 8, num_splits)
    paged_prefill(
        q,
        _to_device(batch.kv_layer),
        positions.block_tables,
        positions.context_lens,
        positions.cu_seqlens_q,
        positions.tiles,
        out,
        torch.full((prefill_scratch_numel(*shape),), torch.nan, device=DEVICE),
        tile_tokens=8,
        num_splits=num_splits,
        **{"scale": SCALE, "window": None, "soft_cap": None, **settings},
    )
    return out.cpu()


def _to_device(kv_layer: Tensor) -> Tensor:
    """Copy to the device, with other layers between the blocks, as in the arena."""
    return torch.stack([torch.full_like(kv_layer, torch.nan), kv_layer], 1).to(DEVICE)[:, 1]


def expect_close(out: Tensor, exact: Tensor) -> None:
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.float(), exact, rtol=tolerance, atol=tolerance)


# ==== against the reference ====


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_batch_mixes_decodes_and_prefill_chunks(
    dtype: torch.dtype, window: int | None, soft_cap: float | None
) -> None:
    batch = make_batch(MIXED, dtype=dtype)
    settings = {"window": window, "soft_cap": soft_cap}
    expect_close(attend(batch, **settings), oracle(batch, scale=SCALE, **settings))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(1, 1, 8), (3, 1, 80), (14, 2, 64), (17, 1, 24), (2, 2, 128), (2, 1, 256)],
)
def test_attention_with_the_heads_of_many_models(heads: int, kv_heads: int, head_dim: int) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    batch = make_batch([Request(37), Request(50, 5)], **shape)
    expect_close(attend(batch), oracle(batch, scale=SCALE))


@pytest.mark.parametrize("block_size", [32, 48])
def test_any_block_size(block_size: int) -> None:
    batch = make_batch(MIXED, block_size=block_size)
    expect_close(attend(batch), oracle(batch, scale=SCALE))


@pytest.mark.parametrize(
    ("num_splits", "window"), [(1, None), (2, None), (5, None), (1, 65), (3, 65), (2, 1)]
)
def test_splits_of_a_decode_add_up(num_splits: int, window: int | None) -> None:
    batch = make_batch([Request(1), Request(64), Request(133), Request(250)], kv_heads=1)
    out = decode(batch, num_splits, window)
    expect_close(out, oracle(batch, scale=SCALE, window=window))


@pytest.mark.parametrize(("num_splits", "window"), [(2, None), (5, None), (3, 200), (2, 1)])
def test_splits_of_a_prefill_add_up(num_splits: int, window: int | None) -> None:
    batch = make_batch([Request(400, 11), Request(30, 12)], heads=6, kv_heads=2)
    expect_close(
        prefill(batch, num_splits, window=window), oracle(batch, scale=SCALE, window=window)
    )


@pytest.mark.parametrize("window", [1, 32, 33, 100])
def test_a_window_cuts_through_a_long_prefill(window: int) -> None:
    batch = make_batch([Request(150, 60)], heads=2, kv_heads=1)
    out = attend(batch, window=window, tile_tokens=16)
    expect_close(out, oracle(batch, scale=SCALE, window=window))


def test_a_tile_longer_than_all_keys_and_one_of_a_single_row() -> None:
    batch = make_batch([Request(9, 9), Request(34, 34)], kv_heads=1)
    for tile_tokens in (1, 32):
        expect_close(attend(batch, tile_tokens=tile_tokens), oracle(batch, scale=SCALE))


def test_queries_and_results_may_be_strided() -> None:
    batch = make_batch(MIXED)
    rows = len(batch.q)
    wide = torch.randn(rows, 7, 16)
    wide[:, :4] = batch.q
    strided = Batch(batch.requests, batch.scheduled, batch.kv_layer, wide.to(DEVICE)[:, :4])
    assert torch.equal(attend(strided), attend(batch))


def test_requests_may_share_blocks() -> None:
    batch = make_batch([Request(64), Request(70), Request(80, 30)])
    shared = batch.scheduled[1].block_table[:3]
    for i in (0, 2):
        own = batch.scheduled[i]
        batch.scheduled[i] = own._replace(block_table=shared + own.block_table[3:])
    expect_close(attend(batch), oracle(batch, scale=SCALE))


# ==== independence of batch mates ====


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_decodes_bits_do_not_depend_on_batch_mates(num_splits: int) -> None:
    batch = make_batch([Request(1), Request(133), Request(250)], kv_heads=1, dtype=torch.float16)
    together = decode(batch, num_splits)
    for i in range(len(batch.requests)):
        assert torch.equal(decode(batch.only(i), num_splits), together[i : i + 1])


def test_a_prefills_bits_do_not_depend_on_batch_mates() -> None:
    batch = make_batch(MIXED, dtype=torch.float16)
    together = attend(batch)
    for i in (2, 3):
        assert torch.equal(attend(batch.only(i)), together[batch.rows_of(i)])


def test_a_split_prefills_bits_do_not_depend_on_batch_mates() -> None:
    batch = make_batch([Request(300, 11), Request(200, 4)], kv_heads=1, dtype=torch.float16)
    together = prefill(batch, 2)
    for i in range(2):
        assert torch.equal(prefill(batch.only(i), 2), together[batch.rows_of(i)])


# ==== keys that a row must not see ====


def test_nothing_of_other_requests_or_stale_slots_is_read() -> None:
    """All slots of the pool that the request does not use are NaN, also in its own blocks."""
    batch = make_batch([Request(33), Request(21, 6)], dtype=torch.float16)
    before = attend(batch)
    for i in range(2):
        own = batch.only(i)
        spoilt = torch.full_like(own.kv_layer, torch.nan)
        for position in range(own.requests[0].context):
            block, slot = own.scheduled[0].block_table[position // 16], position % 16
            spoilt[block, :, slot] = own.kv_layer[block, :, slot]
        alone = Batch(own.requests, own.scheduled, spoilt, own.q)
        assert torch.equal(attend(alone), before[batch.rows_of(i)])
    assert before.isfinite().all()


def test_keys_outside_the_window_are_not_read() -> None:
    batch = make_batch([Request(100), Request(100, 8)])
    before = attend(batch, window=20)
    for request, first_seen in zip(batch.scheduled, (80, 73), strict=True):
        for position in range(first_seen):
            batch.kv_layer[request.block_table[position // 16], :, position % 16] = torch.nan
    assert torch.equal(attend(batch, window=20), before)
    assert before.isfinite().all()


@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_row_of_padding_is_zeros_and_reads_nothing(num_splits: int) -> None:
    batch = make_batch([Request(20), Request(40)])
    nowhere = (2**30, 2**30, 2**30)
    batch.scheduled[0] = batch.scheduled[0]._replace(block_table=nowhere, start=-1)
    out = decode(batch, num_splits)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[1:], decode(batch.only(1), num_splits))


# ==== shapes of a captured graph ====


def test_a_captured_graph_serves_every_batch_that_fits() -> None:
    """Replay the same launches over the same tensors with other values.

    First all rows are padding; later one of three decodes is, and some tiles.
    """
    capacity = PositionsCapacity(
        num_decodes=3, num_prefills=3, table_width=16, num_tiles=12, tile_tokens=8
    )
    arrays = {n: np.full(shape, 2**30, np.int32) for n, shape in capacity.shapes().items()}
    write_positions(arrays, [], capacity)
    tensors = {n: torch.from_numpy(array).to(DEVICE) for n, array in arrays.items()}
    positions = DevicePositions(
        **tensors, num_decodes=3, tile_tokens=8, max_context_len=MAX_CONTEXT_LEN
    )
    kv_layer = torch.zeros(32, 2, 2, 16, 2, 16, device=DEVICE)[:, 1]
    q = torch.zeros(3 + 43, 4, 16, device=DEVICE)
    out = torch.full_like(q, torch.nan)
    attention = make_attention(4, 2, 16, num_sms=1)  # so few that decodes are not split
    settings = {"scale": SCALE, "window": None, "soft_cap": None}
    replay = captured(lambda: attention(q, kv_layer, positions, out=out, **settings))
    for requests in (MIXED, [Request(30), Request(61), Request(99), Request(20, 11)], MIXED):
        batch = make_batch(requests)
        write_positions(arrays, batch.scheduled, capacity)
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(arrays[name]))
        kv_layer[: len(batch.kv_layer)] = batch.kv_layer.to(DEVICE)
        decodes = sum(r.new == 1 for r in requests)
        rows = torch.tensor([*range(decodes), *range(3, 3 + len(batch.q) - decodes)])
        q[rows] = batch.q.to(DEVICE)
        replay()
        assert torch.equal(out[rows].cpu(), attend(batch, num_sms=1))
        assert not out[decodes:3].any()


def captured(launch: Callable[[], object]) -> Callable[[], object]:
    """Capture the launches in a CUDA graph; without a GPU, launch them again."""
    launch()
    if DEVICE.type == "cpu":
        return launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


@pytest.mark.parametrize(("batch", "splits"), [(1, 32), (8, 9), (64, 2), (256, 1)])
def test_splits_decrease_with_the_number_of_requests(batch: int, splits: int) -> None:
    assert choose_num_splits(batch, kv_heads=8, num_sms=132, max_context_len=8192) == splits


@pytest.mark.parametrize(("tiles", "splits"), [(1, 16), (3, 5), (8, 2), (9, 1), (1000, 1)])
def test_the_keys_of_few_tiles_are_split(tiles: int, splits: int) -> None:
    shape = {"kv_heads": 8, "num_sms": 132}
    assert choose_prefill_splits(tiles, **shape, max_context_len=8192) == splits
    assert choose_prefill_splits(tiles, **shape, max_context_len=64) == 1


def test_a_warm_up_runs_attention_with_and_without_splits() -> None:
    shape = {"kv_heads": 8, "num_sms": 132, "max_context_len": 8192}
    for choose in (choose_num_splits, choose_prefill_splits):
        assert {choose(rows, **shape) == 1 for rows in WARM_UP_ROWS} == {True, False}


def test_long_contexts_are_split_in_large_batches_and_short_ones_never() -> None:
    shape = {"batch": 256, "kv_heads": 8, "num_sms": 132}
    assert choose_num_splits(**shape, max_context_len=32768) == 4
    assert choose_num_splits(**shape, max_context_len=2**20) == 8
    assert choose_num_splits(1, kv_heads=8, num_sms=132, max_context_len=64) == 1


# ==== refusals ====


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"head_dim": 20}, "head_dim 20"),
        ({"head_dim": 264}, "head_dim 264"),
        ({"block_size": 24}, "block_size 24"),
        ({"heads": 3}, "multiple of 2"),
    ],
)
def test_unsupported_shapes_are_refused(shape: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attend(make_batch([Request(20), Request(20, 4)], **shape))


def test_a_cache_of_another_layout_or_dtype_is_refused() -> None:
    q = torch.randn(3, 4, 16)
    kv_layer = torch.zeros(2, 2, 16, 2, 16)
    check_shapes(q, kv_layer, q)
    heads_first = torch.zeros(2, 2, 2, 16, 16).transpose(2, 3)
    with pytest.raises(ValueError, match="blocks are contiguous"):
        check_shapes(q, heads_first, q)
    with pytest.raises(ValueError, match=r"need torch.float16"):
        check_shapes(q, kv_layer.half(), q)
    with pytest.raises(ValueError, match=r"strides \(128, 32, 1\)"):
        check_shapes(q, kv_layer, torch.randn(3, 4, 32)[..., :16])


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"scale": -1.0}, {"soft_cap": 0.0}])
def test_scales_and_caps_that_are_not_positive_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        attend(make_batch([Request(20)]), **settings)


def test_more_splits_than_the_maximum_are_refused() -> None:
    with pytest.raises(ValueError, match="num_splits 33: need 1 to 32"):
        decode(make_batch([Request(20)]), 33)


def test_scratch_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="need float32 of 136"):
        decode(make_batch([Request(20)]), 2, scratch_numel=135)
