"""Profiles the kernels of a step, by their time on the device."""

from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from engine.scheduler.batch import ScheduledBatch
from tests.bench.gpu_loading import chunks_of
from tests.bench.gpu_runner import RANK, WARM_STEPS, Bench, Lane
from tests.bench.gpu_setting import Setting

FORMS = {"bf16": "none", "nf4": "nf4", "fp8": "fp8"}
COUNT = 4  # steps per mean
MOST = 14  # kernels in a table


def profile_steps(setting: Setting, part: str) -> Iterator[str]:
    """Yield a table for each kind of step."""
    bench = Bench(setting, FORMS[part])
    rows = max(b for b in bench.sizes.batches if b <= 128)
    lane = bench.lane(rows)
    lane.load([RANK] * rows)
    for batch in sorted({1, min(rows, 32), rows}):
        for traffic, slots in {
            "base": [0] * batch,
            "distinct": list(range(1, batch + 1)),
        }.items():
            yield _table(f"{part} decode x{batch}, {traffic}", _decodes(lane, slots))
    prompt = chunks_of(bench, bench.sizes.chunk, 1)
    name = f"{part} prefill of {bench.sizes.chunk} with an adapter"
    yield _table(name, lambda: lane.runner.launch(ScheduledBatch(tuple(prompt))).result())


def _decodes(lane: Lane, slots: list[int]) -> Callable[[], object]:
    steps = lane.steps(slots)
    steps.go(WARM_STEPS)
    return lambda: steps.go(1)


def _table(name: str, step: Callable[[], object]) -> str:
    step()
    on_device = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]
    with profile(activities=activities) as made:
        for _ in range(COUNT):
            step()
        if on_device:
            torch.cuda.synchronize()
    events = [(e.key, _us(e, on_device) / COUNT, e.count / COUNT) for e in made.key_averages()]
    events.sort(key=lambda event: -event[1])
    total = sum(us for _, us, _ in events)
    lines = [f"{name}: {total:.0f} us of kernels"]
    for key, us, count in events[:MOST]:
        share = us / total if total else 0.0
        lines.append(f"{us:9.1f} us {share:6.1%} {count:6.1f} x {key[:70]}")
    return "\n".join(lines)


def _us(event: object, on_device: bool) -> float:
    return float(getattr(event, "self_device_time_total" if on_device else "self_cpu_time_total"))
