"""AdapterSlots: which adapters are resident on the device, bounded in bytes.

An adapter is known here once its weights are in host memory (`set_ready`). It becomes resident
when a request needs it, pinned while a running request uses it, and is otherwise evicted in
least-recently-used order when bytes lack. Slot 0 is the base model and is never assigned.
"""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class _Resident:
    slot: int
    nbytes: int
    pins: int = 0


class AdapterSlots:
    """Residency decisions only; whoever executes the batch moves the bytes."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._ready: dict[str, int] = {}
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # oldest use first
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._loads: list[tuple[int, str]] = []
        self._evictions: list[int] = []

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(self._resident)

    def set_ready(self, digest: str, nbytes: int) -> None:
        """The host has the weights and keeps them until `set_absent`."""
        self._ready[digest] = nbytes

    def set_absent(self, digest: str) -> None:
        """The host dropped the weights; a resident copy stays usable."""
        self._ready.pop(digest, None)

    def is_ready(self, digest: str) -> bool:
        return digest in self._resident or digest in self._ready

    def acquire(self, digest: str) -> int | None:
        """Pin a ready adapter and return its slot; None while pinned ones leave no room."""
        entry = self._resident.get(digest)
        if entry is None:
            entry = self._admit(digest)
        if entry is None:
            return None
        self._resident.move_to_end(digest)
        entry.pins += 1
        return entry.slot

    def release(self, digest: str) -> None:
        entry = self._resident[digest]
        assert entry.pins > 0, f"adapter {digest} was released more often than acquired"
        entry.pins -= 1

    def discard(self, digest: str) -> None:
        """Evict an unpinned adapter now, for one whose load may not have reached the device."""
        entry = self._resident.get(digest)
        if entry is not None and not entry.pins:
            self._evict(digest, entry)

    def slot(self, digest: str) -> int:
        return self._resident[digest].slot

    def take_moves(self) -> tuple[tuple[int, ...], tuple[tuple[int, str], ...]]:
        """Evictions (slots) and loads (slot, digest) since the last call, in that order."""
        moves = tuple(self._evictions), tuple(self._loads)
        self._evictions, self._loads = [], []
        return moves

    def check_integrity(self, pins: dict[str, int]) -> None:
        """Raise AssertionError unless bytes, slots and `pins` (uses per digest) all agree."""
        assert {d: e.pins for d, e in self._resident.items() if e.pins} == pins
        assert self.used_bytes == sum(e.nbytes for e in self._resident.values())
        assert self.used_bytes <= self.capacity_bytes
        used = [e.slot for e in self._resident.values()]
        assert sorted(used + self._free_slots) == list(range(1, self._num_slots + 1))

    def _admit(self, digest: str) -> _Resident | None:
        nbytes = self._ready[digest]
        if not self._make_room(nbytes):
            return None
        entry = self._resident[digest] = _Resident(self._new_slot(), nbytes)
        self.used_bytes += nbytes
        self._loads.append((entry.slot, digest))
        return entry

    def _make_room(self, nbytes: int) -> bool:
        idle = [(d, e) for d, e in self._resident.items() if not e.pins]
        reclaimable = sum(e.nbytes for _, e in idle)
        if nbytes > self.capacity_bytes - self.used_bytes + reclaimable:
            return False
        for digest, entry in idle:
            if nbytes <= self.capacity_bytes - self.used_bytes:
                break
            self._evict(digest, entry)
        return True

    def _evict(self, digest: str, entry: _Resident) -> None:
        del self._resident[digest]
        self.used_bytes -= entry.nbytes
        self._free_slots.append(entry.slot)
        pending = (entry.slot, digest)
        if pending in self._loads:  # never reached the device
            self._loads.remove(pending)
        else:
            self._evictions.append(entry.slot)

    def _new_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._num_slots += 1
        return self._num_slots
