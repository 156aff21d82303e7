"""LaggingDevice: performs copies from and to pinned memory late, when they are waited for.

So memory that is written or read too early holds wrong numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from engine.backends.cuda.streams import DeviceMemory, Event, HostDevice, Replay


@dataclass(eq=False)
class LateEvent:
    device: "LaggingDevice"
    stream: str
    place: int  # number of work items of the stream before it

    def is_done(self) -> bool:
        return self.device.num_done[self.stream] >= self.place

    def wait(self) -> None:
        self.device.run(self.stream, self.place)


@dataclass
class LaggingDevice(HostDevice):
    queues: dict[str, list[Callable[[], None]]] = field(
        default_factory=lambda: {"main": [], "side": []}
    )
    num_done: dict[str, int] = field(default_factory=lambda: {"main": 0, "side": 0})
    stream: str = "main"
    log: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        super().__init__()

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.give(lambda: target.copy_(source))

    def give(self, work: Callable[[], object]) -> None:
        self.queues[self.stream].append(lambda: void(work()))

    def record(self) -> Event:
        place = self.num_done[self.stream] + len(self.queues[self.stream])
        return LateEvent(self, self.stream, place)

    def main_waits(self, event: Event) -> None:
        self.give(event.wait)

    @contextmanager
    def side(self, after: Event) -> Iterator[None]:
        self.stream = "side"
        self.give(after.wait)
        yield
        self.stream = "main"

    def capture(self, work: Callable[[], None]) -> Replay:
        return lambda: self.give(work)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(0, 0)

    def synchronize(self) -> None:
        for stream, queue in self.queues.items():
            self.run(stream, self.num_done[stream] + len(queue))

    def run(self, stream: str, place: int) -> None:
        while self.num_done[stream] < place:
            work = self.queues[stream].pop(0)
            self.num_done[stream] += 1
            work()


def void(_: object) -> None:
    return None
