"""Tests the fast ops against the reference, with ragged batches and caches full of NaN."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.backends.torch import ops as torch_ops
from engine.backends.torch.attention import GatheredAttention
from engine.backends.torch.ops import torch_build
from engine.model import reference
from engine.model.inputs import AttentionInputs
from engine.model.ops import PagedAttention, TorchOps
from engine.model.reference import TORCH_OPS

CPU = torch.device("cpu")
FAST = {
    "float32": torch_build(CPU, torch.float32).weight_ops,
    "bfloat16": torch_build(CPU, torch.bfloat16).weight_ops,
}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ==== Linear, norm, rotary, activation ====


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FAST)
def test_a_packed_linear_layer_multiplies(name: str, bias: bool, num_tokens: int) -> None:
    dtype = getattr(torch, name)
    weight, x = normal(48, 80, dtype=dtype) / 9, normal(num_tokens, 80, dtype=dtype, seed=1)
    offset = normal(48, dtype=dtype, seed=2) if bias else None
    expected = reference.pack_linear(weight, offset)(x)
    close(FAST[name].pack_linear(weight, offset)(x), expected)
    close(torch_ops._pack_plain(weight, offset)(x), expected)


@pytest.mark.parametrize("name", FAST)
def test_a_row_of_a_packed_linear_layer_is_the_same_in_any_batch(name: str) -> None:
    """Within rounding: the library chooses kernels by machine and size."""
    dtype = getattr(torch, name)
    multiply = FAST[name].pack_linear(normal(96, 64, dtype=dtype), None)
    x = normal(40, 64, dtype=dtype, seed=1)
    whole = multiply(x)
    for num_tokens in (1, 2, 8, 17, 39):
        close(multiply(x[:num_tokens]), whole[:num_tokens])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_the_reference(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = normal(5, 3, 24, dtype=dtype), normal(24, dtype=weight_dtype, seed=1)
    found = torch_ops.rms_norm(x[:, 1:], weight, 1e-5)
    assert found.dtype == dtype
    close(found, reference.rms_norm(x[:, 1:], weight, 1e-5))


@pytest.mark.parametrize("rotary_dim", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_rotates_a_part_of_a_wider_tensor_in_place(
    dtype: torch.dtype, rotary_dim: int
) -> None:
    wide = normal(5, 6, 16, dtype=dtype)
    cos, sin = normal(5, rotary_dim, dtype=dtype), normal(5, rotary_dim, dtype=dtype, seed=1)
    found, expected = wide.clone(), wide.clone()
    torch_ops.apply_rotary(found[:, :4], cos, sin)
    reference.apply_rotary(expected[:, :4], cos, sin)
    assert not torch.equal(found[:, :4], wide[:, :4])
    assert torch.equal(found[:, 4:], wide[:, 4:])
    close(found, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_activations_match_the_reference(dtype: torch.dtype, activation: str) -> None:
    gate_up = normal(5, 2 * 12, dtype=dtype)
    found = torch_ops.GATED_ACTIVATIONS[activation](gate_up)
    close(found, reference.GATED_ACTIVATIONS[activation](gate_up))


def test_both_implementations_have_the_same_activations() -> None:
    assert torch_ops.GATED_ACTIVATIONS.keys() == reference.GATED_ACTIVATIONS.keys()


# ==== Paged attention ====


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests as (context_len, num_queries); those with one query come first."""

    requests: tuple[tuple[int, int], ...]
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    block_size: int = 4
    window: int | None = None
    soft_cap: float | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class World:
    """A batch in a cache whose unused slots are all NaN."""

    q: torch.Tensor
    kv_layer: torch.Tensor
    attention: AttentionInputs


def build(batch: Batch, poison: float = torch.nan) -> World:
    size = batch.block_size
    counts = [-(-context // size) for context, _ in batch.requests]
    num_blocks, width = sum(counts) + 3, max(counts) + 2
    # Block 0, which pads the tables, belongs to no request
    blocks = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(3))
    tables = torch.zeros(len(counts), width, dtype=torch.long)
    num_heads, start = batch.num_kv_heads * batch.group, 0
    kv_cache = torch.full(
        (num_blocks, 3, 2, size, batch.num_kv_heads, batch.head_dim), poison, dtype=batch.dtype
    )
    kv_layer, slots = kv_cache[:, 1], []
    for i, ((context, queries), count) in enumerate(zip(batch.requests, counts, strict=True)):
        tables[i, :count] = blocks[start : start + count]
        start += count
        positions = torch.arange(context)
        slots.append((tables[i, positions // size] * size + positions % size)[-queries:])
        shape = (context, batch.num_kv_heads, batch.head_dim)
        for part in (0, 1):
            content = normal(*shape, dtype=batch.dtype, seed=2 * i + part)
            kv_layer[tables[i, positions // size], part, positions % size] = content
    lengths = [queries for _, queries in batch.requests]
    attention = AttentionInputs(
        num_decodes=sum(length == 1 for length in lengths),
        cu_seqlens_q=[0, *itertools.accumulate(lengths)],
        context_lens=[context for context, _ in batch.requests],
        block_tables=tables,
        slot_mapping=torch.cat(slots),
    )
    q = normal(sum(lengths), num_heads, batch.head_dim, dtype=batch.dtype, seed=99)
    return World(q, kv_layer, attention)


def attend(op: PagedAttention, batch: Batch, world: World) -> torch.Tensor:
    return op(
        world.q,
        world.kv_layer,
        world.attention,
        scale=0.4,
        window=batch.window,
        soft_cap=batch.soft_cap,
    )


def check(batch: Batch) -> None:
    world = build(batch)
    expected = attend(reference.paged_attention, batch, world)
    assert expected.isfinite().all()
    close(attend(GatheredAttention(), batch, world), expected)


BATCHES = {
    "one decode": ((9, 1),),
    "one decode of one token": ((1, 1),),
    "equal decodes": ((9, 1),) * 3,
    "ragged decodes": ((1, 1), (40, 1), (17, 1), (3, 1), (90, 1), (41, 1)),
    "first chunks": ((5, 5), (2, 2), (23, 23)),
    "later chunks": ((25, 5), (17, 16), (9, 2)),
    "mixed": ((12, 1), (70, 1), (1, 1), (6, 6), (31, 8), (8, 4)),
    "full blocks": ((8, 1), (16, 1), (12, 4), (16, 16)),
}


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 16])
@pytest.mark.parametrize("name", BATCHES)
def test_attention_over_ragged_batches(
    name: str, window: int | None, soft_cap: float | None
) -> None:
    check(Batch(BATCHES[name], window=window, soft_cap=soft_cap))


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (1, 8), (4, 1), (2, 3)])
def test_attention_for_any_heads_and_block_size(
    num_kv_heads: int, group: int, block_size: int
) -> None:
    heads = {"num_kv_heads": num_kv_heads, "group": group}
    for window in (None, 6):
        check(Batch(BATCHES["mixed"], block_size=block_size, window=window, **heads))


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_bfloat16(window: int | None, soft_cap: float | None) -> None:
    batch = Batch(
        BATCHES["mixed"], window=window, soft_cap=soft_cap, head_dim=16, dtype=torch.bfloat16
    )
    check(batch)


@pytest.mark.parametrize("window", [None, 40, 700])
def test_attention_over_many_keys(window: int | None) -> None:
    """Use more keys than a fused kernel takes at once, so that whole tiles are masked."""
    check(Batch(((1300, 1), (700, 1), (1300, 3), (1100, 600)), block_size=16, window=window))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    decodes=st.lists(st.integers(1, 40), max_size=6),
    chunks=st.lists(st.tuples(st.integers(0, 30), st.integers(2, 12)), max_size=3),
    window=st.none() | st.integers(1, 20),
    block_size=st.integers(1, 9),
)
def test_attention_over_random_batches(
    decodes: list[int], chunks: list[tuple[int, int]], window: int | None, block_size: int
) -> None:
    requests = [(length, 1) for length in decodes]
    requests += [(before + length, length) for before, length in chunks]
    if requests:
        check(Batch(tuple(requests), window=window, block_size=block_size))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("window", [None, 5])
def test_other_requests_blocks_cannot_leak_into_a_row(window: int | None, poison: float) -> None:
    """Rows must be bitwise equal, with zeros or NaN in the rest of the cache."""
    batch = Batch(BATCHES["mixed"], window=window)
    clean, poisoned = build(batch, 0.0), build(batch, poison)
    victim = 1
    poisoned.kv_layer[poisoned.attention.block_tables[victim, :3]] = poison
    expected = attend(GatheredAttention(), batch, clean)
    found = attend(GatheredAttention(), batch, poisoned)
    others = [row for row in range(len(expected)) if row != victim]
    assert torch.equal(found[others], expected[others])


def test_a_row_depends_on_its_batch_mates_by_no_more_than_rounding() -> None:
    batch = Batch(BATCHES["mixed"])
    world = build(batch)
    whole = attend(GatheredAttention(), batch, world)
    for i, (context, queries) in enumerate(batch.requests):
        start, end = world.attention.cu_seqlens_q[i : i + 2]
        alone = AttentionInputs(
            num_decodes=int(queries == 1),
            cu_seqlens_q=[0, queries],
            context_lens=[context],
            block_tables=world.attention.block_tables[i : i + 1],
            slot_mapping=world.attention.slot_mapping[start:end],
        )
        found = attend(GatheredAttention(), batch, World(world.q[start:end], world.kv_layer, alone))
        torch.testing.assert_close(found, whole[start:end], rtol=0.0, atol=1e-6)


def test_a_remembered_plan_is_dropped_with_its_step() -> None:
    """Use one op object for layers of different windows, then for other batches."""
    op = GatheredAttention()
    for name in ("mixed", "ragged decodes", "mixed"):
        for window in (None, 5, None, 7):
            batch = Batch(BATCHES[name], window=window)
            world = build(batch)
            close(attend(op, batch, world), attend(reference.paged_attention, batch, world))


@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_attention_allocates_on_the_device_of_the_cache(soft_cap: float | None) -> None:
    """The meta device stands for any non-CPU device: mixing it with the CPU fails."""
    batch = Batch(BATCHES["mixed"], window=5, soft_cap=soft_cap)
    world = build(batch)
    tables, slots = world.attention.block_tables, world.attention.slot_mapping
    attention = replace(
        world.attention, block_tables=tables.to("meta"), slot_mapping=slots.to("meta")
    )
    kv_layer = torch.empty(9, 3, 2, 4, 2, 8, device="meta")[:, 1]
    away = World(world.q.to("meta"), kv_layer, attention)
    assert attend(GatheredAttention(), batch, away).device.type == "meta"


# ==== The KV cache ====


@pytest.mark.parametrize("ops", [torch_build(CPU, torch.float32).torch_ops, TORCH_OPS])
def test_stored_keys_and_values_are_where_the_slots_say(ops: TorchOps) -> None:
    kv_cache = torch.full((5, 3, 2, 4, 2, 8), torch.nan)
    k, v = normal(6, 4, 8)[:, 1:3], normal(6, 4, 8, seed=1)[:, 2:]
    slots = [7, 0, 19, 18, 4, 13]
    ops.store_kv(k, v, kv_cache[:, 1], torch.tensor(slots))
    for i, slot in enumerate(slots):
        stored = kv_cache[slot // 4, 1, :, slot % 4]
        assert torch.equal(stored, torch.stack([k[i], v[i]]))
    assert int(kv_cache.isfinite().sum()) == 2 * k.numel()
