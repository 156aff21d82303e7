"""Tests that a CPU's arena gives back the memory that adapters' extents stand for."""

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.kv_cache import load_on_host, move_on_host
from engine.backends.native import structs
from engine.backends.native.kv import KvLayout
from engine.scheduler.batch import AdapterLoad, AdapterMove, BlockCopy

PAGE = mmap.PAGESIZE
MIB = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def torch_cache(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes // 1024, 1, 1024, dtype=torch.uint8)


def native_cache(nbytes: int) -> torch.Tensor:
    layout = KvLayout(structs.KV_BF16, 16, 2, 64)
    return layout.allocate(nbytes // layout.block_bytes)


@pytest.mark.parametrize("make", [torch_cache, native_cache])
def test_what_an_adapter_stands_for_is_given_back(make: object) -> None:
    cache = make(128 * MIB)  # type: ignore[operator]
    cache.fill_(7)
    before = resident_bytes()
    load_on_host(cache, AdapterLoad(1, "a", 64 * MIB, 48 * MIB))
    assert before - resident_bytes() > 40 * MIB
    move_on_host(cache, [AdapterMove(1, 80 * MIB, 48 * MIB)])
    assert before - resident_bytes() > 56 * MIB
    flat = cache.view(-1)
    outside, inside = flat[: 64 * MIB], flat[64 * MIB + PAGE : 128 * MIB - PAGE]
    assert (outside.unique().tolist(), inside.unique().tolist()) == ([7], [0])
    cache.fill_(9)
    assert cache.unique().tolist() == [9]


@given(st.integers(0, 40), st.integers(0, 9 * PAGE), st.integers(0, 9 * PAGE))
def test_nothing_beside_the_extent_is_lost(shift: int, offset: int, nbytes: int) -> None:
    whole = torch.full((8 * PAGE + 64,), 7, dtype=torch.uint8)
    cache = whole[shift : shift + 8 * PAGE].view(8, 1, PAGE)
    load_on_host(cache, AdapterLoad(1, "a", offset, nbytes))
    changed = (whole != 7).nonzero().view(-1).tolist()
    assert all(shift + offset <= at < shift + offset + nbytes for at in changed)
    assert all(at < shift + 8 * PAGE for at in changed)


def test_moves_happen_one_after_the_other() -> None:
    """A block comes to lie where an adapter lay, behind the adapter's own move."""
    cache = torch.full((8, 1, PAGE), 7, dtype=torch.uint8)
    cache[1] = 5
    move_on_host(cache, [BlockCopy(1, 2), AdapterMove(1, 4 * PAGE, 2 * PAGE), BlockCopy(2, 4)])
    assert cache[2].unique().tolist() == [5] and cache[4].unique().tolist() == [5]
