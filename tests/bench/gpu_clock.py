"""Times work on a device, or on a CPU where there is none.

What is compared is timed in turns, so that a clock which rises or falls meets all of it alike.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Work = Callable[[], object]

LEAST_CALLS = 16
WAKE_S = 0.3  # of products, until the device's clocks are up


class Budget:
    """The seconds that a part may take. Who measures asks before each row, and stops in time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end_s = time.monotonic() + seconds

    @property
    def is_spent(self) -> bool:
        return time.monotonic() >= self._end_s


def median_s(work: Work, device: torch.device, *, rounds: int = 15, warmup: int = 3) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    return medians_s({"": work}, device, rounds=rounds, warmup=warmup)[""]


def medians_s(
    works: Mapping[str, Work], device: torch.device, *, rounds: int = 15, warmup: int = 3
) -> dict[str, float]:
    """Seconds of one call of each; every round times each of them once."""
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
    """Seconds per call of each list's calls, which are replayed in one CUDA graph, again and again
    until they are `least`: no launch gaps, the graph's own start spread over many, and data that
    no cache still holds if each call of the list has its own."""
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


@torch.inference_mode()  # as the engine's graphs: a process must not capture in both modes
def recorded(calls: Sequence[Work], device: torch.device) -> Work:
    """A replay of these calls in a graph; where there is no device, they run one by one."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles, and whatever a library does on its first call
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def wake(device: torch.device) -> None:
    """Keeps the device busy until its clocks have risen."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    end_s = time.monotonic() + WAKE_S
    while time.monotonic() < end_s:
        a @ a
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives back what nothing uses any more: for what comes next, or another process."""
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
