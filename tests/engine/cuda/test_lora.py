"""Tests shrink and expand against plain torch, row by row.

Tolerance: h and y are rounded to the dtype, so two roundings may be off by half a unit in the last
place each; errors are relative to the sum of the absolute products.
"""

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.bank import DeviceAdapterBank
from engine.lora.weights import LoraWeights
from tests.engine.cuda.adapters import (
    DEVICE,
    TRAFFIC,
    expected,
    launched,
    load_all,
    make_adapter,
    make_bank,
    make_sites,
    row_slots,
)

SITES = make_sites(1, qkv=(320, (96, 32, 32)), down=(1096, (160,)))
RANKS = {
    1: {"qkv": (8, 8, 8), "down": (16,)},
    2: {"qkv": (1, 0, 3), "down": (5,)},
    3: {"down": (32,)},
    4: {"qkv": (0, 17, 0)},
    5: {"qkv": (32, 32, 32)},
    6: {"down": (4,)},
}
SCALES = {4: {"qkv"}, 5: {"qkv", "down"}}  # of "down" without any factors
SHIFTS = {3: {"qkv"}, 4: {"qkv"}}


def make_adapters(dtype: torch.dtype) -> dict[int, LoraWeights]:
    return {
        slot: make_adapter(
            SITES, ranks, dtype, slot, scales=SCALES.get(slot, ()), shifts=SHIFTS.get(slot, ())
        )
        for slot, ranks in RANKS.items()
    }


def loaded_bank(adapters: dict[int, LoraWeights], **changes: int) -> DeviceAdapterBank:
    dtype = next(iter(adapters[1].sites.values())).a.dtype
    bank = make_bank(SITES, dtype, **changes)
    load_all(bank, adapters)
    return bank


def batch_of(name: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    site = next(s for s in SITES if s.site == name)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, site.in_features, generator=generator)
    y = torch.randn(rows, site.out_features, generator=generator)
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


def add(bank: DeviceAdapterBank, slots: list[int], name: str, x: Tensor, y: Tensor) -> Tensor:
    y = y.clone()
    launched(bank, slots).add(0, name, x, y)
    return y


def assert_adds(
    adapters: dict[int, LoraWeights], slots: list[int], name: str, x: Tensor, y: Tensor, got: Tensor
) -> None:
    wanted, size = expected(adapters, slots, (0, name), x, y)
    epsilon = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[y.dtype]
    assert ((got.float() - wanted).abs() <= epsilon * size).all()
    untouched = [i for i, slot in enumerate(slots) if not slot]
    assert torch.equal(got[untouched], y[untouched])
    changed = [i for i, s in enumerate(slots) if s and (0, name) in adapters[s].sites]
    assert all(not torch.equal(got[i], y[i]) for i in changed)


@pytest.mark.parametrize("name", ["qkv", "down"])
@pytest.mark.parametrize("kind", TRAFFIC)
def test_every_row_gets_its_own_adapter(kind: str, name: str) -> None:
    adapters = make_adapters(torch.float32)
    slots = row_slots(kind, len(RANKS), 21)
    x, y = batch_of(name, len(slots), torch.float32)
    got = add(loaded_bank(adapters), slots, name, x, y)
    assert_adds(adapters, slots, name, x, y, got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once_between_the_kernels_and_once_after(dtype: torch.dtype) -> None:
    adapters = make_adapters(dtype)
    slots = row_slots("uniform", len(RANKS), 12)
    for name in ("qkv", "down"):
        x, y = batch_of(name, len(slots), dtype)
        assert_adds(adapters, slots, name, x, y, add(loaded_bank(adapters), slots, name, x, y))


def test_prefill_and_decodes_in_one_batch() -> None:
    """Use more rows than decode tiles take: chunks of 150, 70 and 40 rows after single ones."""
    adapters = make_adapters(torch.float32)
    slots = [1, 0, 3, 5, 1, 2] + [1] * 150 + [0] * 70 + [5] * 40
    bank = loaded_bank(adapters, max_rows=512)
    for name in ("qkv", "down"):
        x, y = batch_of(name, len(slots), torch.float32)
        assert_adds(adapters, slots, name, x, y, add(bank, slots, name, x, y))


def test_the_largest_and_the_smallest_rank_share_a_batch() -> None:
    ranks = {1: {"qkv": (256, 1, 8)}, 2: {"qkv": (1, 0, 0)}, 3: {"qkv": (8, 256, 31)}}
    adapters = {s: make_adapter(SITES, r, torch.float32, seed=s) for s, r in ranks.items()}
    slots = [1, 2, 0, 3, 1]
    x, y = batch_of("qkv", len(slots), torch.float32)
    got = add(loaded_bank(adapters, max_lora_rank=256), slots, "qkv", x, y)
    assert_adds(adapters, slots, "qkv", x, y, got)


def test_x_and_y_may_be_columns_of_wider_tensors() -> None:
    adapters = make_adapters(torch.float32)
    slots = row_slots("zipf", len(RANKS), 9)
    x, y = batch_of("qkv", len(slots), torch.float32)
    wide_x = torch.randn(len(slots), 400, device=DEVICE)
    wide_y = torch.randn(len(slots), 200, device=DEVICE)
    around = wide_y.clone()
    wide_x[:, 48:368], wide_y[:, 16:176] = x, y
    bank = loaded_bank(adapters)
    launched(bank, slots).add(0, "qkv", wide_x[:, 48:368], wide_y[:, 16:176])
    assert torch.equal(wide_y[:, 16:176], add(bank, slots, "qkv", x, y))
    assert torch.equal(wide_y[:, :16], around[:, :16])
    assert torch.equal(wide_y[:, 176:], around[:, 176:])


@pytest.mark.parametrize("kind", TRAFFIC)
def test_a_rows_bits_do_not_depend_on_batch_mates(kind: str) -> None:
    """Vary batch mates, the splitting of shrink (by the device's size), and adapters' places."""
    adapters = make_adapters(torch.float16)
    slots = row_slots(kind, len(RANKS), 20, seed=1)
    row = next(i for i, slot in enumerate(slots) if slot)
    x, y = batch_of("down", len(slots), torch.float16)
    together = add(loaded_bank(adapters), slots, "down", x, y)
    alone = loaded_bank(dict(reversed(adapters.items())), num_processors=40)
    only = slice(row, row + 1)
    assert torch.equal(together[only], add(alone, slots[only], "down", x[only], y[only]))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_a_row_that_overflows_does_not_affect_others() -> None:
    adapters = make_adapters(torch.float32)
    slots = [1, 1, 2, 0, 5]
    x, y = batch_of("qkv", len(slots), torch.float32)
    bank = loaded_bank(adapters)
    calm = add(bank, slots, "qkv", x, y)
    x[1], x[2], x[3] = torch.inf, torch.nan, torch.nan
    got = add(bank, slots, "qkv", x, y)
    assert torch.equal(got[[0, 3, 4]], calm[[0, 3, 4]])
    assert not got[1].isfinite().any()
