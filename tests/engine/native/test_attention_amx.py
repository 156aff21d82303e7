"""Tests attention in AMX tiles: over bf16 like the other kernels, over int8 for the vector kernel's
bits."""

import pytest
import torch

from engine.backends.native.library import Context
from tests.engine.native.test_attention import (
    BF16,
    INT8,
    MIXED,
    Request,
    attend,
    check_nan_queries,
    expect_close,
    make_batch,
    oracle,
    spoil,
)

LONG = [*MIXED, Request(2500, 3), Request(1100)]  # of several spans


@pytest.mark.parametrize("head_dim", [16, 18, 48, 64, 80, 256])
def test_a_batch_mixes_decodes_and_prefill_chunks(amx: Context, head_dim: int) -> None:
    batch = make_batch(amx, MIXED, head_dim=head_dim)
    expect_close(attend(amx, batch), oracle(batch))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (14, 2), (71, 1)])
def test_query_heads_share_key_heads(amx: Context, heads: int, kv_heads: int) -> None:
    batch = make_batch(amx, LONG, heads=heads, kv_heads=kv_heads, head_dim=32, block_size=48)
    expect_close(attend(amx, batch), oracle(batch))


@pytest.mark.parametrize("window", [1, 64, 200])
def test_a_query_sees_its_window(amx: Context, window: int) -> None:
    batch = make_batch(amx, LONG, head_dim=32)
    expect_close(
        attend(amx, batch, window=window, soft_cap=30.0),
        oracle(batch, window=window, soft_cap=30.0),
    )


@pytest.mark.parametrize(("heads", "window"), [(14, None), (3, 50)])
def test_a_querys_bits_do_not_depend_on_chunking(
    amx: Context, heads: int, window: int | None
) -> None:
    batch = make_batch(amx, [Request(1331, 331)], heads=heads, kv_heads=1, head_dim=48)
    whole = attend(amx, batch, window=window)
    for new, end in ((1, 1024), (1, 1100), (5, 1025), (5, 1200), (100, 1331), (100, 1150)):
        part = attend(amx, batch.only(0, new, end), window=window)
        assert torch.equal(part, whole[end - 1000 - new : end - 1000]), (new, end)


def test_bits_depend_neither_on_batch_mates_nor_on_threads(amx: Context) -> None:
    batch = make_batch(amx, LONG * 2, heads=9, kv_heads=3)
    together = attend(amx, batch)
    for i, request in enumerate(batch.requests):
        assert torch.equal(attend(amx, batch.only(i, request.new)), together[batch.rows_of(i)])
    other = Context("amx", 2)
    assert torch.equal(attend(other, batch), together)
    other.close()


def test_a_nan_reaches_only_the_queries_that_see_it(amx: Context) -> None:
    batch = make_batch(amx, [Request(150, 90)], heads=8, kv_heads=2, head_dim=32)
    before = attend(amx, batch, window=40)
    rows = torch.arange(60, 150)
    for position in (70, 100, 110, 111, 148, 149):
        for which in (0, 1):
            spoilt = spoil(batch, position, which)
            out = attend(amx, spoilt, window=40)
            sees = (rows >= position) & (rows < position + 40)
            assert torch.equal(out[~sees], before[~sees]), (position, which)
            assert out[sees].isnan().any(-1).all(), (position, which)
            last = attend(amx, spoilt.only(0, 1), window=40)
            assert torch.equal(last.isnan(), out[-1:].isnan()), (position, which)


@pytest.mark.parametrize("head_dim", [16, 18, 48, 64, 80, 256])
@pytest.mark.parametrize("window", [None, 200])
def test_int8_has_the_bits_of_the_vector_kernel(
    amx: Context, vectors: Context, head_dim: int, window: int | None
) -> None:
    requests = LONG if head_dim == 64 else MIXED
    batch = make_batch(amx, requests, heads=14, head_dim=head_dim, kv_format=INT8)
    settings = {"window": window, "soft_cap": 20.0 if window else None}
    out = attend(amx, batch, **settings)
    assert torch.equal(out, attend(vectors, batch, **settings))
    expect_close(out, oracle(batch, **settings))


@pytest.mark.parametrize("kv_format", [BF16, INT8])
def test_a_nan_query_affects_only_its_own_head(amx: Context, kv_format: int) -> None:
    check_nan_queries(amx, kv_format)
