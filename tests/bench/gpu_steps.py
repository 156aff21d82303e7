"""Whole steps of the GPU engine's runner, beside the bytes that a step must read.

The scheduler is left out: batches are made by hand, one decode for each of B requests, and the
next is launched before the last one's tokens have been read, as the engine does it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median, quantiles

import torch

from engine.kernels.device_ops import device_ops
from engine.kernels.fp8 import dequantized_mm
from engine.model.loader import weight_bytes
from engine.runner.adapter_copies import PackedAdapter, pack_adapter
from engine.runner.device import CudaDevice, Device, HostDevice
from engine.runner.device_forward import StepLimits
from engine.runner.kv_cache import kv_bytes_per_token
from engine.runner.model_runner import StepHandle
from engine.runner.triton_runner import AdapterLimits, TritonRunner, make_triton_runner
from engine.scheduler.batch import PENDING, AdapterLoad, ScheduledBatch, ScheduledRequest
from tests.bench.gpu_kernels import BLOCK_SIZE, Setting, decode_requests
from tests.bench.gpu_model import digest_of, random_adapter, random_decoder
from tests.bench.gpu_report import Goal, Row

RANK = 16
MIXED_RANKS = (8, 8, 16, 16, 32, 64, 128, 256)  # sum 528; uniform of the same sum: 66
UNIFORM_RANK = 66
STEPS = 40


@dataclass(frozen=True, slots=True)
class Sizes:
    batches: tuple[int, ...]
    context: int
    max_model_len: int
    chunk: int
    arena_bytes: int
    steps: int


def sizes_of(setting: Setting) -> Sizes:
    if setting.tiny:
        return Sizes((1, 3), 20, 64, 32, 2**25, 4)
    return Sizes((1, 8, 32, 64, 128, 256), 1024, 9216, 2048, 90 * 2**30, STEPS)


class Bench:
    """One model on the device, with its runner and adapters of any rank in host memory."""

    def __init__(self, setting: Setting, quantization: str) -> None:
        self.setting, self.sizes = setting, sizes_of(setting)
        on_cpu = setting.device.type == "cpu"
        self.device: Device = HostDevice() if on_cpu else CudaDevice(setting.device)
        self.decoder = random_decoder(
            setting.shape,
            device_ops(
                setting.device, setting.dtype, fp8_multiply=dequantized_mm if on_cpu else None
            ),
            setting.dtype,
            setting.device,
            quantization,
            seed=0,
        )
        self._adapters: dict[int, PackedAdapter] = {}
        self.arena = torch.zeros(self.sizes.arena_bytes, dtype=torch.uint8, device=setting.device)
        start = time.perf_counter()
        self.made: TritonRunner = make_triton_runner(
            self.device,
            self.decoder,
            self.arena,
            StepLimits(
                max(self.sizes.batches), self.sizes.chunk, self.sizes.max_model_len, BLOCK_SIZE
            ),
            AdapterLimits(max(self.sizes.batches), 256),
            lambda digest: self.adapter(int(digest.rpartition("-")[2])),
            uses_graphs=True,
        )
        self.start_s = time.perf_counter() - start
        self._loaded: dict[int, int] = {}  # slot -> rank

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.decoder, self.setting.dtype)

    def adapter(self, lora_rank: int) -> PackedAdapter:
        """The same bytes stand for every adapter of a rank: each is copied to its own place."""
        if lora_rank not in self._adapters:
            weights = random_adapter(self.decoder.lora_sites, lora_rank, self.setting.dtype)
            self._adapters[lora_rank] = pack_adapter(weights, self.device)
        return self._adapters[lora_rank]

    def load(self, ranks: Sequence[int]) -> None:
        """Slots 1, 2, ... of these ranks, from the arena's high end."""
        end, loads = self.arena.numel(), []
        for slot, lora_rank in enumerate(ranks, 1):
            nbytes = self.adapter(lora_rank).nbytes
            end -= nbytes
            loads.append(AdapterLoad(slot, digest_of(lora_rank), end, nbytes))
        evictions = tuple(self._loaded)
        self._loaded = {load.slot: load.nbytes for load in loads}
        batch = ScheduledBatch((), adapter_evictions=evictions, adapter_loads=tuple(loads))
        self.made.runner.launch(batch).result()
        self.device.synchronize()
        self.made.runner.arrived()

    def adapter_bytes(self, slots: Sequence[int]) -> int:
        return sum(self._loaded[slot] for slot in set(slots) if slot)

    def decode_s(self, slots: list[int]) -> "Pace":
        """The pace of steps in which request i decodes with the adapter in slots[i]."""
        sizes, batch = self.sizes, len(slots)
        requests = decode_requests(batch, sizes.context + sizes.steps + 8, slots=slots)
        requests = [r._replace(start=sizes.context) for r in requests]
        run = _Steps(self.made.runner.launch, requests)
        run.go(3)
        return run.go(sizes.steps)

    def floor_bytes(self, batch: int, slots: Sequence[int]) -> int:
        """Weights as stored, the distinct adapters and the keys and values of a step."""
        spec = self.decoder.spec
        embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
        weights = self.weight_bytes - embedding * self.setting.dtype.itemsize
        kv = kv_bytes_per_token(spec, self.setting.dtype) * self.sizes.context * batch
        return weights + kv + self.adapter_bytes(slots)


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a step, of the host's part in it, and between two results."""

    step_s: float
    host_s: float
    gaps_s: list[float]


class _Steps:
    """Decodes, one step launched ahead of the results."""

    def __init__(
        self, launch: Callable[[ScheduledBatch], StepHandle], requests: list[ScheduledRequest]
    ) -> None:
        self._launch, self._requests = launch, requests
        self._knows_tokens = True

    def go(self, count: int) -> Pace:
        host_s, ends = [], []
        waiting: StepHandle | None = None
        start = time.perf_counter()
        for _ in range(count):
            before = time.perf_counter()
            handle = self._launch(ScheduledBatch(self._next()))
            host_s.append(time.perf_counter() - before)
            if waiting is not None:
                waiting.result()
                ends.append(time.perf_counter())
            waiting = handle
        assert waiting is not None
        waiting.result()
        gaps = [b - a for a, b in pairwise(ends)]
        return Pace((time.perf_counter() - start) / count, median(host_s), gaps)

    def _next(self) -> tuple[ScheduledRequest, ...]:
        step = tuple(self._requests)
        self._requests = [r._replace(start=r.start + 1, token_ids=[PENDING]) for r in step]
        return step


# ==== decode ====


def decode(setting: Setting, quantization: str) -> Iterator[Row]:
    bench = Bench(setting, quantization)
    yield from _start(bench, quantization)
    bench.load([RANK] * max(bench.sizes.batches))
    for batch in bench.sizes.batches:
        yield from _decode_rows(bench, quantization, batch)
    yield from _mixed_ranks(bench, quantization)
    if quantization == "none":
        yield from _prefill(bench)
        yield from _loading(bench)


def _start(bench: Bench, quantization: str) -> Iterator[Row]:
    figures = bench.made.graphs
    yield Row(
        f"{quantization}: start, {figures.num_graphs} graphs",
        bench.start_s,
        "s",
        Goal(bench.start_s, "a second", at_most=None if bench.setting.tiny else 60.0),
        note=f"capture {figures.capture_s:.1f} s, {figures.nbytes / 2**20:.0f} MiB",
    )


def _decode_rows(bench: Bench, quantization: str, batch: int) -> Iterator[Row]:
    bounds = {("none", 1): 0.70, ("none", 32): 0.60, ("none", 128): 0.65, ("nf4", 1): 0.50}
    of_base = {("none", "shared"): 0.90, ("none", "distinct"): 0.80, ("nf4", "distinct"): 0.70}
    roofline = bench.setting.roofline
    base = bench.decode_s([0] * batch)
    for traffic, slots in {
        "base": [0] * batch,
        "shared": [1] * batch,
        "distinct": list(range(1, batch + 1)),
    }.items():
        pace = base if traffic == "base" else bench.decode_s(slots)
        floor_s = bench.floor_bytes(batch, slots) / roofline.bytes_per_s
        bound = bounds.get((quantization, batch)) if traffic == "distinct" else None
        name = f"{quantization}: decode x{batch}, {traffic}"
        yield Row(
            name,
            pace.step_s * 1e3,
            "ms",
            Goal(floor_s / pace.step_s, "the roofline", at_least=bound),
            note=f"{batch / pace.step_s:.0f} tokens/s, host {pace.host_s * 1e3:.2f} ms",
        )
        if traffic == "base":
            continue
        least = of_base.get((quantization, traffic)) if batch == 32 else None
        yield Row(
            f"{name}, of base",
            base.step_s / pace.step_s * 100,
            "%",
            Goal(base.step_s / pace.step_s, "base tokens/s", at_least=least),
        )
        increment_s = pace.step_s - base.step_s
        allowed_s = 1.5 * bench.adapter_bytes(slots) / roofline.bytes_per_s + 0.65e-3
        yield Row(
            f"{name}, increment",
            increment_s * 1e3,
            "ms",
            Goal(increment_s / allowed_s, "1.5 x its bytes + 0.65 ms", at_most=1.0),
        )
    if batch == 256:
        share = base.host_s / base.step_s
        goal = Goal(share, "the step (hidden behind the device)", at_most=1.0)
        yield Row(f"{quantization}: host x{batch}", base.host_s * 1e3, "ms", goal)


def _mixed_ranks(bench: Bench, quantization: str) -> Iterator[Row]:
    batch = max(b for b in bench.sizes.batches if b <= 32)
    paces = {}
    for name, ranks in {"mixed": MIXED_RANKS, "uniform": (UNIFORM_RANK,)}.items():
        bench.load([ranks[i % len(ranks)] for i in range(batch)])
        paces[name] = bench.decode_s(list(range(1, batch + 1)))
    ratio = paces["mixed"].step_s / paces["uniform"].step_s
    yield Row(
        f"{quantization}: decode x{batch}, ranks 8 to 256",
        paces["mixed"].step_s * 1e3,
        "ms",
        Goal(ratio, "uniform ranks of the same sum", at_most=1.10),
    )
    bench.load([RANK] * max(bench.sizes.batches))


# ==== prefill, and adapters that arrive meanwhile ====


def _prefill(bench: Bench) -> Iterator[Row]:
    sizes = bench.sizes
    length = sizes.max_model_len // 2 if bench.setting.tiny else 8192
    seconds = {}
    for traffic, slot in {"base": 0, "adapter": 1}.items():
        whole = decode_requests(1, length, length, [slot])[0]
        chunks = [
            replace_chunk(whole, start, min(sizes.chunk, length - start))
            for start in range(0, length, sizes.chunk)
        ]

        def work(chunks: list[ScheduledRequest] = chunks) -> None:
            handles = [bench.made.runner.launch(ScheduledBatch((chunk,))) for chunk in chunks]
            handles[-1].result()

        work()
        times = []
        for _ in range(1 if bench.setting.tiny else 5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        seconds[traffic] = median(times)
    share = seconds["base"] / seconds["adapter"]
    yield Row(
        f"prefill {length} with an adapter",
        seconds["adapter"] * 1e3,
        "ms",
        Goal(share, "base", at_least=0.95),
        note=f"base {seconds['base'] * 1e3:.1f} ms",
    )


def replace_chunk(whole: ScheduledRequest, start: int, count: int) -> ScheduledRequest:
    return whole._replace(
        token_ids=whole.token_ids[:count],
        start=start,
        samples=start + count == len(whole.token_ids),
    )


def _loading(bench: Bench) -> Iterator[Row]:
    """Decodes while adapters are copied to the device one after another."""
    batch = max(b for b in bench.sizes.batches if b <= 64)
    quiet = bench.decode_s([0] * batch)
    runner, packed = bench.made.runner, bench.adapter(RANK)
    slot, offset = 1, bench.arena.numel() - packed.nbytes
    copied = 0
    launch = runner.launch

    def launch_with_load(step: ScheduledBatch) -> StepHandle:
        nonlocal copied
        arrived = len(runner.arrived())
        if copied == 0 or arrived:
            copied += packed.nbytes
            load = AdapterLoad(slot, digest_of(RANK), offset, packed.nbytes)
            step = replace(step, adapter_evictions=(slot,), adapter_loads=(load,))
        return launch(step)

    requests = decode_requests(batch, bench.sizes.context + 4 * bench.sizes.steps + 8)
    requests = [r._replace(start=bench.sizes.context) for r in requests]
    run = _Steps(launch_with_load, requests)
    start = time.perf_counter()
    busy = run.go(2 * bench.sizes.steps)
    bytes_per_s = copied / (time.perf_counter() - start)
    yield Row(
        f"decode x{batch} while adapters load",
        _p99(busy.gaps_s) * 1e3,
        "ms",
        Goal(_p99(busy.gaps_s) / _p99(quiet.gaps_s), "its p99 in quiet", at_most=1.05),
        note=f"{bytes_per_s / 1e9:.1f} GB/s of adapters",
    )


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100)[-1] if len(values) > 1 else values[0]
