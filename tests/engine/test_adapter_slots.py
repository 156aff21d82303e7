"""Tests the resident adapters and their pins against a simple model."""

from itertools import pairwise
from math import log2

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.popularity import HALF_LIFE_STEPS, Popularity

DIGESTS = "abcde"


class Slots(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slots = AdapterSlots(loads_are_immediate=False)
        self.pins: dict[str, int] = {}
        self.loading: list[str] = []
        self.idle: list[str] = []  # in the order of coming
        self.idle_since: dict[str, int] = {}
        self.uses: dict[str, list[int]] = {digest: [] for digest in DIGESTS}
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
            self._set_idle(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def acquire(self, digest: str) -> None:
        slot = self.slots.acquire(digest)
        is_there = digest in self.used.values() and digest not in self.loading
        assert (slot is not None) == is_there
        if slot is not None:
            assert self.used[slot] == digest
            self.pins[digest] = self.pins.get(digest, 0) + 1
            self.uses[digest].append(self.slots.step)
            self.idle = [d for d in self.idle if d != digest]

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.pins)))
        self.slots.release(digest)
        self.pins[digest] -= 1
        if not self.pins[digest]:
            del self.pins[digest]
            self._set_idle(digest)

    def _set_idle(self, digest: str) -> None:
        self.idle.append(digest)
        self.idle_since[digest] = self.slots.step

    @precondition(lambda self: self.idle)
    @rule()
    def evict(self) -> None:
        victim = next(digest for digest, _ in self.slots.idle)
        self.idle.remove(victim)
        assert self.used.pop(self.slots.evict(victim)) == victim

    @rule(steps=st.sampled_from([1, 7, HALF_LIFE_STEPS]))
    def step(self, steps: int) -> None:
        self.slots.step += steps

    def _worth(self, digest: str) -> float:
        """The last time at which one use counts as much as all uses do; not before its rest."""
        since = self.idle_since[digest]
        ages = [(since - use) / HALF_LIFE_STEPS for use in self.uses[digest]]
        count = sum(2**-age for age in ages)
        return max(since, int(since + HALF_LIFE_STEPS * log2(count))) if count else since

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.slots.check_integrity(self.pins)
        order = [digest for digest, _ in self.slots.idle]
        assert sorted(order) == sorted(self.idle)
        worths = [self._worth(digest) for digest in order]
        assert all(a <= b + 1 for a, b in pairwise(worths)), "rounded"
        for digest, worth in self.slots.idle:
            assert abs(worth - self._worth(digest)) <= 1
        assert sorted(self.slots.placed) == sorted(self.used.values())
        assert sorted(self.slots.resident) == sorted({*self.idle, *self.pins})
        assert self.slots.is_any_loading == bool(self.loading)
        loaded = {d for d in DIGESTS if self.slots.is_loaded(d)}
        assert loaded == set(self.slots.resident)
        going = set(order[: len(self.slots.placed) // 4])
        assert {d for d in DIGESTS if self.slots.stays(d)} == loaded - going


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


def test_those_in_memory_are_those_of_the_device_and_the_latest_of_the_host() -> None:
    slots = ready("a", "b")
    for digest in "cdef":
        slots.set_ready(digest, 1)
    slots.set_absent("a")
    slots.set_absent("e")
    assert slots.in_memory(9) == ("a", "b", "f", "d", "c")
    assert slots.in_memory(3) == ("a", "b", "f")


def test_one_used_often_outlives_later_ones_used_once_and_not_for_ever() -> None:
    slots = AdapterSlots()
    for digest in ("often", *(f"once-{n}" for n in range(200))):
        slots.set_ready(digest, 1)
    use(slots, *["often"] * 8)

    def outlives(first: int, last: int) -> bool:
        for n in range(first, last):
            slots.step += HALF_LIFE_STEPS // 40
            use(slots, f"once-{n}")
            slots.evict(next(digest for digest, _ in slots.idle))
        return slots.is_placed("often")

    assert outlives(0, 115)
    assert not outlives(115, 130), "eight uses count less than one after three half-lives"


def use(slots: AdapterSlots, *digests: str) -> None:
    for digest in digests:
        if not slots.is_placed(digest):
            slots.place(digest)
            slots.set_resident(digest)
        slots.acquire(digest)
        slots.release(digest)


def test_what_was_evicted_is_remembered_within_a_bound() -> None:
    popularity = Popularity(100, max_known=10)
    for now in range(100):
        popularity.use("often", now)
        popularity.use(f"once-{now}", now)
    assert popularity.worth("often") > popularity.worth("once-99") == 99
    assert popularity.worth("once-50") == 0 and len(popularity._worths) == 10
