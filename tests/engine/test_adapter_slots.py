"""Tests the resident adapters and their pins against a simple model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduler.adapter_slots import AdapterSlots

DIGESTS = "abcde"


class Slots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slots = AdapterSlots(loads_are_immediate=False)
        self.pins: dict[str, int] = {}
        self.loading: list[str] = []
        self.idle: list[str] = []  # least recently used first
        self.used: dict[int, str] = {}  # slots
        for i, digest in enumerate(DIGESTS):
            self.slots.set_ready(digest, i)

    @rule(digest=st.sampled_from(DIGESTS))
    def place(self, digest: str) -> None:
        if not self.slots.is_placed(digest):
            slot = self.slots.place(digest)
            assert slot not in self.used, "a slot is given twice"
            self.used[slot] = digest
            self.loading.append(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def arrive(self, digest: str) -> None:
        self.slots.set_resident(digest)
        if digest in self.loading:
            self.loading.remove(digest)
            self.idle.append(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def acquire(self, digest: str) -> None:
        slot = self.slots.acquire(digest)
        is_there = digest in self.used.values() and digest not in self.loading
        assert (slot is not None) == is_there
        if slot is not None:
            assert self.used[slot] == digest
            self.pins[digest] = self.pins.get(digest, 0) + 1
            self.idle = [d for d in self.idle if d != digest]

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.pins)))
        self.slots.release(digest)
        self.pins[digest] -= 1
        if not self.pins[digest]:
            del self.pins[digest]
            self.idle.append(digest)

    @precondition(lambda self: self.idle)
    @rule()
    def evict(self) -> None:
        slot = self.slots.evict(self.idle[0])
        assert self.used.pop(slot) == self.idle.pop(0)

    @rule()
    def step(self) -> None:
        self.slots.step += 1

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.slots.check_integrity(self.pins)
        assert [digest for digest, _ in self.slots.idle] == self.idle
        assert sorted(self.slots.placed) == sorted(self.used.values())
        assert sorted(self.slots.resident) == sorted({*self.idle, *self.pins})
        assert self.slots.is_any_loading == bool(self.loading)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def ready(*digests: str, loads_are_immediate: bool = True) -> AdapterSlots:
    slots = AdapterSlots(loads_are_immediate=loads_are_immediate)
    for digest in digests:
        slots.set_ready(digest, 1)
        slots.place(digest)
    return slots


def test_evicting_a_pinned_adapter_fails() -> None:
    slots = ready("a")
    slots.acquire("a")
    with pytest.raises(AssertionError, match="is used"):
        slots.evict("a")


def test_releasing_more_often_than_acquiring_fails() -> None:
    slots = ready("a")
    slots.acquire("a")
    slots.release("a")
    with pytest.raises(AssertionError, match="more often"):
        slots.release("a")


def test_slot_zero_is_never_given_to_an_adapter() -> None:
    assert ready("a").slot("a") == 1


def test_only_where_loads_are_immediate_an_adapter_is_used_before_it_is_resident() -> None:
    assert ready("a").acquire("a") == 1
    slots = ready("a", loads_are_immediate=False)
    assert slots.acquire("a") is None and slots.awaited_load("a") == 1
    slots.set_resident("a")
    assert slots.acquire("a") == 1 and not slots.awaited_load("a")


def test_a_resident_adapter_is_ready_even_if_the_host_dropped_it() -> None:
    slots = ready("a")
    slots.set_absent("a")
    assert slots.is_ready("a") and not slots.is_on_host("a") and slots.nbytes("a") == 1
    slots.set_resident("a")
    slots.evict("a")
    assert not slots.is_ready("a") and slots.nbytes("a") is None
