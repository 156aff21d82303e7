"""Tests every kernel on tensors of more than 2^31 elements, whose offsets exceed 32 bits.

The memory is virtual: pages that are not touched take none. A tensor starts in the middle of such a
space, so that an offset truncated to 32 bits reads and writes zeros instead of crashing. Strides
fit into 32 bits, as in practice; the offset of the third row or block does not.
"""

import mmap

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.bank import DeviceAdapterBank
from engine.backends.cuda.extent import UNIT_BYTES, extent_nbytes
from engine.backends.cuda.places import ModelPlaces
from engine.backends.cuda.triton.attention_decode import decode_scratch_numel, paged_decode
from engine.backends.cuda.triton.attention_prefill import paged_prefill, prefill_scratch_numel
from engine.backends.cuda.triton.crossovers import GemmTiles
from engine.backends.cuda.triton.draw import draw, floors
from engine.backends.cuda.triton.fourbit import multiply, planes_size
from engine.backends.cuda.triton.fp8_rows import quantize_rows
from engine.backends.cuda.triton.gate import gate
from engine.backends.cuda.triton.norm import add_rms_norm
from engine.backends.cuda.triton.packed_weight import pack
from engine.backends.cuda.triton.rotary import rotate_and_store
from engine.model import reference
from engine.model.fp8 import E4m3Rows
from engine.model.rotary import Rotary, RotaryTable, Unscaled
from tests.engine.cuda.adapters import launched, load, make_adapter, make_sites
from tests.engine.cuda.test_fourbit import make_weight

BEFORE = 2**31  # elements in front of a tensor
APART = 2**30 + 2**20  # distance of two rows or blocks, in elements
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there they take real memory")


def space(dtype: torch.dtype, behind: int) -> Tensor:
    """Make zeros [behind], with 2^31 elements in front, so that wrong offsets do not crash."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    pages = mmap.mmap(-1, (BEFORE + behind) * dtype.itemsize, flags=flags)
    return torch.frombuffer(pages, dtype=dtype)[BEFORE:]


def spread(rows: Tensor) -> Tensor:
    """Copy three rows to places that are far apart."""
    assert len(rows) == 3 and 2 * APART >= 2**31
    whole = space(rows.dtype, 2 * APART + rows[0].numel())
    return whole.as_strided(rows.shape, (APART, *rows[0].stride())).copy_(rows)


def test_norm_beyond_32_bit_offsets() -> None:
    x, delta, weight = torch.randn(3, 24), torch.randn(3, 24), torch.rand(24)
    wanted = x + delta
    far_x, far_out = spread(x), spread(torch.zeros(3, 24))
    add_rms_norm(far_x, spread(delta), weight, 1e-5, far_out)
    assert torch.equal(far_x, wanted)
    torch.testing.assert_close(far_out, reference.rms_norm(wanted, weight, 1e-5))


def test_gate_beyond_32_bit_offsets() -> None:
    gate_up = torch.randn(3, 40)
    out = spread(torch.zeros(3, 20))
    gate(spread(gate_up), out, "silu")
    torch.testing.assert_close(out, reference.GATED_ACTIVATIONS["silu"](gate_up))


def test_rounding_to_fp8_beyond_32_bit_offsets() -> None:
    x = torch.randn(3, 32)
    near, far = (E4m3Rows.empty(3, 32, x.device) for _ in range(2))
    quantize_rows(x, near)
    quantize_rows(spread(x), far)
    assert torch.equal(far.codes.view(torch.uint8), near.codes.view(torch.uint8))
    assert torch.equal(far.scales, near.scales)


BLOCK_SIZE, KV_HEADS, DIM = 16, 2, 16


def kv_blocks() -> Tensor:
    """Make blocks of keys and values; the last block holds only four."""
    kv = torch.randn(3, 2, BLOCK_SIZE, KV_HEADS, DIM)
    kv[2, :, 4:] = torch.nan
    return kv


def test_rotary_and_the_kv_store_beyond_32_bit_offsets() -> None:
    heads, table = (
        4,
        RotaryTable(Rotary(DIM, 1e4, Unscaled()), 50, torch.float32, torch.device("cpu")),
    )
    qkv = torch.randn(3, (heads + 2 * KV_HEADS) * DIM)
    positions, slots = (torch.tensor(n, dtype=torch.int32) for n in ([3, 30, 7], [37, -1, 2]))
    near, far = (torch.zeros(3, 2, BLOCK_SIZE, KV_HEADS, DIM) for _ in range(2))
    far, far_qkv = spread(far), spread(qkv)
    rotate_and_store(far_qkv, table.cos, table.sin, positions, slots, far)
    rotate_and_store(qkv, table.cos, table.sin, positions, slots, near)
    assert near[2, :, 5].all() and near[0, :, 2].all()
    assert torch.equal(far, near) and torch.equal(far_qkv, qkv)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_decode_beyond_32_bit_offsets(num_splits: int) -> None:
    kv, q = kv_blocks(), torch.randn(3, 4, DIM)
    tables = torch.tensor([[0] * 5, [0, 1, 0, 1, 2], [2] * 5], dtype=torch.int32)
    lens = torch.tensor([16, 68, 4], dtype=torch.int32)
    near, far = torch.zeros(3, 4, DIM), spread(torch.zeros(3, 4, DIM))
    scratch = torch.full((decode_scratch_numel(3, 4, DIM, num_splits),), torch.nan)
    settings = {"scale": 0.3, "window": None, "soft_cap": None, "num_splits": num_splits}
    paged_decode(q, kv, tables, lens, near, scratch, **settings)
    paged_decode(spread(q), spread(kv), tables, lens, far, scratch, **settings)
    assert near.isfinite().all() and near.all()
    assert torch.equal(far, near)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_prefill_beyond_32_bit_offsets(num_splits: int) -> None:
    kv, q = kv_blocks(), torch.randn(3, 4, DIM)
    tables = torch.tensor([[0, 2]], dtype=torch.int32)
    near, far = torch.zeros(3, 4, DIM), spread(torch.zeros(3, 4, DIM))
    for queries, blocks, out in ((q, kv, near), (spread(q), spread(kv), far)):
        paged_prefill(
            queries,
            blocks,
            tables,
            torch.tensor([20], dtype=torch.int32),
            torch.tensor([0, 3], dtype=torch.int32),
            torch.tensor([[0, 0]], dtype=torch.int32),
            out,
            torch.full((prefill_scratch_numel(1, 4, KV_HEADS, DIM, 4, num_splits),), torch.nan),
            tile_tokens=4,
            scale=0.3,
            window=None,
            soft_cap=None,
            num_splits=num_splits,
        )
    assert near.isfinite().all() and near.all()
    assert torch.equal(far, near)


def test_adapters_and_their_moves_beyond_32_bit_offsets() -> None:
    sites = make_sites(1, qkv=(64, (32, 16, 16)))
    dtype = torch.float16
    weights = make_adapter(sites, {"qkv": (3, 8, 5)}, dtype)
    nbytes, arena_bytes = extent_nbytes(weights), 2**33
    bank = DeviceAdapterBank(
        space(torch.uint8, arena_bytes),
        ModelPlaces(sites),
        dtype,
        max_slots=2,
        max_rows=4,
        num_processors=1,
    )
    x, y = torch.randn(3, 64, dtype=dtype), torch.randn(3, 64, dtype=dtype)

    def added(slot: int, x: Tensor, y: Tensor) -> Tensor:
        launched(bank, [slot, 0, slot]).add(0, "qkv", x, y)
        return y

    load(bank, 1, 0, weights)
    near = added(1, x, y.clone())
    assert not torch.equal(near[2], y[2])
    last = (arena_bytes - nbytes) // UNIT_BYTES * UNIT_BYTES
    for offset in (last, last - UNIT_BYTES, 2**32):
        bank.move(1, offset)
        assert torch.equal(added(1, spread(x), spread(y)), near)
    bank.evict(1)
    load(bank, 2, last, weights)
    assert torch.equal(added(2, x, y.clone()), near)


@pytest.mark.parametrize("split_k", [1, 2])
def test_products_of_packed_weights_beyond_32_bit_offsets(split_k: int) -> None:
    weight = pack(make_weight("int8", 72, 128), torch.device("cpu"))
    tiles = GemmTiles(16, 64, num_warps=4, num_stages=2, split_k=split_k)
    x, near, far = torch.randn(3, 128), torch.zeros(3, 72), spread(torch.zeros(3, 72))
    planes = torch.full((planes_size(weight, 3, tiles),), torch.nan)
    multiply(x, weight, None, near, planes, tiles)
    multiply(spread(x), weight, None, far, planes, tiles)
    assert torch.equal(far, near)


def test_drawing_beyond_32_bit_offsets() -> None:
    logits = torch.randn(3, 300) * 20
    rows = torch.tensor([2, 0], dtype=torch.int32)
    ones, keys = torch.ones(2), torch.tensor([5, 7], dtype=torch.int32)
    top_k = torch.tensor([4, 4], dtype=torch.int32)
    drawn: list[Tensor] = []
    found: list[Tensor] = []
    for some in (logits, spread(logits)):
        floor = torch.full((2,), -torch.inf)
        floors(some, rows, ones, top_k, ones, floor)
        found.append(floor)
        drawn.append(draw(some, rows, ones, torch.full((2,), -torch.inf), keys, keys))
    assert torch.equal(found[0], logits[[2, 0]].topk(4).values[:, 3])
    assert torch.equal(found[1], found[0]) and torch.equal(drawn[1], drawn[0])
