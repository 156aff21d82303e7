"""Measures prompts with and without an adapter, and decodes while adapters are loaded."""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from statistics import median, quantiles

from engine.backends.runner import StepHandle
from engine.scheduler.batch import AdapterLoad, ScheduledBatch, ScheduledRequest
from tests.bench.gpu_clock import median_s
from tests.bench.gpu_report import Goal, Row, attempt
from tests.bench.gpu_runner import RANK, WARM_STEPS, Bench, Lane
from tests.bench.gpu_setting import Setting, decode_requests

ROUNDS = 24  # of decodes: enough for a 99th percentile of their steps
MOST_SLOTS = 48


def loading(setting: Setting) -> Iterator[Row]:
    bench = Bench(setting, "none")
    rows = max(b for b in bench.sizes.batches if b <= 64)
    lane = bench.lane(rows, max_slots=MOST_SLOTS)
    yield from attempt("prefill", _prefill(bench, lane), "9")
    yield from attempt("adapters load", _loading(bench, lane, rows), "8")


# ==== prompts ====


def _prefill(bench: Bench, lane: Lane) -> Iterator[Row]:
    lane.load([RANK])
    length = min(8192, bench.sizes.max_model_len // 2 if not bench.setting.is_judged else 8192)
    chunks = {name: chunks_of(bench, length, slot) for name, slot in (("base", 0), ("adapter", 1))}
    times: dict[str, list[float]] = {name: [] for name in chunks}
    for i in range(bench.setting.pick(8, 2, 2)):
        for name, steps in chunks.items():
            start = time.perf_counter()
            handles = [lane.runner.launch(ScheduledBatch((step,))) for step in steps]
            handles[-1].result()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    base_s, adapter_s = median(times["base"]), median(times["adapter"])
    yield Row(
        f"prefill {length} with an adapter",
        adapter_s * 1e3,
        "ms",
        Goal(base_s / adapter_s, "base tokens/s", at_least=0.95, target="9"),
        note=f"base {base_s * 1e3:.1f} ms, {length / base_s:.0f} tokens/s",
    )


def chunks_of(bench: Bench, length: int, slot: int) -> list[ScheduledRequest]:
    whole = decode_requests(1, length, length, [slot])[0]
    chunk = bench.sizes.chunk
    return [
        whole._replace(
            token_ids=whole.token_ids[: min(chunk, length - start)],
            start=start,
            samples=start + chunk >= length,
        )
        for start in range(0, length, chunk)
    ]


# ==== loading adapters ====


def _loading(bench: Bench, lane: Lane, batch: int) -> Iterator[Row]:
    link = _link_bytes_per_s(bench)
    yield Row("link from pinned memory", link / 1e9, "GB/s")
    slots = [0] * batch
    step_s = lane.run(slots).step_s
    nbytes = bench.adapter(RANK).nbytes
    ahead = min(math.ceil(2 * step_s * link / nbytes) + 1, MOST_SLOTS // 3)
    lane.load([RANK] * (3 * ahead))  # adapters to be evicted, as in a full arena
    quiet: list[float] = []
    busy: list[float] = []
    copied, busy_s = 0, 0.0
    for _ in range(bench.setting.pick(ROUNDS, 1, 1)):
        if bench.setting.budget.is_spent:
            break
        quiet += lane.run(slots).gaps_s
        loads = _Loads(bench, lane, ahead)
        steps = lane.steps(slots, loads.launch)
        steps.go(WARM_STEPS)
        before = loads.copied
        gaps = steps.go(bench.sizes.steps).gaps_s
        copied += loads.copied - before
        busy_s += sum(gaps)
        busy += gaps
        loads.drain()
    shift = _p99(busy) / _p99(quiet) - 1
    name = f"decode x{batch} while adapters load"
    goal = Goal(shift, "its p99 in quiet, added", at_most=0.05, target="8")
    note = f"p99 of {len(busy)} steps; in quiet {_p99(quiet) * 1e3:.3f} ms; "
    note += f"medians {median(busy) * 1e3:.3f} and {median(quiet) * 1e3:.3f} ms"
    yield Row(name, _p99(busy) * 1e3, "ms", goal, note)
    rate = copied / busy_s
    goal = Goal(rate / link, "the link", at_least=0.80, target="8")
    yield Row(f"adapters of {nbytes / 1e6:.0f} MB back to back", rate / 1e9, "GB/s", goal)


class _Loads:
    """Launches each step with enough loads to keep `ahead` of them in progress."""

    def __init__(self, bench: Bench, lane: Lane, ahead: int) -> None:
        self._bench, self._lane, self._ahead = bench, lane, ahead
        self._free = deque(range(1, 3 * ahead + 1))
        self._num_loading = self.copied = 0

    def launch(self, step: ScheduledBatch) -> StepHandle:
        self._arrive()
        slots = [self._free.popleft() for _ in range(self._ahead - self._num_loading)]
        self._num_loading += len(slots)
        loads = tuple(self._load(slot) for slot in slots)
        step = replace(step, adapter_evictions=tuple(slots), adapter_loads=loads)
        return self._lane.runner.launch(step)

    def drain(self) -> None:
        self._bench.device.synchronize()
        self._arrive()

    def _arrive(self) -> None:
        for digest in self._lane.runner.arrived():
            self._free.append(int(digest.split("-")[1]))
            self._num_loading -= 1
            self.copied += self._bench.adapter(RANK).nbytes

    def _load(self, slot: int) -> AdapterLoad:
        nbytes = self._bench.adapter(RANK).nbytes
        offset = self._bench.arena.numel() - slot * nbytes
        return AdapterLoad(slot, f"slot-{slot}-{RANK}", offset, nbytes)


def _link_bytes_per_s(bench: Bench) -> float:
    """Measure the bandwidth of long copies, without other work."""
    nbytes = bench.adapter(RANK).nbytes
    source, target = bench.device.pinned(nbytes).random_(), bench.arena[-nbytes:]

    def work() -> None:
        for _ in range(4):
            bench.device.copy(target, source)

    return 4 * nbytes / median_s(work, bench.setting.device, rounds=7)


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100)[-1] if len(values) > 1 else values[0]
