"""Tests the pass of head norms, rotary positions and KV store against the reference ops."""

from dataclasses import dataclass, field

import pytest
import torch

from engine.backends.cuda.triton.rotary import rotate_and_store
from engine.model import reference
from engine.model.rotary import Rotary, RotaryTable, Unscaled

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLACK = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
BLOCKS, LAYERS, BLOCK_SIZE = 5, 3, 4
MAX_LEN = 50


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@dataclass
class Case:
    """Six rows, the fourth of them padding, in the middle layer of a cache full of NaN."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    rotary_dim: int = 16
    is_normed: bool = False
    dtype: torch.dtype = torch.float32
    slots: list[int] = field(default_factory=lambda: [0, 3, 18, -1, 9, 4])
    positions: list[int] = field(default_factory=lambda: [0, 1, 49, 0, 33, 7])

    def __post_init__(self) -> None:
        width = (self.heads + 2 * self.kv_heads) * self.dim
        self.qkv = normal(len(self.slots), width).to(self.dtype)
        shape = (BLOCKS, LAYERS, 2, BLOCK_SIZE, self.kv_heads, self.dim)
        self.kv_cache = torch.full(shape, torch.nan, dtype=self.dtype, device=DEVICE)
        rotary = Rotary(self.rotary_dim, 1e4, Unscaled())
        self.table = RotaryTable(rotary, MAX_LEN, torch.float32, DEVICE)
        self.norms = [normal(self.dim, seed=seed) for seed in (1, 2)] if self.is_normed else None

    def run(self, index_dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
        qkv, kv_cache = self.qkv.clone(), self.kv_cache.clone()
        q_norm, k_norm = self.norms or (None, None)
        rotate_and_store(
            qkv,
            self.table.cos,
            self.table.sin,
            torch.tensor(self.positions, dtype=index_dtype, device=DEVICE),
            torch.tensor(self.slots, dtype=index_dtype, device=DEVICE),
            kv_cache[:, 1],
            q_norm=q_norm,
            k_norm=k_norm,
            eps=EPS,
        )
        return qkv, kv_cache

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the result by three reference ops; keys and values in qkv stay unchanged."""
        heads = self.qkv.clone().view(len(self.slots), -1, self.dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        k = k.clone()
        if self.norms is not None:
            q.copy_(reference.rms_norm(q, self.norms[0], EPS))
            k.copy_(reference.rms_norm(k, self.norms[1], EPS))
        cos, sin = self.table(torch.tensor(self.positions, device=DEVICE))
        for part in (q, k):
            reference.apply_rotary(part, cos, sin)
        kv_cache, slots = self.kv_cache.clone(), torch.tensor(self.slots, device=DEVICE)
        stored = slots >= 0
        reference.store_kv(k[stored], v[stored], kv_cache[:, 1], slots[stored])
        return heads.flatten(1), kv_cache


CASES = {
    "grouped heads": Case(),
    "a key head per query head": Case(heads=2, dim=64, rotary_dim=64),
    "more heads than a tile": Case(heads=9, kv_heads=3, dim=128, rotary_dim=128),
    "a head of no power of two": Case(dim=24, rotary_dim=24),
    "part of each head": Case(rotary_dim=12),
    "head norms": Case(dim=24, rotary_dim=24, is_normed=True),
    "head norms, part of each head": Case(rotary_dim=8, is_normed=True),
    "float16": Case(dtype=torch.float16, is_normed=True),
    "bfloat16": Case(dtype=torch.bfloat16, is_normed=True),
}


@pytest.mark.parametrize("name", CASES)
def test_queries_are_rotated_and_keys_and_values_stored(name: str) -> None:
    case = CASES[name]
    slack = SLACK[case.dtype]
    for found, expected in zip(case.run(), case.expected(), strict=True):
        torch.testing.assert_close(found, expected, rtol=slack, atol=slack, equal_nan=True)


def test_only_the_slots_of_the_layer_are_written() -> None:
    case = Case()
    _, kv_cache = case.run()
    written = kv_cache.isfinite()
    assert written.all((-1, -2)).sum() == 2 * 5  # five keys and their values
    assert not written[:, 0].any() and not written[:, 2].any()


def test_indices_may_be_int32_or_int64() -> None:
    case = Case()
    for found, expected in zip(case.run(torch.int32), case.run(), strict=True):
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_a_row_is_the_same_in_any_batch() -> None:
    whole = Case(is_normed=True)
    qkv, kv_cache = whole.run()
    for i in (0, 2, 5):
        alone = Case(is_normed=True, slots=[whole.slots[i]], positions=[whole.positions[i]])
        alone.qkv = whole.qkv[i : i + 1]
        found, found_cache = alone.run()
        assert torch.equal(found[0], qkv[i])
        block, offset = divmod(whole.slots[i], BLOCK_SIZE)
        assert torch.equal(found_cache[block, 1, :, offset], kv_cache[block, 1, :, offset])


def test_a_batch_of_padding_writes_nothing() -> None:
    for case in (Case(slots=[-1, -1], positions=[0, 0]), Case(slots=[], positions=[])):
        _, kv_cache = case.run()
        assert kv_cache.isnan().all()
