"""OrderedDevice: computes at once, and checks that all uses of shared memory are ordered.

The host and each stream have a vector clock (Lamport 1978, Mattern 1989), which launches and events
pass on. Two uses of the same bytes, one of them a write, must be ordered by the clocks, else
`Unordered` is raised, because on a GPU they may happen in either order. Operations of torch are
intercepted; `use` declares reads and writes of other work. Host memory that is written through
numpy counts as written when a copy finds it changed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from engine.backends.cuda.streams import Event, HostDevice

HOST, MAIN, SIDE, BESIDE = "host", "main", "side", "beside"
Clock = dict[str, int]


class Unordered(AssertionError):
    """Raised if two uses of the same memory may happen in either order."""


@dataclass(frozen=True)
class Use:
    start: int  # in bytes of its storage
    end: int
    writes: bool
    stream: str
    time: int  # by the clock of that stream
    what: str


@dataclass(eq=False)
class ClockEvent:
    device: "OrderedDevice"
    clock: Clock

    def is_done(self) -> bool:
        """Become done at a random call; from then on all earlier work precedes the host."""
        if self.device.dice.random() < 0.5:
            return False
        self.wait()
        return True

    def wait(self) -> None:
        self.device.learn(HOST, self.clock)


@dataclass
class OrderedDevice(HostDevice):
    seed: int = 0
    stream: str = MAIN
    clocks: dict[str, Clock] = field(
        default_factory=lambda: {name: {name: 1} for name in (HOST, MAIN, SIDE, BESIDE)}
    )
    uses: dict[int, list[Use]] = field(default_factory=dict[int, list[Use]])  # by storage
    pinned_bytes: dict[int, bytes] = field(default_factory=dict[int, bytes])

    def __post_init__(self) -> None:
        super().__init__()
        self.dice = random.Random(self.seed)
        self._kept: list[Any] = []  # keeps tensors alive, so that their memory is not reused

    # ==== order ====

    def learn(self, stream: str, clock: Clock) -> None:
        own = self.clocks[stream]
        for name, time in clock.items():
            own[name] = max(own.get(name, 0), time)

    def record(self) -> Event:
        self.learn(self.stream, self.clocks[HOST])
        return ClockEvent(self, dict(self.clocks[self.stream]))

    def main_waits(self, event: Event) -> None:
        assert isinstance(event, ClockEvent)
        self.learn(MAIN, event.clock)

    @contextmanager
    def side(self, after: Event) -> Iterator[None]:
        assert isinstance(after, ClockEvent)
        self.learn(SIDE, after.clock)
        with self._on(SIDE):
            yield

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        in_use = self.stream
        self.learn(BESIDE, self.clocks[in_use])
        with self._on(BESIDE):
            work()
        return lambda: self.learn(in_use, self.clocks[BESIDE])

    def synchronize(self) -> None:
        for name in (MAIN, SIDE, BESIDE):
            self.learn(HOST, self.clocks[name])

    @contextmanager
    def _on(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    # ==== uses ====

    def pinned(self, nbytes: int) -> Tensor:
        with _disable_current_modes():
            pinned = torch.empty(nbytes, dtype=torch.uint8)
        self.pinned_bytes[_storage(pinned)] = b""
        self._kept.append(pinned)
        return pinned

    def copy(self, target: Tensor, source: Tensor) -> None:
        if _storage(source) in self.pinned_bytes:
            self._host_fills(source)
        self.use("copy", reads=[source], writes=[target])
        with _disable_current_modes():
            target.copy_(source)

    def use(
        self,
        what: str,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
        stream: str | None = None,
    ) -> None:
        """Declare a use of these tensors by the current stream, or by the given one."""
        stream = stream or self.stream
        self.learn(stream, self.clocks[HOST])
        self.clocks[stream][stream] += 1
        for tensors, is_written in ((reads, False), (writes, True)):
            for tensor in tensors:
                if tensor.numel():
                    self._note(tensor, is_written, stream, what)

    def _host_fills(self, pinned: Tensor) -> None:
        content = bytes(pinned.view(torch.uint8).numpy())
        if self.pinned_bytes[_storage(pinned)] != content:
            self.use("fill", writes=[pinned], stream=HOST)
            self.pinned_bytes[_storage(pinned)] = content

    def _note(self, tensor: Tensor, writes: bool, stream: str, what: str) -> None:
        self._kept.append(tensor.untyped_storage())
        start = tensor.storage_offset() * tensor.itemsize
        spans = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        end = start + (sum(spans) + 1) * tensor.itemsize
        clock = self.clocks[stream]
        use = Use(start, end, writes, stream, clock[stream], what)
        kept: list[Use] = []
        for other in self.uses.get(_storage(tensor), ()):
            is_before = clock.get(other.stream, 0) >= other.time
            touches = other.start < end and start < other.end
            if touches and not is_before and (writes or other.writes):
                raise Unordered(f"{other} and {use}: nothing orders them")
            is_covered = start <= other.start and other.end <= end
            if not (is_before and is_covered and (writes or not other.writes)):
                kept.append(other)
        self.uses[_storage(tensor)] = [*kept, use]


class Watch(TorchDispatchMode):
    """Reports torch's operations to the device."""

    def __init__(self, device: OrderedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        returns = func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return out  # a view
        reads, writes = _operands(func, args, kwargs)
        writes += [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        is_host = any(_storage(t) in self._device.pinned_bytes for t in (*reads, *writes))
        self._device.use(str(func), reads, writes, HOST if is_host else None)
        return out


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operation reads, and those it writes by its schema."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        into = writes if is_written else reads
        into += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return reads, writes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
