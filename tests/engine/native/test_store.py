"""Tests store: q and k of each row are rotated in place, k and v are written to their slots.

The reference computes in float32 and rounds once, as the kernel does; x cos + y sin may be fused
or not, so a rotated number may be rounded differently: by one unit in the last place of bf16, at
most 2^-8 of it.
"""

import pytest
import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.kv import KvLayout, check_heads, check_rotary
from engine.backends.native.library import FUNCTIONS, Context
from engine.model import reference

BF16, INT8 = structs.KV_BF16, structs.KV_INT8
ONE_ULP = {"rtol": 2**-7, "atol": 2**-14}
NAN_BYTE = 0xFF  # 0xffff is a NaN in bf16, and four of them a NaN in float32


def store(
    context: Context,
    layout: KvLayout,
    blocks: Tensor,
    qkv: Tensor,
    slots: Tensor,
    *,
    positions: Tensor | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
    layer: int = 0,
) -> None:
    """Rotate and store the rows of qkv; without tables nothing is rotated."""
    cos, sin = tables or (None, None)
    positions, slots = (None if t is None else t.int() for t in (positions, slots))
    args = structs.ReefStoreArgs(
        kv=layout.layer(blocks, layer),
        qkv=qkv.data_ptr(),
        qkv_stride=qkv.stride(0),
        cos=None if cos is None else cos.data_ptr(),
        sin=None if sin is None else sin.data_ptr(),
        positions=None if positions is None else positions.data_ptr(),
        slot_mapping=slots.data_ptr(),
        rows=qkv.shape[0],
        heads=qkv.shape[1] // layout.head_dim - 2 * layout.kv_heads,
        rotary_dim=0 if cos is None else cos.shape[1],
    )
    context.function("store", FUNCTIONS["store"])(args)


def rotary_tables(positions: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 1 / 100.0 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def random_rows(rows: int, heads: int, layout: KvLayout) -> Tensor:
    return torch.randn(rows, (heads + 2 * layout.kv_heads) * layout.head_dim).bfloat16()


def empty_blocks(layout: KvLayout, num_blocks: int, num_layers: int = 1) -> Tensor:
    return layout.allocate(num_blocks, num_layers).fill_(NAN_BYTE)


def unpack_all(layout: KvLayout, blocks: Tensor, layer: int = 0) -> Tensor:
    """Return all blocks [blocks, 2, block_size, kv_heads, head_dim] in float32."""
    return torch.stack([layout.unpack(block) for block in blocks[:, layer]])


def stored(layout: KvLayout, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values [rows, kv_heads, head_dim] at some slots."""
    kv = unpack_all(layout, blocks).transpose(1, 2).flatten(0, 1)[slots]
    return kv[:, 0], kv[:, 1]


def split(qkv: Tensor, heads: int, layout: KvLayout) -> tuple[Tensor, Tensor, Tensor]:
    parts = qkv.view(qkv.shape[0], -1, layout.head_dim)
    return parts.split([heads, layout.kv_heads, layout.kv_heads], 1)


def expect_same(kernel: Tensor, oracle: Tensor) -> None:
    torch.testing.assert_close(kernel.float(), oracle.float(), **ONE_ULP)


@pytest.mark.parametrize("kv_format", [BF16, INT8])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (32, 80), (48, 18), (64, 2)])
def test_unpack_returns_what_was_packed(kv_format: int, block_size: int, head_dim: int) -> None:
    layout = KvLayout(kv_format, block_size, kv_heads=3, head_dim=head_dim)
    plain = torch.randn(2, block_size, 3, head_dim).bfloat16()
    packed = layout.pack(plain)
    assert packed.shape == (layout.block_bytes,)
    step = plain.float().abs().amax(-1, keepdim=True) / 127 if kv_format == INT8 else torch.zeros(1)
    assert ((layout.unpack(packed) - plain.float()).abs() <= step * 0.501).all()


@pytest.mark.parametrize("head_dim", [2, 16, 18, 30, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_keys_and_values_arrive_in_their_slots(
    context: Context, head_dim: int, block_size: int
) -> None:
    layout = KvLayout(BF16, block_size, kv_heads=2, head_dim=head_dim)
    blocks = empty_blocks(layout, 5)
    qkv = random_rows(37, 6, layout)
    slots = torch.randperm(5 * block_size)[:37]
    before = qkv.clone()
    store(context, layout, blocks, qkv, slots)
    _, k, v = split(before, 6, layout)
    keys, values = stored(layout, blocks, slots)
    assert torch.equal(qkv, before)  # nothing to rotate
    assert torch.equal(keys, k.float())
    assert torch.equal(values, v.float())


def test_other_slots_are_left_as_they_were(context: Context) -> None:
    layout = KvLayout(BF16, 16, kv_heads=2, head_dim=32)
    blocks = empty_blocks(layout, 3, num_layers=2)
    store(context, layout, blocks, random_rows(5, 2, layout), torch.arange(18, 23), layer=1)
    assert (blocks[:, 0] == NAN_BYTE).all()
    written = ~unpack_all(layout, blocks, layer=1).isnan().all(-1).all(-1)  # [blocks, 2, positions]
    assert written.sum() == 2 * 5
    assert written[1, :, 2:7].all()


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(64, 64), (64, 30), (80, 20), (96, 96), (128, 6), (16, 2)]
)
def test_queries_and_keys_are_rotated_and_values_are_not(
    context: Context, head_dim: int, rotary_dim: int
) -> None:
    layout = KvLayout(BF16, 16, kv_heads=2, head_dim=head_dim)
    blocks, tables = empty_blocks(layout, 8), rotary_tables(500, rotary_dim)
    qkv = random_rows(70, 4, layout)
    positions, slots = torch.randint(0, 500, (70,)), torch.randperm(128)[:70]
    q, k, v = (part.clone() for part in split(qkv, 4, layout))
    store(context, layout, blocks, qkv, slots, positions=positions, tables=tables)
    for part in (q, k):
        reference.apply_rotary(part, tables[0][positions], tables[1][positions])
    keys, values = stored(layout, blocks, slots)
    expect_same(split(qkv, 4, layout)[0], q)
    expect_same(split(qkv, 4, layout)[1], k)
    expect_same(keys, k)
    assert torch.equal(values, v.float())


def test_rows_may_be_strided(context: Context) -> None:
    layout = KvLayout(BF16, 16, kv_heads=1, head_dim=16)
    wide = torch.randn(3, 100).bfloat16()
    before = wide.clone()
    blocks, slots = empty_blocks(layout, 1), torch.arange(3)
    tables = rotary_tables(4, 16)
    store(context, layout, blocks, wide[:, :48], slots, positions=torch.ones(3), tables=tables)
    assert torch.equal(wide[:, 32:], before[:, 32:])
    assert torch.equal(stored(layout, blocks, slots)[1][:, 0], before[:, 32:48].float())


@pytest.mark.parametrize("head_dim", [18, 64, 80, 128])
def test_int8_keeps_each_number_to_half_a_step_of_its_head(context: Context, head_dim: int) -> None:
    layout = KvLayout(INT8, 32, kv_heads=3, head_dim=head_dim)
    blocks = empty_blocks(layout, 2)
    qkv = random_rows(40, 3, layout) * torch.logspace(-3, 3, 40)[:, None].bfloat16()
    qkv[7] = 0
    slots = torch.randperm(64)[:40]
    store(context, layout, blocks, qkv, slots)
    _, k, v = split(qkv.float(), 3, layout)
    for kept, exact in zip(stored(layout, blocks, slots), (k, v), strict=True):
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((kept - exact).abs() <= step * 0.501).all()


def test_int8_keeps_a_nan_and_an_infinity_as_nan(context: Context) -> None:
    layout = KvLayout(INT8, 16, kv_heads=1, head_dim=32)
    blocks, slots = empty_blocks(layout, 1), torch.arange(3)
    qkv = random_rows(3, 1, layout)
    qkv[0, 40], qkv[1, 70] = torch.nan, torch.inf
    store(context, layout, blocks, qkv, slots)
    keys, values = stored(layout, blocks, slots)
    assert keys[0].isnan().all()
    assert values[1].isnan().all()
    assert keys[1:].isfinite().all()
    assert values[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kv_format", [BF16, INT8])
def test_a_rows_bits_do_not_depend_on_batch_mates(context: Context, kv_format: int) -> None:
    layout = KvLayout(kv_format, 16, kv_heads=2, head_dim=64)
    rows, tables = random_rows(130, 14, layout), rotary_tables(200, 64)
    slots, positions = torch.randperm(144)[:130], torch.randint(0, 200, (130,))
    together, alone = empty_blocks(layout, 9), empty_blocks(layout, 9)
    all_at_once = rows.clone()
    store(context, layout, together, all_at_once, slots, positions=positions, tables=tables)
    for i in range(130):
        one = slice(i, i + 1)
        store(
            context, layout, alone, rows[one], slots[one], positions=positions[one], tables=tables
        )
    assert torch.equal(all_at_once, rows)
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv_format": 2}, "kv_format 2"),
        ({"block_size": 8}, "block_size 8: need a multiple of 16"),
        ({"block_size": 40}, "block_size 40: need a multiple of 16"),
        ({"kv_heads": 0}, "kv_heads 0"),
        ({"head_dim": 65}, "head_dim 65: need an even number from 2 to 256"),
        ({"head_dim": 258}, "head_dim 258: need an even number from 2 to 256"),
    ],
)
def test_an_unsupported_layout_is_refused(changed: dict[str, int], message: str) -> None:
    fitting = {"kv_format": BF16, "block_size": 16, "kv_heads": 2, "head_dim": 64}
    with pytest.raises(ValueError, match=message):
        KvLayout(**{**fitting, **changed})


def test_heads_that_do_not_share_evenly_are_refused() -> None:
    check_heads(14, 2)
    with pytest.raises(ValueError, match="7 heads: need a multiple of kv_heads 2"):
        check_heads(7, 2)


@pytest.mark.parametrize("rotary_dim", [-2, 7, 66])
def test_an_impossible_number_of_rotary_dimensions_is_refused(rotary_dim: int) -> None:
    check_rotary(64, 64)
    with pytest.raises(ValueError, match=f"rotary_dim {rotary_dim}"):
        check_rotary(rotary_dim, 64)
