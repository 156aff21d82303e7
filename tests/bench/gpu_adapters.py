"""Measures the GPU engine's multi-LoRA kernels against their bytes, and against vLLM's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from engine.backends.cuda.bank import DeviceAdapterBank, TritonLora
from engine.backends.cuda.extent import extent_nbytes, pack_extent
from engine.backends.cuda.places import ModelPlaces
from engine.lora.weights import LoraWeights
from engine.model.layers import LoraSite, LoraSlice
from tests.bench.gpu_clock import Work, graphs_s
from tests.bench.gpu_model import random_adapter
from tests.bench.gpu_report import Goal, Row, attempt, missing
from tests.bench.gpu_setting import Setting
from tests.bench.gpu_vllm_lora import Unavailable, VllmLora, load_kernels
from tests.bench.models import Shape

MIXED_RANKS = (8, 8, 16, 32, 32, 64, 96, 256)  # sum 512; uniform ranks of the same sum: 64
EQUAL_RANKS = (16,)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Rows and their adapters: one for all rows or one for each, with these ranks in turn."""

    rows: int
    ranks: tuple[int, ...]
    is_shared: bool

    @property
    def num_adapters(self) -> int:
        return 1 if self.is_shared else self.rows

    def rank_of(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]

    def __str__(self) -> str:
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else "ranks 8 to 256"
        return f"x{self.rows}, {ranks}, {'shared' if self.is_shared else 'distinct'}"


def adapters(setting: Setting) -> Iterator[Row]:
    """Measure shrink and expand at every site of some layers."""
    for traffic in _traffics(setting, setting.pick((1, 8, 32, 128, 256), (8,), (2,))):
        if setting.budget.is_spent:
            return
        yield from attempt(f"adapters {traffic}", _own_rows(setting, traffic))


def beside_vllm(setting: Setting) -> Iterator[Row]:
    """Measure the same products by vLLM's Triton kernels, in turns with Reef's."""
    try:
        load_kernels()
    except Unavailable as error:
        yield missing("vLLM's LoRA kernels", str(error), "6")
        return
    traffics = list(_traffics(setting, setting.pick((32, 8, 1, 64), (8,), (2,))))
    for traffic in traffics[: 1 if setting.tiny else None]:  # vLLM's take minutes there
        if setting.budget.is_spent:
            return
        name = f"LoRA beside vLLM {traffic}"
        yield from attempt(name, _vllm_rows(setting, name, traffic), "6")


def _traffics(setting: Setting, sizes: Sequence[int]) -> Iterator[Traffic]:
    mixed = (8, 16) if setting.tiny else MIXED_RANKS
    for rows in sizes:
        yield Traffic(rows, EQUAL_RANKS, is_shared=False)
        if rows > 1:
            yield Traffic(rows, EQUAL_RANKS, is_shared=True)
            yield Traffic(rows, mixed, is_shared=False)


def _own_rows(setting: Setting, traffic: Traffic) -> Iterator[Row]:
    made = OurLora(setting, traffic, setting.dtype)
    seconds = graphs_s({"ours": made.works}, setting.device, rounds=setting.rounds, least=2)["ours"]
    floor_s = made.bytes_of_one / setting.roofline.bytes_per_s
    yield Row(
        f"adapters {traffic}",
        seconds / len(made.sites) * 1e6,
        "us per site",
        Goal(seconds / floor_s, "the time of their bytes"),
    )


def _vllm_rows(setting: Setting, name: str, traffic: Traffic) -> Iterator[Row]:
    dtype = torch.float16 if setting.tiny else setting.dtype  # vLLM's do not support float32
    ours = OurLora(setting, traffic, dtype)
    theirs = VllmLora(ours.sites, ours.weights, ours.slots_of_copies, dtype, setting.device)
    _check_same(ours, theirs)
    works = {"ours": ours.works, "vLLM": theirs.works(ours.xs, ours.ys)}
    times = graphs_s(works, setting.device, rounds=setting.rounds, least=2)
    ratio = times["vLLM"] / times["ours"]
    yield Row(
        name,
        times["ours"] / len(ours.sites) * 1e6,
        "us per site",
        Goal(
            ratio,
            "our speed, of vLLM's",
            at_least=1.0 if len(traffic.ranks) == 1 else 1.5,
            target="6",
        ),
        note=f"vLLM's {times['vLLM'] / len(ours.sites) * 1e6:.1f} us per site, its own defaults",
    )


def _check_same(ours: "OurLora", theirs: VllmLora) -> None:
    """Raise RuntimeError unless both give the same results, added to zeros."""
    results: list[dict[int, torch.Tensor]] = []
    for work in (ours.works[0], theirs.works(ours.xs, ours.ys)[0]):
        for y in ours.ys.values():
            y.zero_()
        work()
        results.append({size: y.float() for size, y in ours.ys.items()})
    for size, mine in results[0].items():
        off = float((mine - results[1][size]).norm() / mine.norm())
        if not off < 2e-2:
            raise RuntimeError(f"outputs of {size}: ours and vLLM's differ by {off:.3g}")


class OurLora:
    """Reef's kernels, with enough copies of the adapters that none stays in a cache."""

    def __init__(self, setting: Setting, traffic: Traffic, dtype: torch.dtype) -> None:
        num_layers = setting.pick(8, 1, 1)
        self.sites = [s for layer in range(num_layers) for s in sites_of(setting.shape, layer)]
        used = sorted({traffic.rank_of(i) for i in range(traffic.num_adapters)})
        by_rank = {r: random_adapter(self.sites, r, dtype, setting.device) for r in used}
        once = [by_rank[traffic.rank_of(i)] for i in range(traffic.num_adapters)]
        self.bytes_of_one = sum(extent_nbytes(w) for w in once)
        copies = setting.copies(self.bytes_of_one)
        self.weights: list[LoraWeights] = once * copies  # in slots 1, 2, ...
        self.slots_of_copies = [self._slots(traffic, i) for i in range(copies)]
        self.xs = {
            s.in_features: _noise(setting, dtype, traffic.rows, s.in_features) for s in self.sites
        }
        self.ys = {
            s.out_features: _noise(setting, dtype, traffic.rows, s.out_features) for s in self.sites
        }
        self._bank = self._filled_bank(setting, dtype, traffic.rows)
        self.works: list[Work] = [self._work(slots) for slots in self.slots_of_copies]

    def _slots(self, traffic: Traffic, copy: int) -> list[int]:
        first = 1 + copy * traffic.num_adapters
        return [first + (0 if traffic.is_shared else row) for row in range(traffic.rows)]

    def _filled_bank(self, setting: Setting, dtype: torch.dtype, rows: int) -> DeviceAdapterBank:
        sizes = [extent_nbytes(w) for w in self.weights]
        arena = torch.zeros(sum(sizes), dtype=torch.uint8, device=setting.device)
        bank = DeviceAdapterBank(
            arena,
            ModelPlaces(self.sites),
            dtype,
            max_slots=len(sizes),
            max_rows=rows,
            max_adapters=rows,
            max_lora_rank=256,
            num_processors=setting.num_sms,
        )
        offset = 0
        for slot, (weights, nbytes) in enumerate(zip(self.weights, sizes, strict=True), 1):
            extent = pack_extent(weights, arena[offset : offset + nbytes])
            bank.place(slot, offset, extent)
            offset += nbytes
        return bank

    def _work(self, slots: list[int]) -> Work:
        """Make a call whose plan's words stay on the device, in separate memory."""
        plan = self._bank.plan(slots)
        words = torch.from_numpy(plan.copy()).to(self._bank.arena.device)
        return partial(self._add, self._bank.batch(len(slots), words))

    def _add(self, lora: TritonLora) -> None:
        for s in self.sites:
            lora.add(s.layer, s.site, self.xs[s.in_features], self.ys[s.out_features])


def sites_of(shape: Shape, layer: int) -> list[LoraSite]:
    hidden, inter = shape.hidden_size, shape.intermediate_size
    kv = shape.num_kv_heads * shape.head_dim
    sites = {
        "qkv": (hidden, (hidden, kv, kv)),
        "o": (hidden, (hidden,)),
        "gate_up": (hidden, (inter, inter)),
        "down": (inter, (hidden,)),
    }
    return [
        LoraSite(layer, name, width, tuple(LoraSlice(f"{name}{i}", n) for i, n in enumerate(outs)))
        for name, (width, outs) in sites.items()
    ]


def _noise(setting: Setting, dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.randn(size, device=setting.device).to(dtype)
