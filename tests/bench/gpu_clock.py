"""Times work on a device, or on a CPU if there is none.

Alternatives are timed in turns, so that changes of clock rates affect all of them equally.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Work = Callable[[], object]

LEAST_CALLS = 16
WAKE_S = 0.3  # seconds of products, until the device's clocks have risen


class Budget:
    """The seconds that a part may take; a part checks before each row and stops in time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end_s = time.monotonic() + seconds

    @property
    def is_spent(self) -> bool:
        return time.monotonic() >= self._end_s


def median_s(work: Work, device: torch.device, *, rounds: int = 15, warmup: int = 3) -> float:
    """Return the median seconds of one call, by the device's own clock if it has one."""
    return medians_s({"": work}, device, rounds=rounds, warmup=warmup)[""]


def medians_s(
    works: Mapping[str, Work], device: torch.device, *, rounds: int = 15, warmup: int = 3
) -> dict[str, float]:
    """Return the median seconds of one call of each; every round times each once."""
    for work in works.values():
        for _ in range(warmup):
            work()
    measure = _device_s if device.type == "cuda" else _host_s
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(measure(work))
    return {name: statistics.median(values) for name, values in times.items()}


def graphs_s(
    works: Mapping[str, Sequence[Work]],
    device: torch.device,
    *,
    rounds: int = 15,
    least: int = LEAST_CALLS,
) -> dict[str, float]:
    """Return the seconds per call of each list's calls, replayed in one CUDA graph.

    Lists are repeated to at least `least` calls. So there are no launch gaps, the graph's start is
    spread over many calls, and no cache holds the data if each call of a list has its own.
    """
    on_device = device.type == "cuda"
    if on_device:
        works = {name: [*calls] * -(-least // len(calls)) for name, calls in works.items()}
    replays = {name: recorded(calls, device) for name, calls in works.items()}
    times = medians_s(
        replays, device, rounds=rounds if on_device else 2, warmup=3 if on_device else 1
    )
    return {name: times[name] / len(calls) for name, calls in works.items()}


def graph_s(works: Sequence[Work], device: torch.device) -> float:
    return graphs_s({"": works}, device)[""]


@torch.inference_mode()  # like the engine's graphs: a process must not capture in both modes
def recorded(calls: Sequence[Work], device: torch.device) -> Work:
    """Record these calls in a graph and return its replay; without a device, plain calls."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles kernels, and initialises libraries
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def wake(device: torch.device) -> None:
    """Keep the device busy until its clocks have risen."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end_s = time.monotonic() + WAKE_S
    while time.monotonic() < end_s:
        a @ a
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free unused device memory, for the next part or another process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _device_s(work: Work) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _host_s(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
