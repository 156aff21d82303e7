"""Residency of adapters: bytes, pins and least-recently-used order, against a plain model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduler.adapter_slots import AdapterSlots

CAPACITY = 10
SIZES = {"a": 1, "b": 3, "c": 4, "d": 6, "e": 10}


class Slots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slots = AdapterSlots(CAPACITY)
        self.pins: dict[str, int] = {}
        self.order: list[str] = []  # resident, oldest use first
        self.device: dict[int, str] = {}  # what an executor would hold
        for digest, nbytes in SIZES.items():
            self.slots.set_ready(digest, nbytes)

    @rule(digest=st.sampled_from(sorted(SIZES)))
    def acquire(self, digest: str) -> None:
        expected = self._expected_after(digest)
        slot = self.slots.acquire(digest)
        assert (slot is None) == (expected is None)
        if expected is not None:
            self.order = expected
            self.pins[digest] = self.pins.get(digest, 0) + 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.pins)))
        self.slots.release(digest)
        self.pins[digest] -= 1
        if not self.pins[digest]:
            del self.pins[digest]

    @rule()
    def execute(self) -> None:
        evictions, loads = self.slots.take_moves()
        for slot in evictions:
            del self.device[slot]
        for slot, digest in loads:
            assert slot not in self.device
            self.device[slot] = digest
        assert sorted(self.device.values()) == sorted(self.order)
        assert all(self.device[self.slots.slot(d)] == d for d in self.order)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.slots.check_integrity(self.pins)
        assert list(self.slots.resident) == self.order

    def _expected_after(self, digest: str) -> list[str] | None:
        order = [d for d in self.order if d != digest]
        room = CAPACITY - (0 if digest in self.order else SIZES[digest])
        if digest not in self.order:
            while sum(SIZES[d] for d in order) > room:
                idle = [d for d in order if d not in self.pins]
                if not idle:
                    return None
                order.remove(idle[0])
        return [*order, digest]


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_evicting_a_pinned_adapter_is_refused() -> None:
    slots = AdapterSlots(CAPACITY)
    for digest in ("d", "c", "b"):
        slots.set_ready(digest, SIZES[digest])
    assert slots.acquire("d") and slots.acquire("c")
    assert slots.acquire("b") is None
    slots.release("d")
    assert slots.acquire("b")
    assert set(slots.resident) == {"b", "c"}


def test_releasing_more_often_than_acquired_is_noticed() -> None:
    slots = AdapterSlots(CAPACITY)
    slots.set_ready("a", 1)
    slots.acquire("a")
    slots.release("a")
    with pytest.raises(AssertionError, match="more often"):
        slots.release("a")


def test_slot_zero_is_never_given_to_an_adapter() -> None:
    slots = AdapterSlots(CAPACITY)
    slots.set_ready("a", 1)
    assert slots.acquire("a") == 1
