"""Tests the device's bank against the plain one, while adapters are loaded, moved and evicted."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.bank import DeviceAdapterBank
from engine.backends.cuda.extent import UNIT_BYTES, extent_nbytes, extent_of
from engine.backends.torch.bank import AdapterBank
from engine.backends.torch.ops import torch_build
from engine.lora.load import load_lora
from engine.lora.weights import LoraWeights
from engine.model.loader import load_decoder
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.engine.cuda.adapters import (
    DEVICE,
    TRAFFIC,
    launched,
    load,
    load_all,
    make_adapter,
    make_bank,
    make_sites,
    row_slots,
)
from tests.engine.support.driver import write_adapter
from tests.engine.support.tiny import write_tiny

SITES = make_sites(2, qkv=(64, (64, 16, 16)), o=(64, (64,)), gate_up=(64, (96, 96)))
RANKS = [
    {"qkv": (8, 8, 8), "o": (8,), "gate_up": (8, 8)},
    {"qkv": (16, 0, 16)},
    {"qkv": (0, 3, 0), "gate_up": (5, 0)},
    {"o": (32,), "gate_up": (1, 17)},
    {"gate_up": (0, 20)},
]
F32 = torch.float32


def make_adapters() -> dict[int, LoraWeights]:
    return {i + 1: make_adapter(SITES, ranks, F32, seed=i) for i, ranks in enumerate(RANKS)}


def plain_bank(adapters: dict[int, LoraWeights]) -> AdapterBank:
    bank = AdapterBank(DEVICE)
    for slot, weights in adapters.items():
        bank.load(slot, weights)
    return bank


def batch_of(slots: list[int], chunk: tuple[int, int] = (0, 0)) -> ScheduledBatch:
    """List the slots of rows: one decode per slot, then a prefill chunk of (slot, rows)."""
    rows = [(slot, 1) for slot in slots] + ([chunk] if chunk[1] else [])
    sampling = SamplingParams()
    return ScheduledBatch(
        tuple(ScheduledRequest("r", 0, [7] * n, 0, (), s, sampling, True) for s, n in rows)
    )


def slots_of(batch: ScheduledBatch) -> list[int]:
    return [r.adapter_slot for r in batch.requests for _ in r.token_ids]


def inputs_of(rows: int, seed: int = 0) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Make x and y for every site."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (s.layer, s.site): (
            torch.randn(rows, s.in_features, generator=generator).to(DEVICE),
            torch.randn(rows, s.out_features, generator=generator).to(DEVICE),
        )
        for s in SITES
    }


def assert_equal_to_the_plain_bank(
    bank: DeviceAdapterBank,
    adapters: dict[int, LoraWeights],
    batch: ScheduledBatch,
    layers: tuple[int, ...] = (0, 1),
) -> None:
    plain = plain_bank(adapters).batch(batch)
    slots = slots_of(batch)
    lora = launched(bank, slots)
    for (layer, site), (x, y) in inputs_of(len(slots)).items():
        if layer not in layers:
            continue
        got, wanted = y.clone(), y.clone()
        lora.add(layer, site, x, got)
        if plain is not None:
            plain.add(layer, site, x, wanted)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", TRAFFIC)
def test_the_bank_adds_what_torchs_bank_adds_at_every_site(kind: str) -> None:
    adapters = make_adapters()
    bank = make_bank(SITES, F32)
    load_all(bank, adapters)
    batch = batch_of(row_slots(kind, len(RANKS), 10), chunk=(2, 17))
    assert_equal_to_the_plain_bank(bank, adapters, batch)


def test_a_captured_launch_serves_any_later_plan() -> None:
    """Use one TritonLora, as a graph does: only the buffers that it reads change."""
    adapters = make_adapters()
    bank = make_bank(SITES, F32)
    words = torch.zeros(bank.max_words(16), dtype=torch.int32, device=DEVICE)
    lora = bank.batch(16, words)
    load(bank, 1, 0, adapters[1])
    for step, slots in enumerate(([1] * 16, [0, 1] * 8, [4, 1, 5] * 5, [0] * 16, [5])):
        if step == 2:
            load(bank, 4, 2**18, adapters[4])
            load(bank, 5, 2**19, adapters[5])
        if step == 4:
            bank.move(5, 2**20)
        values = bank.plan(slots)
        words[: values.size] = torch.from_numpy(values)
        plain = plain_bank(adapters).batch(batch_of(slots))
        x, y = inputs_of(16, seed=step)[1, "gate_up"]
        got, wanted = y.clone(), y[: len(slots)].clone()
        lora.add(1, "gate_up", x, got)
        if plain is not None:
            plain.add(1, "gate_up", x[: len(slots)], wanted)
        torch.testing.assert_close(got[: len(slots)], wanted, rtol=1e-5, atol=2e-5)
        assert torch.equal(got[len(slots) :], y[len(slots) :])


def test_ranks_may_differ_from_layer_to_layer() -> None:
    small, large = ({name: [r] * n for name, n in (("qkv", 3), ("o", 1))} for r in (3, 30))
    parts = [make_adapter(SITES, ranks, F32, seed=8).sites for ranks in (small, large)]
    weights = [
        {key: parts[(key[0] + first) % 2][key] for key in parts[0] if key != (first, "o")}
        for first in (0, 1)
    ]
    adapters = {slot: LoraWeights(f"d{slot}", sites, 0) for slot, sites in enumerate(weights, 1)}
    bank = make_bank(SITES, F32)
    load_all(bank, adapters)
    assert_equal_to_the_plain_bank(bank, adapters, batch_of([2, 1, 0, 2]))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_a_cuda_graph_replays_for_any_adapters() -> None:
    adapters = make_adapters()
    bank = make_bank(SITES, F32)
    bank.warm_up()
    words = torch.zeros(bank.max_words(16), dtype=torch.int32, device=DEVICE)
    lora, graph = bank.batch(16, words), torch.cuda.CUDAGraph()
    x, y = (torch.zeros_like(t) for t in inputs_of(16)[0, "qkv"])
    with torch.cuda.graph(graph):
        lora.add(0, "qkv", x, y)
    load_all(bank, adapters)
    for step, kind in enumerate(TRAFFIC):
        slots = row_slots(kind, len(RANKS), 16)
        plain = plain_bank(adapters).batch(batch_of(slots))
        values = inputs_of(16, seed=step)[0, "qkv"]
        x.copy_(values[0])
        y.copy_(values[1])
        plan = bank.plan(slots)
        words[: plan.size] = torch.from_numpy(plan)
        graph.replay()
        if plain is not None:
            plain.add(0, "qkv", *values)
        torch.testing.assert_close(y, values[1], rtol=1e-5, atol=2e-5)


def test_the_buffers_addresses_never_change() -> None:
    adapters = make_adapters()
    bank = make_bank(SITES, F32)

    def addresses() -> list[int]:
        memory = [bank.arena, bank._memory.arena, bank._memory.table, bank._planes]
        return [t.data_ptr() for t in memory]

    before = addresses()
    load_all(bank, adapters)
    launched(bank, [1, 2, 3])
    bank.move(1, 2**20)
    bank.evict(2)
    assert addresses() == before


def test_two_sites_may_be_computed_interleaved() -> None:
    adapters = make_adapters()
    bank = make_bank(SITES, F32)
    load_all(bank, adapters)
    slots = [1, 4, 0]
    lora, values = launched(bank, slots), inputs_of(3)
    (x0, y0), (x1, y1) = values[0, "o"], values[0, "gate_up"]
    apart, between = (y0.clone(), y1.clone()), (y0.clone(), y1.clone())
    lora.add(0, "o", x0, apart[0])
    lora.add(0, "gate_up", x1, apart[1])
    lora.shrink(0, "o", x0)
    lora.shrink(0, "gate_up", x1)
    lora.expand(0, "o", between[0])
    lora.expand(0, "gate_up", between[1])
    assert torch.equal(between[0], apart[0]) and torch.equal(between[1], apart[1])


def test_an_adapters_bits_do_not_depend_on_its_place_or_slot() -> None:
    adapters = make_adapters()
    bank = make_bank(SITES, F32)
    x, y = inputs_of(5)[1, "qkv"]

    def run(slot: int) -> Tensor:
        got = y.clone()
        launched(bank, [slot, 0, slot, slot, 0]).add(1, "qkv", x, got)
        return got

    load(bank, 1, 2**19, adapters[1])
    first = run(1)
    for offset in (2**19 + UNIT_BYTES, 2**19 - 7 * UNIT_BYTES, 0):  # by less than its size too
        bank.move(1, offset)
        assert torch.equal(run(1), first)
    bank.evict(1)
    load(bank, 7, 2**20, adapters[1])
    load(bank, 1, 0, adapters[2])  # another adapter in its place
    assert torch.equal(run(7), first)
    assert not torch.equal(run(1), first)


def test_random_loads_moves_and_evictions_damage_no_adapter() -> None:
    rng = random.Random(3)
    pool = list(make_adapters().values())
    size = -(-max(extent_nbytes(w) for w in pool) // UNIT_BYTES) * UNIT_BYTES
    bank = make_bank(SITES, F32, arena_bytes=12 * size, max_slots=5)
    held: dict[int, LoraWeights] = {}
    places: dict[int, int] = {}  # slot -> twelfth of the arena
    for step in range(40):
        slot = rng.randint(1, 5)
        free = rng.choice([i for i in range(12) if i not in places.values()])
        if slot not in held:
            held[slot], places[slot] = rng.choice(pool), free
            load(bank, slot, free * size, held[slot])
        elif rng.random() < 0.5:
            bank.move(slot, free * size)
            places[slot] = free
        else:
            bank.evict(slot)
            del held[slot], places[slot]
        if step % 10 == 9:
            slots = [rng.choice([0, *held]) for _ in range(6)]
            assert_equal_to_the_plain_bank(bank, held, batch_of(slots), layers=(1,))


def test_peft_adapters_of_a_whole_model(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "base", "qwen2")
    cpu = torch.device("cpu")
    decoder = load_decoder(tiny.folder, torch_build(cpu, F32), max_model_len=32)
    configs = [{"r": 3, "use_rslora": True}, {"r": 8, "target_modules": ["k_proj", "down_proj"]}]
    adapters = {
        slot: load_lora(
            write_adapter(tiny.folder, tmp_path / str(slot), slot, **config),
            decoder.lora_sites,
            F32,
        )
        for slot, config in enumerate(configs, 1)
    }
    bank = make_bank(decoder.lora_sites, F32)
    load_all(bank, adapters)
    batch = batch_of([1, 0, 2, 1, 2])
    lora, plain = launched(bank, slots_of(batch)), plain_bank(adapters).batch(batch)
    assert plain is not None
    for site in decoder.lora_sites:
        x = torch.randn(5, site.in_features, device=DEVICE)
        y = torch.randn(5, site.out_features, device=DEVICE)
        wanted = y.clone()
        lora.add(site.layer, site.site, x, y)
        plain.add(site.layer, site.site, x, wanted)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=2e-5)


def test_warming_up_adds_nothing_and_covers_every_capacity() -> None:
    bank = make_bank(SITES, F32, max_rows=300)
    load_all(bank, make_adapters())
    assert bank.row_capacities == (256, 512)
    bank.warm_up()
    assert_equal_to_the_plain_bank(bank, make_adapters(), batch_of([1, 2, 0]), layers=(0,))


def test_plans_stay_within_their_bound_and_the_buffer_holds_the_longest() -> None:
    bank = make_bank(SITES, F32, max_rows=600)
    load_all(bank, make_adapters())
    for rows in (1, 7, 256, 257, 600):
        slots = [i % 5 + 1 for i in range(rows)]
        assert bank.plan(slots).size <= bank.max_words(rows) <= bank.max_words(600)
    promised = [bank.max_words(rows) for rows in (200, 256, 257, 300, 512, 600)]
    assert promised == sorted(promised), "what holds a batch holds a smaller one"


# ==== refusals ====


def test_slots_out_of_range_empty_or_taken_are_refused() -> None:
    adapters = make_adapters()
    bank = make_bank(SITES, F32, max_slots=3)
    for slot in (0, 4, -1):
        with pytest.raises(ValueError, match=f"adapter slot {slot}; only 1 to 3 are allowed"):
            load(bank, slot, 0, adapters[1])
    load(bank, 2, 0, adapters[1])
    with pytest.raises(ValueError, match="adapter slot 2 holds an adapter"):
        load(bank, 2, 2**20, adapters[2])
    for use in (lambda: bank.plan([2, 1]), lambda: bank.move(1, 0)):
        with pytest.raises(ValueError, match="adapter slot 1 holds no adapter"):
            use()
    assert bank.plan([2]) is bank.plan([2])
    bank.evict(2)
    with pytest.raises(ValueError, match="adapter slot 2 holds no adapter"):
        bank.plan([2])


@pytest.mark.parametrize("offset", [-UNIT_BYTES, UNIT_BYTES // 2, 2**22])
def test_places_outside_the_arena_or_between_units_are_refused(offset: int) -> None:
    bank = make_bank(SITES, F32, arena_bytes=2**22)
    weights = make_adapters()[1]
    with pytest.raises(ValueError, match=f"at byte {offset}; only multiples of 256 from 0 to"):
        bank.place(1, offset, extent_of(weights))
    load(bank, 1, 0, weights)
    with pytest.raises(ValueError, match="only multiples of 256 from 0 to"):
        bank.move(1, offset)


def test_adapters_of_another_model_dtype_or_rank_are_refused() -> None:
    bank = make_bank(SITES, F32, max_lora_rank=16)
    with pytest.raises(ValueError, match=r"\(0, 'o'\) has lora_rank 32; at most 16 is allowed"):
        bank.place(1, 0, extent_of(make_adapter(SITES, {"o": (32,)}, F32)))
    with pytest.raises(ValueError, match=r"only torch.float32 is allowed"):
        bank.place(1, 0, extent_of(make_adapter(SITES, {"o": (8,)}, torch.float16)))
    other = make_adapter(make_sites(3, o=(64, (64,))), {"o": (8,)}, F32)
    with pytest.raises(ValueError, match=r"\(2, 'o'\) is no site of this model"):
        bank.place(1, 0, extent_of(other))
    wider = replace(other, sites=make_adapter(make_sites(1, o=(72, (64,))), {"o": (8,)}, F32).sites)
    with pytest.raises(ValueError, match="has 72 inputs, not 64"):
        bank.place(1, 0, extent_of(wider))
    with pytest.raises(
        ValueError, match=r"slices of \(64,\) outputs, and none of columns \(0, 80\)"
    ):
        longer = make_adapter(make_sites(1, o=(64, (80,))), {"o": (8,)}, F32)
        bank.place(1, 0, extent_of(longer))
    with pytest.raises(ValueError, match="has scales or shifts of 80 outputs, not 64"):
        shifted = make_adapter(make_sites(1, o=(64, (80,))), {}, F32, shifts={"o"})
        bank.place(1, 0, extent_of(shifted))


def test_batches_beyond_the_limits_are_refused() -> None:
    bank = make_bank(SITES, F32, max_rows=8)
    load_all(bank, make_adapters())
    with pytest.raises(ValueError, match="a batch of 9 rows; at most 8 are allowed"):
        bank.plan([0] * 9)
