"""AdapterSlots: tracks which adapters are on the device, how many requests use each, and which
may be evicted first.

An adapter is known here once its weights are in host memory (`set_ready`). On the device it is

    loading    its extent is reserved and the copy is under way; cannot be evicted
    pinned     used by running requests; cannot be evicted
    idle       neither; evicted when its memory is needed, that of least worth first (`popularity`)

Slot 0 is the base model and is never assigned. `MemoryBudget` decides where adapters lie.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.scheduler.popularity import HALF_LIFE_STEPS, Popularity


class _Ready(NamedTuple):
    nbytes: int
    invocation_token_ids: tuple[int, ...]


@dataclass(slots=True)
class _Placed:
    slot: int
    ready: _Ready
    load: int  # number of the load in progress; 0: loaded
    pins: int = 0
    place: tuple[int, int, str] = (0, 0, "")  # among the idle ones, while it is one


class AdapterSlots:
    """Owns slot numbers, pins and the order of eviction.

    `loads_are_immediate`: a load completes before the step that it belongs to is computed.
    Otherwise an adapter is loading until `set_resident`. `step` dates the last uses.
    """

    def __init__(self, *, loads_are_immediate: bool = True) -> None:
        self.loads_are_immediate = loads_are_immediate
        self.step = 0
        self._ready: dict[str, _Ready] = {}
        self._placed: dict[str, _Placed] = {}
        self._popularity = Popularity(HALF_LIFE_STEPS)
        self._idle: list[tuple[int, int, str]] = []  # worth, order of coming, digest; sorted
        self._num_idled = 0
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._num_loads = 0

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(digest for digest, entry in self._placed.items() if not entry.load)

    def in_memory(self, most: int) -> tuple[str, ...]:
        """Return at most so many adapters whose files need not be read: those on the device, and of
        those in host memory alone the latest."""
        found = [*self._placed, *(d for d in reversed(self._ready) if d not in self._placed)]
        return tuple(found[:most])

    @property
    def idle(self) -> Iterator[tuple[str, int]]:
        """Yield (digest, worth as a step of use), that of least worth first."""
        return ((digest, worth) for worth, _, digest in self._idle)

    @property
    def placed(self) -> tuple[str, ...]:
        """Digests of all resident and loading adapters."""
        return tuple(self._placed)

    @property
    def is_any_loading(self) -> bool:
        return any(entry.load for entry in self._placed.values())

    # ==== what the host has ====

    def set_ready(
        self, digest: str, nbytes: int, invocation_token_ids: tuple[int, ...] = ()
    ) -> None:
        """Note that host memory holds the weights, until `set_absent`.

        With `invocation_token_ids` the adapter acts from the last place on where the prompt has
        them.
        """
        self._ready[digest] = _Ready(nbytes, invocation_token_ids)

    def set_absent(self, digest: str) -> None:
        """Note that host memory dropped the weights; a resident copy stays usable."""
        self._ready.pop(digest, None)

    def is_on_host(self, digest: str) -> bool:
        return digest in self._ready

    def is_ready(self, digest: str) -> bool:
        return digest in self._placed or digest in self._ready

    def nbytes(self, digest: str) -> int | None:
        """Size in bytes; None until `set_ready`."""
        known = self._known(digest)
        return known.nbytes if known else None

    def invocation_token_ids(self, digest: str) -> tuple[int, ...]:
        """What switches a ready adapter on; empty if it acts on all tokens."""
        known = self._known(digest)
        assert known is not None, f"adapter {digest} is not ready"
        return known.invocation_token_ids

    def _known(self, digest: str) -> _Ready | None:
        entry = self._placed.get(digest)
        return entry.ready if entry else self._ready.get(digest)

    # ==== what the device has ====

    def is_placed(self, digest: str) -> bool:
        return digest in self._placed

    def is_pinned(self, digest: str) -> bool:
        return self._placed[digest].pins > 0

    def is_loaded(self, digest: str) -> bool:
        """Whether it is on the device, where requests can use it."""
        entry = self._placed.get(digest)
        return entry is not None and not entry.load

    def stays(self, digest: str) -> bool:
        """Whether it will be on the device for a while: host memory needs no copy of it.

        It is loaded, and none of the quarter that would be evicted first.
        """
        entry = self._placed.get(digest)
        if entry is None or entry.load:
            return False
        return entry.pins > 0 or bisect_left(self._idle, entry.place) >= len(self._placed) // 4

    def is_idle(self, digest: str) -> bool:
        entry = self._placed.get(digest)
        return entry is not None and not entry.pins and not entry.load

    def is_loading(self, digest: str) -> bool:
        entry = self._placed.get(digest)
        return entry is not None and entry.load > 0

    def awaited_load(self, digest: str) -> int:
        """Number of the load that requests must wait for; 0: none."""
        entry = self._placed.get(digest)
        return entry.load if entry and not self.loads_are_immediate else 0

    def slot(self, digest: str) -> int:
        return self._placed[digest].slot

    def place(self, digest: str) -> int:
        """Give a ready adapter a slot and mark it as loading."""
        self._num_loads += 1
        entry = _Placed(self._new_slot(), self._ready[digest], self._num_loads)
        self._placed[digest] = entry
        return entry.slot

    def set_resident(self, digest: str) -> None:
        """Mark its load as complete. Ignored if the adapter was evicted in the meantime."""
        entry = self._placed.get(digest)
        if entry is not None and entry.load:
            entry.load = 0
            self._set_idle_if_unused(digest, entry)

    def acquire(self, digest: str) -> int | None:
        """Pin an adapter and return its slot; None while it cannot be used on the device."""
        entry = self._placed.get(digest)
        if entry is None or self.awaited_load(digest):
            return None
        self._end_idle(entry)
        entry.pins += 1
        self._popularity.use(digest, self.step)
        return entry.slot

    def release(self, digest: str) -> None:
        entry = self._placed[digest]
        assert entry.pins > 0, f"adapter {digest} was released more often than acquired"
        entry.pins -= 1
        self._set_idle_if_unused(digest, entry)

    def evict(self, digest: str) -> int:
        """Remove an unpinned adapter from the device and return the slot that it had."""
        entry = self._placed.pop(digest)
        assert not entry.pins, f"adapter {digest} is evicted while it is used"
        self._end_idle(entry)
        self._free_slots.append(entry.slot)
        return entry.slot

    def check_integrity(self, pins: dict[str, int]) -> None:
        """Raise AssertionError unless slots, states and `pins` (uses per digest) all agree."""
        assert {d: e.pins for d, e in self._placed.items() if e.pins} == pins
        idle = [d for d, e in self._placed.items() if not e.pins and not e.load]
        assert sorted(idle) == sorted(d for _, _, d in self._idle), "an adapter's state is wrong"
        assert self._idle == sorted(self._placed[digest].place for digest in idle), "out of order"
        used = [e.slot for e in self._placed.values()]
        assert sorted(used + self._free_slots) == list(range(1, self._num_slots + 1))

    def _set_idle_if_unused(self, digest: str, entry: _Placed) -> None:
        if not entry.pins and not entry.load:
            self._num_idled += 1
            worth = max(self._popularity.worth(digest), self.step)
            entry.place = (worth, self._num_idled, digest)
            insort(self._idle, entry.place)

    def _end_idle(self, entry: _Placed) -> None:
        if not entry.pins and not entry.load:
            del self._idle[bisect_left(self._idle, entry.place)]

    def _new_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._num_slots += 1
        return self._num_slots
