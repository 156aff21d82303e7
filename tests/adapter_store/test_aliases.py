"""Aliases of several versions: what is allowed, what is kept, and who may change them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapter_store.aliases import Alias, Trial
from adapter_store.catalog import Catalog
from adapter_store.errors import AdapterNotFound, InvalidName, InvalidShares, StoreCorrupt
from adapter_store.registry import Registry
from adapter_store.trial_counts import TrialCounts
from tests.adapter_store.memory_store import Memory, MemoryStore
from tests.adapter_store.publisher import Publisher


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def one(memory: Memory, tmp_path: Path) -> Publisher:
    publisher = Publisher(MemoryStore(memory), tmp_path)
    for seed in range(3):
        publisher.publish("sql", seed)
    return publisher


def shares(registry: Registry, which: str = "shares") -> dict[int, float]:
    view = registry.alias_view("t", "sql@prod")
    assert view is not None
    return {ref.version: weight for ref, weight in getattr(view, which)}


def test_versions_share_an_alias_by_weight_and_each_move_says_what_was_before(
    one: Publisher, memory: Memory
) -> None:
    registry = one.registry
    assert registry.alias_view("t", "sql@prod") is None
    registry.alias("t", "sql", "prod", 1)
    registry.share("t", "sql", "prod", {1: 95, 3: 5}, Trial(3), by="ann")
    other = Registry(MemoryStore(memory), lambda: 0.0)
    registry.save_snapshot()
    from_snapshot = Registry(MemoryStore(memory), lambda: 0.0)
    for reader in (registry, other, from_snapshot):
        assert (shares(reader), shares(reader, "before")) == ({1: 95, 3: 5}, {1: 1})
        view = reader.alias_view("t", "sql@prod")
        assert view is not None and view.trial == Trial(3) and view.record == view.began == 5
        assert view.moved_s == 12.5 and view.flip == ""
        assert reader.resolve("t", "sql@prod").version == 1, "the heaviest"
        assert [r.aliases for r in reader.list("t")] == [("prod",), (), ("latest", "prod")]
    assert registry.alias_view("t", "sql@2") is registry.alias_view("t", "sql") is None


def test_a_trial_goes_on_while_its_versions_are_the_same(one: Publisher) -> None:
    def began_after(weights: Mapping[int, float], trial: Trial | None) -> tuple[int, int]:
        one.registry.share("t", "sql", "prod", weights, trial)
        view = one.registry.alias_view("t", "sql@prod")
        assert view is not None
        return view.record, view.began

    assert began_after({1: 95, 3: 5}, Trial(3)) == (4, 4)
    assert began_after({1: 50, 3: 50}, Trial(3, alpha=0.01)) == (5, 4)
    assert began_after({1: 50, 3: 50}, Trial(1)) == (6, 6)
    assert began_after({1: 50, 2: 50}, Trial(1)) == (7, 7)
    assert began_after({1: 50, 2: 50}, None) == (8, 0)


@pytest.mark.parametrize(
    ("weights", "trial", "words"),
    [
        ({}, None, "has 1 to 8 versions, not 0"),
        (dict.fromkeys(range(1, 10), 1), None, "has 1 to 8 versions, not 9"),
        ({1: 0, 2: 0}, None, "must not all be 0"),
        ({1: -1, 2: 5}, None, r"weight of version 1 must be in \[0, 1e\+06\], not -1"),
        ({1: float("nan")}, None, "weight of version 1 must be in"),
        ({1: 2e6}, None, "weight of version 1 must be in"),
        ({1: 1, 2: 1}, {"candidate": 3}, "candidate 3 is none of the alias' versions"),
        ({1: 1, 2: 1, 3: 1}, {"candidate": 3}, "a trial needs two versions"),
        ({1: 1, 2: 0}, {"candidate": 2}, "a trial needs two versions, each with a weight above 0"),
        ({1: 1, 2: 1}, {"candidate": 2, "alpha": 0.9}, r"alpha must be in \[1e-06, 0.5\], not 0.9"),
        ({1: 1, 2: 1}, {"candidate": 2, "max_requests": 9}, "must be at least min_requests 50"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_shared_is_refused_and_leaves_nothing(
    one: Publisher,
    memory: Memory,
    weights: dict[int, float],
    trial: dict[str, Any] | None,
    words: str,
) -> None:
    before = dict(memory.objects)
    with pytest.raises(InvalidShares, match=words):
        one.registry.share("t", "sql", "prod", weights, None if trial is None else Trial(**trial))
    assert memory.objects == before


def test_only_live_versions_of_one_base_share_an_alias(one: Publisher) -> None:
    one.registry.retire("t", "sql@2")
    for version in (2, 9):
        with pytest.raises(AdapterNotFound):
            one.registry.share("t", "sql", "prod", {1: 1, version: 1})
    catalog = Catalog()
    for version in (1, 2):
        record = {"kind": "publish", "tenant": "t", "name": "a", "version": version}
        more = {"digest": f"d{version}", "base": f"b{version}", "lora_rank": 1, "nbytes": 1}
        catalog.apply(record | more | {"published_s": 1.0})
    one.registry._catalog = catalog
    one.registry.refresh = lambda: None  # type: ignore[method-assign]
    with pytest.raises(InvalidShares, match="must have one base: 1 of base b1, 2 of base b2"):
        one.registry.share("t", "a", "prod", {1: 1, 2: 1})


def test_of_those_who_conclude_the_same_one_does_it(one: Publisher, memory: Memory) -> None:
    one.registry.share("t", "sql", "prod", {1: 95, 3: 5}, Trial(3))
    other = Registry(MemoryStore(memory), lambda: 0.0)
    why = {"outcome": "promote"}
    done = [
        registry.share("t", "sql", "prod", {3: 1}, expected=4, because=why)
        for registry in (one.registry, other, one.registry)
    ]
    assert done == [True, False, False]
    assert not other.share("t", "sql", "new", {3: 1}, expected=4), "there is no such alias"
    assert one.registry.num_records == 5
    assert shares(other) == {3: 1}


def test_how_new_versions_were_waited_for_is_noted_once_and_for_the_latest_move(
    one: Publisher,
) -> None:
    registry = one.registry
    registry.alias("t", "sql", "prod", 1)
    first = registry.alias_view("t", "sql@prod")
    assert first is not None
    assert registry.note_flip(first, "resident", {"replicas": 2})
    assert not registry.note_flip(first, "late", {})
    registry.alias("t", "sql", "prod", 2)
    assert not registry.note_flip(first, "late", {})
    view = registry.alias_view("t", "sql@prod")
    assert view is not None and view.flip == ""


def test_retired_versions_leave_the_others_and_an_alias_of_several_names_none(
    one: Publisher,
) -> None:
    registry = one.registry
    registry.share("t", "sql", "prod", {1: 10, 2: 60, 3: 30})
    for refused in (registry.retire, registry.delete):
        with pytest.raises(InvalidName, match="'sql@prod' means the versions 1, 2, 3: name one"):
            refused("t", "sql@prod")
    registry.retire("t", "sql@2")
    assert shares(registry) == {1: 10, 3: 30}
    assert registry.resolve("t", "sql@prod").version == 3
    registry.retire("t", "sql@1")
    registry.retire("t", "sql@prod")
    assert shares(registry) == {}
    with pytest.raises(AdapterNotFound):
        registry.resolve("t", "sql@prod")


def test_snapshots_of_before_are_read_and_damaged_records_are_refused(one: Publisher) -> None:
    assert Alias.from_data(2) == Alias({2: 1.0})
    catalog = one.registry._catalog
    head = {"kind": "alias", "tenant": "t", "name": "sql", "alias": "prod"}
    for wrong in ({"versions": {}}, {"versions": {"1": -1}}, {"versions": {"x": 1}}, {}):
        with pytest.raises(StoreCorrupt):
            catalog.apply(head | wrong)
    with pytest.raises(StoreCorrupt):
        catalog.apply(head | {"versions": {"1": 1, "2": 1}, "trial": {"candidate": 2}})
    assert catalog.alias_view("t", "sql@prod") is None


def test_counts_of_a_trial_are_those_of_all_but_one_until_it_ends(memory: Memory) -> None:
    counts = TrialCounts(MemoryStore(memory))
    counts.put(7, "a", b"1")
    counts.put(7, "a", b"2")
    counts.put(7, "b", b"3")
    counts.put(70, "c", b"4")
    assert (counts.read(7), counts.read(7, "a")) == ([b"2", b"3"], [b"3"])
    counts.remove(7)
    assert counts.read(7) == [] and counts.read(70) == [b"4"]


def test_a_collection_takes_the_counts_of_trials_that_are_over(
    one: Publisher, memory: Memory
) -> None:
    one.registry.share("t", "sql", "prod", {1: 95, 3: 5}, Trial(3))
    counts = TrialCounts(one.objects)
    counts.put(4, "a", b"going on")
    counts.put(2, "a", b"over")
    assert [each.key for each in one.collector.find(1000).counts] == []
    one.collect()
    assert (counts.read(4), counts.read(2)) == ([b"going on"], [])
