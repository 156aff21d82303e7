"""Tests HostCache: loads in other threads, keeps wanted adapters, bounds the bytes."""

import threading
from concurrent.futures import wait

import pytest

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


def settle(cache: HostCache) -> list[tuple[str, bool]]:
    wait([entry.future for entry in cache._entries.values()], 30)
    return [(loaded.digest, loaded.error is None) for loaded in cache.poll()]


def want(cache: HostCache, *digests: str) -> None:
    for digest in digests:
        cache.want(AdapterFolder(digest, ""))


def test_wanting_returns_before_the_load_ends_and_poll_reports_it_once() -> None:
    loader = Loader()
    loader.gate.clear()
    cache = HostCache(100, loader)
    want(cache, "a")
    assert cache.poll() == []
    loader.gate.set()
    assert settle(cache) == [("a", True)]
    assert cache.poll() == [] and cache.get("a").digest == "a"


def test_an_adapter_wanted_by_many_is_loaded_once() -> None:
    loader = Loader()
    cache = HostCache(100, loader)
    want(cache, "a", "a", "a")
    assert settle(cache) == [("a", True)] and loader.loaded == ["a"]


def test_the_least_recently_used_idle_adapter_is_dropped_first_and_wanted_ones_never() -> None:
    cache = HostCache(20, Loader())
    want(cache, "a", "b", "c")
    settle(cache)
    assert cache.used_bytes == 30, "wanted ones stay, whatever the bound"
    assert cache.release("b") == ["b"]
    want(cache, "a")
    assert cache.release("a") == [] and cache.release("a") == []
    want(cache, "d")
    settle(cache)
    assert cache.release("c") == ["c"], "a was wanted again after c"


def test_a_failed_load_is_reported_and_may_be_tried_again() -> None:
    loader = Loader()
    cache = HostCache(20, loader)
    want(cache, "bad")
    assert settle(cache) == [("bad", False)]
    want(cache, "bad")
    assert settle(cache) == [("bad", False)] and loader.loaded == ["bad", "bad"]


def test_releasing_more_often_than_wanting_fails() -> None:
    cache = HostCache(20, Loader())
    want(cache, "a")
    settle(cache)
    cache.release("a")
    with pytest.raises(AssertionError, match="more often"):
        cache.release("a")


def test_an_idle_engine_is_woken_when_a_load_ends() -> None:
    woken = threading.Event()
    cache = HostCache(20, Loader(), woken.set)
    want(cache, "a")
    assert woken.wait(30)
