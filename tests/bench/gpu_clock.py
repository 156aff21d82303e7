"""Times work on a device, or on a CPU where there is none."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def median_s(work: Work, device: torch.device, *, rounds: int = 15, warmup: int = 3) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    for _ in range(warmup):
        work()
    measure = _device_s if device.type == "cuda" else _host_s
    return statistics.median(measure(work) for _ in range(rounds))


@torch.inference_mode()  # as the engine's graphs: a process must not capture in both modes
def graph_s(works: list[Work], device: torch.device, *, rounds: int = 10) -> float:
    """Seconds per call of several, replayed in one CUDA graph: no launch gaps, and data that no
    cache still holds if each call has its own. Where there is no device, they run one by one."""
    if device.type != "cuda":
        return median_s(lambda: [work() for work in works], device, rounds=2, warmup=1) / len(works)
    for work in works:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return median_s(graph.replay, device, rounds=rounds) / len(works)


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
