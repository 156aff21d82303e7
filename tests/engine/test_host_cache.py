"""Tests HostCache: loads in other threads and in the queue's order, bounds the bytes."""

import threading
from concurrent.futures import Future, wait

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.lora.host_cache import HostCache
from engine.lora.weights import LoraWeights
from engine.messages import AdapterFolder


class Loader:
    """Loads adapters of 10 bytes once `gate` opens; digests that start with "bad" fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.loaded: list[str] = []

    def __call__(self, adapter: AdapterFolder) -> LoraWeights:
        self.gate.wait(30)
        self.loaded.append(adapter.digest)
        if adapter.digest.startswith("bad"):
            raise OSError("unreadable")
        return LoraWeights(adapter.digest, {}, 10)


def make_cache(max_bytes: int, loader: Loader) -> HostCache:
    return HostCache(max_bytes, loader, expected_bytes=lambda adapter: 10)


class Device:
    """Has some adapters, of which some stay for a while."""

    def __init__(self, stays: str = "", goes: str = "") -> None:
        self.kept, self.goes = set(stays), set(goes)

    def is_loaded(self, digest: str) -> bool:
        return digest in self.kept | self.goes

    def stays(self, digest: str) -> bool:
        return digest in self.kept


EMPTY = Device()


def settle(cache: HostCache) -> list[tuple[str, bool]]:
    """Load all that is due. Returns what was loaded, and whether it succeeded."""
    ended: list[tuple[str, bool]] = []
    while True:
        cache.advance(EMPTY)
        if not cache._loading:
            return ended
        wait([entry.future for entry in cache._entries.values() if entry.future], 30)
        ended += [(loaded.digest, loaded.error is None) for loaded in cache.poll()]


def want(cache: HostCache, *digests: str) -> None:
    for digest in digests:
        cache.want(AdapterFolder(digest, ""))


def test_wanting_returns_before_the_load_ends_and_poll_reports_it_once() -> None:
    loader = Loader()
    loader.gate.clear()
    cache = make_cache(100, loader)
    want(cache, "a")
    cache.advance(EMPTY)
    assert cache.poll() == []
    loader.gate.set()
    assert settle(cache) == [("a", True)]
    assert cache.poll() == [] and cache.get("a").digest == "a"


def test_an_adapter_wanted_by_many_is_loaded_once() -> None:
    loader = Loader()
    cache = make_cache(100, loader)
    want(cache, "a", "a", "a")
    assert settle(cache) == [("a", True)] and loader.loaded == ["a"]


def test_the_least_recently_used_idle_adapter_is_dropped_first_and_wanted_ones_never() -> None:
    cache = make_cache(20, Loader())
    want(cache, "a", "b", "c")
    assert settle(cache) == [("a", True), ("b", True)]
    assert cache.used_bytes == 20 and cache.num_queued == 1, "wanted ones stay, the rest waits"
    assert cache.release("b") == []
    assert cache.advance(EMPTY) == ["b"]
    assert settle(cache) == [("c", True)]
    want(cache, "a")
    assert cache.release("a") == cache.release("a") == cache.release("c") == []
    want(cache, "a")
    cache.release("a")
    want(cache, "d")
    assert cache.advance(EMPTY) == ["c"], "a was wanted again after c"


def test_one_that_is_wanted_often_outlives_a_later_one() -> None:
    cache = make_cache(20, Loader())
    want(cache, "a", "a", "a", "b")
    settle(cache)
    for digest in "aaab":
        cache.release(digest)
    want(cache, "c")
    assert cache.advance(EMPTY) == ["b"], "a was wanted three times"
    settle(cache)


def test_adapters_are_loaded_in_the_order_of_the_queue() -> None:
    loader = Loader()
    cache = make_cache(10, loader)
    want(cache, *"abcdef")
    for digest in "abcdef":
        assert settle(cache) == [(digest, True)]
        assert cache.used_bytes == 10
        cache.release(digest)
    assert loader.loaded == list("abcdef")


def test_those_that_no_request_wants_any_more_are_never_loaded() -> None:
    cache = make_cache(10, loader := Loader())
    want(cache, "a", "b", "c")
    settle(cache)
    cache.release("b")
    cache.release("a")
    assert settle(cache) == [("c", True)] and loader.loaded == ["a", "c"]


def test_one_that_stays_on_the_device_makes_room_and_comes_back_once_it_is_gone() -> None:
    cache = make_cache(10, Loader())
    want(cache, "a", "b")
    settle(cache)
    assert cache.advance(Device("a")) == ["a"]
    wait([cache._entries["b"].future], 30)  # type: ignore[list-item]
    assert [loaded.digest for loaded in cache.poll()] == ["b"]
    want(cache, "c")
    assert cache.advance(EMPTY) == [], "preempted: it is the first to be loaded again"
    cache.release("b")
    assert settle(cache) == [("a", True)]


def test_copies_of_what_stays_on_the_device_go_before_what_is_nowhere_else() -> None:
    cache = make_cache(40, Loader())
    want(cache, *"aaabbcdd")
    settle(cache)
    for digest in "aaabbcdd":
        cache.release(digest)
    want(cache, "e")
    assert cache.advance(Device("ab", "d")) == ["a"], "the most wanted one leaves the device last"
    wait([cache._entries["e"].future], 30)  # type: ignore[list-item]
    cache.poll()
    want(cache, "a", "f")
    assert cache.advance(Device("ab", "d")) == ["b"]
    assert not cache._loading.keys() & {"a"}, "the device has it"


def test_an_adapter_over_the_bound_is_loaded_alone() -> None:
    cache = make_cache(5, Loader())
    want(cache, "a", "b")
    assert settle(cache) == [("a", True)]
    assert cache.release("a") == ["a"]
    assert settle(cache) == [("b", True)]


def test_a_failed_load_is_reported_and_may_be_tried_again() -> None:
    loader = Loader()
    cache = make_cache(20, loader)
    want(cache, "bad")
    assert settle(cache) == [("bad", False)]
    want(cache, "bad")
    assert settle(cache) == [("bad", False)] and loader.loaded == ["bad", "bad"]


def test_releasing_more_often_than_wanting_fails() -> None:
    cache = make_cache(20, Loader())
    want(cache, "a", "a")
    settle(cache)
    cache.release("a")
    cache.release("a")
    with pytest.raises(AssertionError, match="more often"):
        cache.release("a")


def test_an_idle_engine_is_woken_when_a_load_ends() -> None:
    woken = threading.Event()
    cache = HostCache(20, Loader(), woken.set)
    want(cache, "a")
    cache.advance(EMPTY)
    assert woken.wait(30)


class ManualPool:
    """In place of the threads: loads end when the test says so."""

    def __init__(self) -> None:
        self.running: list[tuple[Future[LoraWeights], AdapterFolder]] = []

    def submit(self, load: object, adapter: AdapterFolder) -> Future[LoraWeights]:
        self.running.append((Future(), adapter))
        return self.running[-1][0]


SIZES = {"a": 3, "b": 4, "c": 5, "d": 6, "e": 12}  # the last is larger than the bound
BOUND = 10
DIGESTS = st.sampled_from(sorted(SIZES))


class Queue(RuleBasedStateMachine):
    """Requests come, run and leave in any order; the device holds what they run with."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ManualPool()
        self.cache = HostCache(BOUND, Loader(), expected_bytes=lambda a: SIZES[a.digest])
        self.cache.close()
        self.cache._pool = self.pool  # type: ignore[assignment]
        self.waiting: list[str] = []
        self.running: list[str] = []
        self.ready: set[str] = set()
        self.device = Device()

    def start(self, digest: str) -> bool:
        """Let a waiting request run, if its adapter is in memory."""
        if digest not in self.ready and not self.device.is_loaded(digest):
            return False
        self.waiting.remove(digest)
        self.running.append(digest)
        self.device.kept.add(digest)
        self.device.goes.discard(digest)
        return True

    @rule(digest=DIGESTS)
    def come(self, digest: str) -> None:
        self.cache.want(AdapterFolder(digest, ""))
        self.waiting.append(digest)

    @rule()
    def advance(self) -> None:
        self.ready.difference_update(self.cache.advance(self.device))

    @rule(data=st.data(), is_gone=st.booleans())
    def age(self, data: st.DataObject, is_gone: bool) -> None:
        """One that nobody runs with is to leave the device soon, or does."""
        idle = sorted((self.device.kept | self.device.goes) - set(self.running))
        if idle:
            digest = data.draw(st.sampled_from(idle))
            self.device.kept.discard(digest)
            (self.device.goes.discard if is_gone else self.device.goes.add)(digest)

    @precondition(lambda self: self.pool.running)
    @rule(is_damaged=st.booleans(), number=st.integers(0, 1))
    def end_a_load(self, is_damaged: bool, number: int) -> None:
        future, adapter = self.pool.running.pop(number % len(self.pool.running))
        digest = adapter.digest
        if is_damaged:
            future.set_exception(OSError("unreadable"))
        else:
            future.set_result(LoraWeights(digest, {}, SIZES[digest]))
        (loaded,) = self.cache.poll()
        assert loaded.digest == digest and (loaded.error is not None) == is_damaged
        if not is_damaged:
            self.ready.add(digest)
            return
        assert self.cache.release(digest) == []
        self.waiting = [d for d in self.waiting if d != digest]
        self.running = [d for d in self.running if d != digest]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        self.start(data.draw(st.sampled_from(self.waiting)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.running))
        self.running.remove(digest)
        self.waiting.insert(0, digest)

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.waiting + self.running))
        (self.waiting if digest in self.waiting else self.running).remove(digest)
        self.ready.difference_update(self.cache.release(digest))

    @invariant()
    def the_bound_holds(self) -> None:
        held = [*self.ready, *(adapter.digest for _, adapter in self.pool.running)]
        assert self.cache.used_bytes == sum(SIZES[digest] for digest in held)
        assert self.cache.used_bytes <= BOUND or held == ["e"]
        for digest in self.ready:
            assert self.cache.get(digest).digest == digest

    def teardown(self) -> None:
        """Every request gets its turn, whatever happened before."""
        for _ in range(len(self.waiting) + len(self.running) + len(self.pool.running) + 5):
            self.advance()
            while self.pool.running:
                self.end_a_load(is_damaged=False, number=0)
            for digest in self.waiting.copy():
                self.start(digest)
            if self.running:
                self.ready.difference_update(self.cache.release(self.running.pop()))
        assert not self.waiting and not self.running


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
