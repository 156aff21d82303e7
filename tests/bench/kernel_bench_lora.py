"""Measures what LoRA adds to a step of the native CPU kernels: all sites, decode and prefill.

    python -m tests.bench.kernel_bench_lora [--threads 2] [--isa avx512] [--model qwen2.5-0.5b]

A decode is compared with its floor: the bytes of its adapters divided by the bandwidth at which
the same threads read memory in the same run. Adapters are evicted from the caches before every
step, as the base weights of a step would do. A prefill is compared with its arithmetic. `best` adds
up each site's best time, which other load disturbs least; `median` is the median of whole steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backends.native import structs
from engine.backends.native.bank import NativeAdapterBank, NativeLoraBatch
from engine.backends.native.library import FUNCTIONS, Context
from engine.backends.native.panels import PanelWeights
from engine.lora.weights import SiteWeights
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Model:
    layers: int
    sites: dict[str, tuple[int, tuple[int, ...]]]  # name: in_features, out_features of each slice

    @property
    def keys(self) -> list[tuple[int, str]]:
        return [(layer, site) for layer in range(self.layers) for site in self.sites]


MODELS = {
    "qwen2.5-0.5b": Model(
        24,
        {
            "qkv": (896, (896, 128, 128)),
            "o": (896, (896,)),
            "gate_up": (896, (4864, 4864)),
            "down": (4864, (896,)),
        },
    ),
    "smollm2-135m": Model(
        30,
        {
            "qkv": (576, (576, 192, 192)),
            "o": (576, (576,)),
            "gate_up": (576, (1536, 1536)),
            "down": (1536, (576,)),
        },
    ),
}
DECODES = {  # rank of each row's adapter; rows of one name share one
    "1 row, r16": [("a", 16)],
    "8 rows, 1 adapter r16": [("a", 16)] * 8,
    "8 rows, 8 adapters r8-64": [(f"a{i}", 8 << i % 4) for i in range(8)],
    "8 rows, 8 adapters r16": [(f"b{i}", 16) for i in range(8)],
    "16 rows, 16 adapters r16": [(f"b{i}", 16) for i in range(16)],
}
PREFILLS = {"512 rows, r16": 16, "512 rows, r30": 30, "512 rows, r32": 32, "512 rows, r64": 64}


def make_weights(model: Model, rank: int) -> PanelWeights:
    sites: dict[tuple[int, str], SiteWeights] = {}
    for layer, name in model.keys:
        in_features, widths = model.sites[name]
        a = torch.full((rank * len(widths), in_features), 0.01, dtype=torch.bfloat16)
        expands: list[tuple[int, int, int, int, Tensor]] = []
        out0 = 0
        for i, width in enumerate(widths):
            shape = -(-width // 32), (rank + 1) // 2, 32, 2
            b = torch.full(shape, 0.01, dtype=torch.bfloat16)
            expands.append((i * rank, (i + 1) * rank, out0, out0 + width, b))
            out0 += width
        sites[layer, name] = SiteWeights(a, tuple(expands))
    return PanelWeights("bench", sites, sum(s.nbytes for s in sites.values()))


def request(slot: int, rows: int) -> ScheduledRequest:
    return ScheduledRequest("r", 0, [0] * rows, 0, (), slot, SamplingParams(), True)


class Step:
    """Calls shrink and expand at every site of the model, as a step does."""

    def __init__(self, context: Context, model: Model, lora: NativeLoraBatch, rows: int) -> None:
        self._lora = lora
        self._call = context.function("lora", structs.ReefLoraArgs)
        width = max(in_features for in_features, _ in model.sites.values())
        out = max(sum(widths) for _, widths in model.sites.values())
        self._x = torch.full((rows, width + 32), 0.01, dtype=torch.bfloat16)
        self._y = torch.full((rows, out + 32), 0.01, dtype=torch.bfloat16)
        stride = lora.struct.max_lora_rank + lora.struct.max_lora_rank % 2
        self._h = torch.empty(rows, stride, dtype=torch.bfloat16)
        self._args = [self._site(i, model, name) for i, (_, name) in enumerate(model.keys)]

    def _site(self, number: int, model: Model, name: str) -> structs.ReefLoraArgs:
        return structs.ReefLoraArgs(
            batch=structs.c.pointer(self._lora.struct),
            site=number,
            in_features=model.sites[name][0],
            x=self._x.data_ptr(),
            x_stride=self._x.stride(0),
            y=self._y.data_ptr(),
            y_stride=self._y.stride(0),
            h=self._h.data_ptr(),
            h_stride=self._h.stride(0),
        )

    def __call__(self) -> list[float]:
        """Run all sites; return the seconds of each."""
        taken: list[float] = []
        for args in self._args:
            start = time.perf_counter()
            self._call(args)
            taken.append(time.perf_counter() - start)
        return taken

    def call_alone(self) -> list[float]:
        """Make the same calls without work, to measure the cost of Python."""
        count, self._lora.struct.num_segments = self._lora.struct.num_segments, 0
        taken = self()
        self._lora.struct.num_segments = count
        return taken


class Reader:
    """Reads 128 MiB with all threads and thereby evicts everything else from the caches."""

    def __init__(self, context: Context) -> None:
        self._logits = torch.full((64, 2**19), 0.01)
        self._ids = torch.zeros(64, dtype=torch.int32)
        self._highest = torch.zeros(64)
        self._call = context.function("greedy", FUNCTIONS["greedy"])
        self._args = structs.ReefGreedyArgs(
            logits=self._logits.data_ptr(),
            logits_stride=2**19,
            token_ids=self._ids.data_ptr(),
            highest=self._highest.data_ptr(),
            rows=64,
            vocab=2**19,
        )

    def __call__(self) -> list[float]:
        start = time.perf_counter()
        self._call(self._args)
        return [time.perf_counter() - start]

    @property
    def nbytes(self) -> int:
        return self._logits.nbytes


@dataclass(frozen=True, slots=True)
class Taken:
    """Milliseconds per step."""

    best: float  # the sum of each part's best
    median: float


def measure(run: Callable[[], list[float]], before: Callable[[], object], times: int) -> Taken:
    steps: list[list[float]] = []
    for _ in range(times):
        before()
        steps.append(run())
    best = sum(min(part) for part in zip(*steps, strict=True))
    return Taken(best * 1e3, statistics.median(map(sum, steps)) * 1e3)


def bench_decodes(context: Context, model: Model) -> None:
    reader, nothing = Reader(context), lambda: None
    bandwidth = reader.nbytes / measure(reader, nothing, 30).best / 1e6
    print(f"pure read {bandwidth:.1f} GB/s; ms of a whole step, Python's calls taken off")
    print(f"{'decode':28} {'MB':>7} {'floor':>7} {'best':>7} {'median':>7} {'of floor':>8}")
    for name, rows in DECODES.items():
        slots = {key: i for i, key in enumerate(dict.fromkeys(rows), 1)}
        bank = NativeAdapterBank(model.keys)
        megabytes = 0.0
        for (_, rank), slot in slots.items():
            weights = make_weights(model, rank)
            bank.load(slot, weights)
            megabytes += weights.nbytes / 1e6
        lora = bank.batch(ScheduledBatch(tuple(request(slots[key], 1) for key in rows)))
        assert lora is not None
        step = Step(context, model, lora, len(rows))
        python = measure(step.call_alone, nothing, 20).best
        taken = measure(step, reader, 15)
        floor, best, median = megabytes / bandwidth, taken.best - python, taken.median - python
        print(
            f"{name:28} {megabytes:7.1f} {floor:7.3f} {best:7.3f} {median:7.3f} {best / floor:8.2f}"
        )


def bench_prefills(context: Context, model: Model) -> None:
    print(
        f"{'prefill':28} {'GFLOP':>7} {'best':>7} {'median':>7} {'GFLOP/s':>8} {'of base flop':>12}"
    )
    base = sum(i * sum(widths) for i, widths in model.sites.values()) * model.layers
    for name, rank in PREFILLS.items():
        weights = make_weights(model, rank)
        bank = NativeAdapterBank(model.keys)
        bank.load(1, weights)
        lora = bank.batch(ScheduledBatch((request(1, 512),)))
        assert lora is not None
        taken = measure(Step(context, model, lora, 512), lambda: None, 7)
        gflop = weights.nbytes * 512 / 1e9
        print(
            f"{name:28} {gflop:7.2f} {taken.best:7.2f} {taken.median:7.2f} "
            f"{gflop / taken.best * 1e3:8.1f} {weights.nbytes / 2 / base:12.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa")
    parser.add_argument("--model", choices=MODELS, action="append")
    options = parser.parse_args()
    context = Context(options.isa, options.threads)
    for name in options.model or MODELS:
        print(f"\n{name}, {context.isa}, {context.threads} threads")
        bench_decodes(context, MODELS[name])
        bench_prefills(context, MODELS[name])


if __name__ == "__main__":
    main()
