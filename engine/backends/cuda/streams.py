"""Device: the streams, events, graphs and pinned memory that a runner uses.

There are two: a CUDA device, where work is queued and the host runs ahead, and the host itself,
where work is complete when a call returns. Code written against the protocol runs on both, so that
all of it can be tested without a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

Replay = Callable[[], None]


class Event(Protocol):
    """A point in a stream of work."""

    def is_done(self) -> bool:
        """Check if all work before it has been computed; never waits."""
        ...

    def wait(self) -> None:
        """Block the host until all work before it has been computed."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of the whole device, used by any process; zeros if they are not counted."""

    free_bytes: int
    total_bytes: int


class Device(Protocol):
    """Queues work on the main stream, in the order of the calls, unless said otherwise."""

    torch_device: torch.device

    def pinned(self, nbytes: int) -> Tensor:
        """Allocate uint8 [nbytes] of page-locked (pinned) host memory, for asynchronous copies."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy target[:] = source between pinned and device memory; the caller must change neither
        before a later event is done."""
        ...

    def record(self) -> Event:
        """Record an event after all work so far of the current stream."""
        ...

    def main_waits(self, event: Event) -> None:
        """Make the main stream wait for the event; the host does not wait."""
        ...

    def side(self, after: Event) -> AbstractContextManager[None]:
        """Queue the work of this context on a second stream, which first waits for the event."""
        ...

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work on a third stream, concurrently with what follows on the stream in use.

        It starts after all that this stream was given so far, and the returned call makes the
        stream wait for it. Both may be captured. The work allocates nothing, and the caller must
        not touch what it reads or writes before that call.
        """
        ...

    def capture(self, work: Callable[[], None]) -> Replay:
        """Record the work, all of it on fixed memory, and return a call that replays it. Both
        happen in torch.inference_mode, which torch remembers for all graphs of a process."""
        ...

    def memory(self) -> DeviceMemory: ...

    def release_cached(self) -> None:
        """Free memory that is cached for later allocations."""
        ...

    def synchronize(self) -> None:
        """Block the host until all streams are done."""
        ...


class CudaDevice:
    """A Device on a GPU. Graphs share one memory pool, so they must be replayed one at a time."""

    def __init__(self, torch_device: torch.device) -> None:
        index = torch_device.index or 0
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self._side = torch.cuda.Stream(self.torch_device)
        self._beside = torch.cuda.Stream(self.torch_device)  # never waits for long copies
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, nbytes: int) -> Tensor:
        with torch.cuda.device(self.torch_device):  # the device is set per thread
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event = _CudaEvent()
        event.event.record()
        return event

    def main_waits(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    @contextmanager
    def side(self, after: Event) -> Iterator[None]:
        assert isinstance(after, _CudaEvent)
        self._side.wait_event(after.event)
        with torch.cuda.stream(self._side):
            yield

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        in_use = torch.cuda.current_stream(self.torch_device)
        self._beside.wait_stream(in_use)
        with torch.cuda.stream(self._beside):
            work()
        return partial(in_use.wait_stream, self._beside)

    def capture(self, work: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Other threads may pin memory for an adapter meanwhile; that is not part of the graph
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def memory(self) -> DeviceMemory:
        return DeviceMemory(*torch.cuda.mem_get_info(self.torch_device))

    def release_cached(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)


class _CudaEvent:
    def __init__(self) -> None:
        self.event = torch.cuda.Event()

    def is_done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


class HostDevice:
    """A Device on a CPU: each call is complete when it returns; a capture keeps the function."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record(self) -> Event:
        return _Done()

    def main_waits(self, event: Event) -> None:
        event.wait()

    @contextmanager
    def side(self, after: Event) -> Iterator[None]:
        after.wait()
        yield

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return lambda: None

    def capture(self, work: Callable[[], None]) -> Replay:
        work()
        return work

    def memory(self) -> DeviceMemory:
        return DeviceMemory(0, 0)

    def release_cached(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Done:
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass
