"""Runs decode steps of one model on the device, without the scheduler.

The memory is full of random numbers. Batches are made by hand, one decode for each of B requests,
and each is launched before the tokens of the previous one have been read, as in the engine.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from engine.backends.cuda.adapter_copies import PackedAdapter, pack_adapter
from engine.backends.cuda.assembly import AdapterLimits, TritonRunner, make_triton_runner
from engine.backends.cuda.forward import StepLimits
from engine.backends.cuda.runner import DeviceRunner
from engine.backends.cuda.streams import CudaDevice, Device, HostDevice
from engine.backends.cuda.weight_ops import cuda_build
from engine.backends.runner import StepHandle
from engine.lora.weights import LoraWeights
from engine.model.decoder import Decoder
from engine.model.loader import weight_bytes
from engine.model.spec import kv_bytes_per_token
from engine.scheduler.batch import PENDING, AdapterLoad, ScheduledBatch, ScheduledRequest
from tests.bench.gpu_clock import wake
from tests.bench.gpu_model import digest_of, random_adapter, random_decoder
from tests.bench.gpu_setting import BLOCK_SIZE, Setting, decode_requests
from tests.engine.support.fp8 import dequantized_mm

RANK, PLAIN = 16, "plain"
WARM_STEPS = 3  # at the start of every run of steps, not counted
NOISE_BYTES = 2**30  # bytes written at a time
SLEEP_CYCLES = 40_000_000  # some 20 ms: far longer than the host needs for a launch

Launch = Callable[[ScheduledBatch], StepHandle]
Change = Callable[[LoraWeights, str, Decoder], LoraWeights]  # a plain adapter, to one of this kind


@dataclass(frozen=True, slots=True)
class Sizes:
    batches: tuple[int, ...]
    context: int
    max_model_len: int
    chunk: int
    arena_bytes: int
    steps: int  # in one run
    rounds: int


def sizes_of(setting: Setting) -> Sizes:
    return setting.pick(
        Sizes((1, 8, 32, 64, 128, 256), 1024, 9216, 2048, 90 * 2**30, 24, 7),
        Sizes((1, 32), 128, 2304, 2048, 4 * 2**30, 4, 1),
        Sizes((1, 3), 20, 64, 32, 2**25, 3, 1),
    )


class Bench:
    """Holds the model, the arena, and adapters of any rank in pinned host memory."""

    def __init__(
        self, setting: Setting, quantization: str, change: Change = lambda weights, *_: weights
    ) -> None:
        self.setting, self.sizes, self._change = setting, sizes_of(setting), change
        on_cpu = setting.device.type == "cpu"
        self.device: Device = HostDevice() if on_cpu else CudaDevice(setting.device)
        build = cuda_build(
            setting.device, setting.dtype, fp8_multiply=dequantized_mm if on_cpu else None
        )
        self.decoder: Decoder = random_decoder(setting.shape, build, quantization, seed=0)
        self.arena = torch.empty(self.sizes.arena_bytes, dtype=torch.uint8, device=setting.device)
        _fill_with_noise(self.arena, setting.dtype)
        self._adapters: dict[str, PackedAdapter] = {}
        wake(setting.device)

    def adapter(self, lora_rank: int, kind: str = PLAIN) -> PackedAdapter:
        """Return an adapter of this rank; all alike share these bytes, copied to each slot."""
        digest = digest_of(lora_rank, kind)
        if digest not in self._adapters:
            sites, device = self.decoder.lora_sites, self.setting.device
            weights = random_adapter(sites, lora_rank, self.setting.dtype, device)
            weights = replace(self._change(weights, kind, self.decoder), digest=digest)
            self._adapters[digest] = pack_adapter(weights, self.device)
        return self._adapters[digest]

    def lane(
        self, max_rows: int, *, max_slots: int | None = None, side_stream: bool = False
    ) -> "Lane":
        start = time.perf_counter()
        made = make_triton_runner(
            self.device,
            self.decoder,
            self.arena,
            StepLimits(max_rows, self.sizes.chunk, self.sizes.max_model_len, BLOCK_SIZE),
            AdapterLimits(max_slots or 2 * max_rows, 256),
            self._adapters.__getitem__,
            uses_graphs=True,
            lora_side_stream=side_stream,
        )
        return Lane(self, made, time.perf_counter() - start)

    def floor_bytes(self, batch: int, lora_bytes: int) -> dict[str, int]:
        """Return the bytes a step must read: stored weights, keys and values, distinct adapters."""
        spec, dtype = self.decoder.spec, self.setting.dtype
        embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size
        weights = weight_bytes(self.decoder, dtype) - embedding * dtype.itemsize
        context = self.sizes.context + WARM_STEPS + self.sizes.steps // 2
        kv = kv_bytes_per_token(spec, dtype) * context * batch
        return {"weights": weights, "kv": kv, "lora": lora_bytes}


def _fill_with_noise(arena: torch.Tensor, dtype: torch.dtype) -> None:
    """Fill with random numbers: keys and values of zeros would cost less than real ones."""
    whole = arena[: arena.numel() // 8 * 8].view(dtype)
    for piece in whole.split(NOISE_BYTES // dtype.itemsize):
        piece.normal_()


class Lane:
    """A runner over the bench's model and arena, with its own set of adapters."""

    def __init__(self, bench: Bench, made: TritonRunner, start_s: float) -> None:
        self.bench, self.made, self.start_s = bench, made, start_s
        self._loaded: dict[int, int] = {}  # slot -> bytes

    @property
    def runner(self) -> DeviceRunner:
        return self.made.runner

    def load(self, ranks: Sequence[int], kinds: Sequence[str] = ()) -> None:
        """Load adapters of these ranks to slots 1, 2, ..., from the arena's high end down."""
        end, loads = self.bench.arena.numel(), list[AdapterLoad]()
        named = zip(ranks, kinds or [PLAIN] * len(ranks), strict=True)
        for slot, (lora_rank, kind) in enumerate(named, 1):
            nbytes = self.bench.adapter(lora_rank, kind).nbytes
            end -= nbytes
            loads.append(AdapterLoad(slot, digest_of(lora_rank, kind), end, nbytes))
        evictions = tuple(self._loaded)
        self._loaded = {load.slot: load.nbytes for load in loads}
        batch = ScheduledBatch((), adapter_evictions=evictions, adapter_loads=tuple(loads))
        self.runner.launch(batch).result()
        self.bench.device.synchronize()
        self.runner.arrived()

    def adapter_bytes(self, slots: Sequence[int]) -> int:
        return sum(self._loaded[slot] for slot in set(slots) if slot)

    def steps(self, slots: Sequence[int], launch: Launch | None = None) -> "Steps":
        """Make decode steps from the usual context on; request i has the adapter in slots[i]."""
        sizes = self.bench.sizes
        longest = sizes.context + sizes.steps + 2 * WARM_STEPS + 16
        requests = decode_requests(len(slots), longest, slots=list(slots))
        requests = [r._replace(start=sizes.context) for r in requests]
        return Steps(launch or self.runner.launch, requests)

    def run(self, slots: Sequence[int], launch: Launch | None = None) -> "Pace":
        """Measure one run of steps, after some warm-up steps."""
        steps = self.steps(slots, launch)
        steps.go(WARM_STEPS)
        return steps.go(self.bench.sizes.steps)

    def device_s(self, slots: Sequence[int], count: int = 9) -> float:
        """Return the device's seconds of a step that is launched whole while the device sleeps.

        So the device never waits for the host. NaN if there is no device.
        """
        if self.bench.setting.device.type != "cuda":
            return float("nan")
        steps, times = self.steps(slots), list[float]()
        steps.go(WARM_STEPS)
        for _ in range(count):
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            start.record()
            handle = steps.launch_next()
            end.record()
            handle.result()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return median(times)


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds per step, of the host's launch, and between one result and the next."""

    step_s: float
    host_s: float
    gaps_s: list[float]


Case = tuple[Lane, Sequence[int]]


def paces(cases: Mapping[str, Case], rounds: int) -> dict[str, Pace]:
    """Measure every case once per round; return the medians over the rounds."""
    runs: dict[str, list[Pace]] = {name: [] for name in cases}
    gc.collect()
    for _ in range(rounds):
        for name, (lane, slots) in cases.items():
            runs[name].append(lane.run(slots))
    return {
        name: Pace(
            median(p.step_s for p in made),
            median(p.host_s for p in made),
            [gap for p in made for gap in p.gaps_s],
        )
        for name, made in runs.items()
    }


class Steps:
    """Launches decodes one step ahead of the results.

    The host's time excludes making a batch, which is done by the scheduler in the engine.
    """

    def __init__(self, launch: Launch, requests: list[ScheduledRequest]) -> None:
        self._launch, self._requests = launch, requests
        self._waiting: StepHandle | None = None

    def go(self, count: int) -> Pace:
        """Run `count` steps; each ends when the tokens of the previous one have been read.

        One step stays in flight, so the next call finds the device busy.
        """
        host_s: list[float] = []
        gaps_s: list[float] = []
        if self._waiting is None:
            self._waiting = self.launch_next()
        before = start = time.perf_counter()
        for _ in range(count):
            batch = ScheduledBatch(self._next())
            launched = time.perf_counter()
            handle = self._launch(batch)
            host_s.append(time.perf_counter() - launched)
            self._waiting.result()
            self._waiting = handle
            now = time.perf_counter()
            gaps_s.append(now - before)
            before = now
        return Pace((before - start) / count, median(host_s), gaps_s)

    def launch_next(self) -> StepHandle:
        return self._launch(ScheduledBatch(self._next()))

    def _next(self) -> tuple[ScheduledRequest, ...]:
        step = tuple(self._requests)
        self._requests = [r._replace(start=r.start + 1, token_ids=[PENDING]) for r in step]
        return step
