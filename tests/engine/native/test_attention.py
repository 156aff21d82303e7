"""Tests paged attention against plain torch, and for independence of chunking and batch mates.

Tolerances. The kernel rounds probabilities to bf16 (2^-8 of each) before they weigh the values,
and its result (2^-8); the first errors are of either sign and average out, so that an output is
off by little more than 2^-8 of itself and a part of 2^-8 of the values, which are about 1. Scores
are float32 and add no visible error. The reference reads the numbers that the blocks hold: int8
codes times their scales.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.kv import KvLayout
from engine.backends.native.library import FUNCTIONS, Context
from engine.model import reference
from engine.model.inputs import AttentionInputs
from tests.engine.native.test_store import empty_blocks, store, unpack_all

BF16, INT8 = structs.KV_BF16, structs.KV_INT8
TOLERANCE = {"rtol": 2**-7, "atol": 2**-7}


@dataclass(frozen=True)
class Request:
    """`new` queries at the end of `context` keys."""

    context: int
    new: int = 1


@dataclass
class Batch:
    """Requests with their KV in blocks of a shuffled pool, all unwritten slots NaN."""

    layout: KvLayout
    blocks: Tensor
    requests: list[Request]
    tables: Tensor  # int32 [requests, largest number of blocks]
    q: Tensor  # bf16 [rows, heads, head_dim]

    @property
    def row_starts(self) -> list[int]:
        starts = [0]
        for request in self.requests:
            starts.append(starts[-1] + request.new)
        return starts

    def only(self, index: int, new: int, context: int | None = None) -> "Batch":
        """Return one request's `new` queries that end at `context`, alone."""
        request = self.requests[index]
        context = context or request.context
        end = self.row_starts[index + 1] - (request.context - context)
        q = self.q[end - new : end].contiguous()
        table = self.tables[index : index + 1].contiguous()
        return Batch(self.layout, self.blocks, [Request(context, new)], table, q)

    def rows_of(self, index: int) -> slice:
        return slice(self.row_starts[index], self.row_starts[index + 1])


def make_batch(
    context: Context,
    requests: list[Request],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    kv_format: int = BF16,
) -> Batch:
    layout = KvLayout(kv_format, block_size, kv_heads, head_dim)
    needed = [-(-r.context // block_size) for r in requests]
    ids = torch.randperm(sum(needed) + 3, dtype=torch.int32)
    tables = torch.full((len(requests), max(needed) + 1), 2**30, dtype=torch.int32)
    blocks = empty_blocks(layout, len(ids))
    for i, own in enumerate(ids[: sum(needed)].split(needed)):
        tables[i, : len(own)] = own
        fill(context, layout, blocks, own, requests[i].context)
    q = torch.randn(sum(r.new for r in requests), heads, head_dim).bfloat16()
    return Batch(layout, blocks, requests, tables, q)


def fill(context: Context, layout: KvLayout, blocks: Tensor, own: Tensor, length: int) -> None:
    position = torch.arange(length)
    slots = own[position // layout.block_size] * layout.block_size + position % layout.block_size
    kv = torch.randn(length, 2 * layout.kv_heads * layout.head_dim).bfloat16()
    store(context, layout, blocks, kv, slots)


def attend(
    context: Context,
    batch: Batch,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    heads, head_dim = batch.q.shape[1:]
    starts = torch.tensor(batch.row_starts, dtype=torch.int32)
    context_lens = torch.tensor([r.context for r in batch.requests], dtype=torch.int32)
    out = torch.full_like(batch.q, torch.nan)
    args = structs.ReefAttentionArgs(
        kv=batch.layout.layer(batch.blocks),
        requests=structs.ReefRequests(
            num_requests=len(batch.requests),
            table_stride=batch.tables.stride(0),
            row_starts=starts.data_ptr(),
            context_lens=context_lens.data_ptr(),
            block_tables=batch.tables.data_ptr(),
        ),
        q=batch.q.data_ptr(),
        q_stride=batch.q.stride(0),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        heads=heads,
        window=window or 0,
        scale=scale or head_dim**-0.5,
        soft_cap=soft_cap or 0.0,
    )
    context.function("attention", FUNCTIONS["attention"])(args)
    return out


def oracle(
    batch: Batch,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    inputs = AttentionInputs(
        num_decodes=0,
        cu_seqlens_q=batch.row_starts,
        context_lens=[r.context for r in batch.requests],
        block_tables=batch.tables.long(),
        slot_mapping=torch.empty(0),
    )
    return reference.paged_attention(
        batch.q.float(),
        unpack_all(batch.layout, batch.blocks),
        inputs,
        scale=scale or batch.q.shape[-1] ** -0.5,
        window=window,
        soft_cap=soft_cap,
    )


def expect_close(kernel: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(kernel.float(), exact, **TOLERANCE)


MIXED = [Request(1), Request(17), Request(300), Request(70, 70), Request(131, 5), Request(64)]

# ==== against the reference ====


@pytest.mark.parametrize("kv_format", [BF16, INT8])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 300, 1100])
def test_one_query_at_the_end_of_a_context(context: Context, length: int, kv_format: int) -> None:
    batch = make_batch(context, [Request(length)], kv_format=kv_format)
    expect_close(attend(context, batch), oracle(batch))


@pytest.mark.parametrize("kv_format", [BF16, INT8])
@pytest.mark.parametrize("head_dim", [2, 16, 18, 32, 64, 80, 96, 128, 256])
def test_a_batch_mixes_decodes_and_prefill_chunks(
    context: Context, head_dim: int, kv_format: int
) -> None:
    batch = make_batch(context, MIXED, head_dim=head_dim, kv_format=kv_format)
    expect_close(attend(context, batch), oracle(batch))


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (9, 3), (14, 2), (8, 1), (71, 1), (10, 2)]
)
def test_query_heads_share_key_heads(context: Context, heads: int, kv_heads: int) -> None:
    requests = [Request(5), Request(130), Request(100, 40)]
    batch = make_batch(context, requests, heads=heads, kv_heads=kv_heads, head_dim=32)
    expect_close(attend(context, batch), oracle(batch))


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_any_block_size(context: Context, block_size: int) -> None:
    batch = make_batch(context, MIXED, block_size=block_size, head_dim=32)
    expect_close(attend(context, batch), oracle(batch))


@pytest.mark.parametrize("kv_format", [BF16, INT8])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 63, 64, 65, 200, 4096])
def test_a_query_sees_its_window(context: Context, window: int, kv_format: int) -> None:
    batch = make_batch(context, MIXED, head_dim=32, kv_format=kv_format)
    expect_close(attend(context, batch, window=window), oracle(batch, window=window))


@pytest.mark.parametrize("heads", [2, 6, 16])
def test_a_window_cuts_through_a_long_prefill(context: Context, heads: int) -> None:
    batch = make_batch(context, [Request(400, 300)], heads=heads, kv_heads=2, head_dim=16)
    expect_close(attend(context, batch, window=37), oracle(batch, window=37))


@pytest.mark.parametrize("soft_cap", [1.0, 30.0, 50.0])
@pytest.mark.parametrize("scale", [0.125, 3.0])
def test_scores_are_capped(context: Context, soft_cap: float, scale: float) -> None:
    batch = make_batch(context, MIXED)
    settings = {"soft_cap": soft_cap, "scale": scale}
    expect_close(attend(context, batch, **settings), oracle(batch, **settings))


def test_large_differences_of_scores_do_not_overflow(context: Context) -> None:
    batch = make_batch(context, MIXED)
    expect_close(attend(context, batch, scale=100.0), oracle(batch, scale=100.0))


def test_equal_scores_give_the_mean_of_the_values(context: Context) -> None:
    batch = make_batch(context, [Request(1000)])
    batch.q.zero_()
    exact = oracle(batch)
    torch.testing.assert_close(attend(context, batch).float(), exact, rtol=2**-8, atol=1e-6)


def test_int8_is_close_to_the_stored_values(context: Context) -> None:
    torch.manual_seed(1)
    fine = make_batch(context, MIXED)
    coarse = KvLayout(INT8, fine.layout.block_size, fine.layout.kv_heads, fine.layout.head_dim)
    blocks = coarse.allocate(fine.blocks.shape[0])
    for block, kv in zip(blocks[:, 0], unpack_all(fine.layout, fine.blocks), strict=True):
        block.copy_(coarse.pack(kv.nan_to_num()))
    out = attend(context, Batch(coarse, blocks, fine.requests, fine.tables, fine.q))
    exact = oracle(fine)
    # steps of 3/127 give errors of 0.007 per value; means over keys have smaller ones
    assert (out.float() - exact).norm() < 0.01 * exact.norm()


def test_requests_may_share_blocks(context: Context) -> None:
    batch = make_batch(context, [Request(200), Request(200, 30), Request(96, 96)])
    batch.tables[1, :10] = batch.tables[0, :10]
    batch.tables[2, :6] = batch.tables[0, :6]
    expect_close(attend(context, batch), oracle(batch))


def test_queries_and_results_may_be_strided(context: Context) -> None:
    batch = make_batch(context, MIXED)
    wide = torch.randn(batch.q.shape[0], 8, 64).bfloat16()
    wide[:, :4] = batch.q
    exact = attend(context, batch)
    batch.q = wide[:, :4]
    assert torch.equal(attend(context, batch), exact)


# ==== independence of batch mates ====

SHAPES = [(14, 2, 64), (4, 4, 80), (3, 1, 128), (8, 1, 18)]


@pytest.mark.parametrize("kv_format", [BF16, INT8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 50])
def test_a_querys_bits_do_not_depend_on_chunking(
    context: Context, shape: tuple[int, int, int], kv_format: int, window: int | None
) -> None:
    heads, kv_heads, head_dim = shape
    batch = make_batch(
        context,
        [Request(331, 331)],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        kv_format=kv_format,
    )
    whole = attend(context, batch, window=window)
    for new in (1, 5, 100):
        for end in {new, 64, 65, 130, 200, 331} - set(range(new)):
            part = attend(context, batch.only(0, new, end), window=window)
            assert torch.equal(part, whole[end - new : end]), (new, end)


@pytest.mark.parametrize("kv_format", [BF16, INT8])
@pytest.mark.parametrize("soft_cap", [None, 20.0])
def test_a_requests_bits_do_not_depend_on_batch_mates(
    context: Context, kv_format: int, soft_cap: float | None
) -> None:
    batch = make_batch(context, MIXED * 3, heads=14, kv_heads=2, kv_format=kv_format)
    together = attend(context, batch, soft_cap=soft_cap)
    for i, request in enumerate(batch.requests):
        alone = attend(context, batch.only(i, request.new), soft_cap=soft_cap)
        assert torch.equal(alone, together[batch.rows_of(i)])


@pytest.mark.parametrize("kv_format", [BF16, INT8])
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, kv_format: int) -> None:
    contexts = [Context(isa, threads) for threads in (1, 2, 3, 8)]
    batch = make_batch(contexts[0], MIXED * 2, heads=9, kv_heads=3, kv_format=kv_format)
    outs = [attend(context, batch) for context in contexts]
    single = [attend(context, batch.only(2, 1)) for context in contexts]
    for context in contexts:
        context.close()
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert all(torch.equal(single[0], out) for out in single[1:])


@pytest.mark.parametrize("kv_format", [BF16, INT8])
def test_a_long_contexts_bits_depend_neither_on_threads_nor_on_chunking(
    isa: str, kv_format: int
) -> None:
    """Contexts of several spans of 1024 keys, which several threads share where rows are few."""
    contexts = [Context(isa, threads) for threads in (1, 2, 5)]
    batch = make_batch(contexts[0], [Request(2100, 3)], heads=3, kv_heads=1, kv_format=kv_format)
    exact = oracle(batch)
    for window in (None, 1500):
        whole = attend(contexts[0], batch, window=window)
        expect_close(whole, exact if window is None else oracle(batch, window=window))
        for context in contexts:
            assert torch.equal(attend(context, batch, window=window), whole)
            last = attend(context, batch.only(0, 1), window=window)
            assert torch.equal(last, whole[-1:])
    for context in contexts:
        context.close()


# ==== keys that a query must not see ====


@pytest.mark.parametrize("new", [1, 2, 90])
@pytest.mark.parametrize("heads", [2, 8])
def test_a_nan_reaches_only_the_queries_that_see_it(context: Context, new: int, heads: int) -> None:
    """Replace each key or value by NaN in turn.

    Queries before it and beyond its window keep their bits; queries that see it become NaN.
    """
    batch = make_batch(context, [Request(150, new)], heads=heads, kv_heads=2, head_dim=32)
    before = attend(context, batch, window=40)
    first_row = 150 - new
    for position in (70, 99, 100, 109, 110, 111, 148, 149):
        for which in (0, 1):
            spoilt = spoil(batch, position, which)
            out = attend(context, spoilt, window=40)
            rows = torch.arange(first_row, 150)
            sees = (rows >= position) & (rows < position + 40)
            assert torch.equal(out[~sees], before[~sees]), (position, which)
            assert out[sees].isnan().any(-1).all(), (position, which)


def spoil(batch: Batch, position: int, which: int) -> Batch:
    """Put a NaN into a key (0) or value (1) of the batch's first request."""
    blocks = batch.blocks.clone()
    block = blocks[batch.tables[0, position // batch.layout.block_size], 0]
    plain = batch.layout.unpack(block)
    plain[which, position % batch.layout.block_size] = torch.nan
    block.copy_(batch.layout.pack(plain))
    return Batch(batch.layout, blocks, batch.requests, batch.tables, batch.q)


def check_nan_queries(context: Context, kv_format: int) -> None:
    """Check that a query that is not finite affects its own head alone."""
    batch = make_batch(context, MIXED, kv_format=kv_format)
    before = attend(context, batch)
    batch.q[1, 2, 3] = torch.nan
    batch.q[20, 0, 0] = torch.inf
    out = attend(context, batch)
    changed = torch.zeros(out.shape[:2], dtype=torch.bool)
    changed[1, 2] = changed[20, 0] = True
    assert out[changed].isnan().all()
    assert torch.equal(out[~changed], before[~changed])


@pytest.mark.parametrize("kv_format", [BF16, INT8])
def test_a_nan_query_affects_only_its_own_head(context: Context, kv_format: int) -> None:
    check_nan_queries(context, kv_format)
