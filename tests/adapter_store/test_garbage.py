"""Collecting garbage frees what nothing needs, and never anything that a name leads to."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import followed_log
from adapter_store.blobs import Blobs, file_key
from adapter_store.errors import AdapterNotFound, SourceUnavailable, StoreCorrupt
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import MANIFEST_NAME
from adapter_store.names import Place
from adapter_store.record_log import log_key, snapshot_key
from adapter_store.registry import Registry
from tests.adapter_store.memory_store import Memory, MemoryStore
from tests.adapter_store.publisher import Publisher, served
from tests.adapter_store.roots import Root
from tests.adapter_store.synthetic import synthetic

on_files = pytest.mark.parametrize("root", ["file"], indirect=True)
DIGESTS = [synthetic(seed)[0].digest for seed in range(8)]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def new(memory: Memory, tmp_path: Path) -> Callable[[], Publisher]:
    return lambda: Publisher(MemoryStore(memory), tmp_path)


@pytest.fixture
def one(new: Callable[[], Publisher]) -> Publisher:
    return new()


@pytest.fixture
def short_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed_log, "SNAPSHOT_EVERY", 4)


def now(publisher: Publisher, when: str, act: Callable[[], object], key: str = "") -> None:
    """Have `act` run just before the publisher's first request of this method and key."""
    store = publisher.objects
    assert isinstance(store, MemoryStore)

    def hook(method: str, asked: str) -> None:
        if method == when and key in asked:
            store.hook = lambda *_: None
            act()

    store.hook = hook


def keys(memory: Memory, prefix: str) -> list[str]:
    return sorted(key for key in memory.objects if key.startswith(prefix))


# ---- files -------------------------------------------------------------------------------------


@on_files
def test_files_are_kept_while_any_live_version_has_them(root: Root, tmp_path: Path) -> None:
    one = Publisher(root.open(), tmp_path)
    one.publish("a", 0)
    one.publish("b", 0)
    one.publish("b", 1)
    one.registry.alias("t", "a", "prod", 1)
    one.registry.retire("t", "b")
    before = served(root.open())
    removed = one.collect()
    assert removed.places == {Place(DIGESTS[1], 0)}
    assert removed.nbytes == sum(len(data) for data in synthetic(1)[1].values())
    assert (
        served(root.open()) == before == {"a@1": DIGESTS[0], "a": DIGESTS[0], "a@prod": DIGESTS[0]}
    )
    assert not [key for key in root.objects() if DIGESTS[1] in key]
    assert one.collect().objects == []
    one.registry.retire("t", "a@1")
    assert one.collect().places == {Place(DIGESTS[0], 0)}
    assert not [key for key in root.objects() if key.startswith("blobs/")]


def test_content_that_was_removed_can_be_published_again(root: Root, tmp_path: Path) -> None:
    one = Publisher(root.open(), tmp_path)
    one.publish("a", 0)
    one.registry.retire("t", "a")
    one.collect()
    ref = one.publish("a", 0)
    assert (ref.version, ref.digest) == (2, DIGESTS[0])
    assert served(root.open()) == {"a@2": DIGESTS[0], "a": DIGESTS[0]}
    assert {key.split("/")[1] for key in root.objects() if "blobs" in key} == {f"{DIGESTS[0]}.1"}
    other = Publisher(root.open(), tmp_path)
    other.publish("b", 0)  # shares the files
    assert other.collect().objects == []
    late = Blobs(
        root.open()
    )  # knows no name, as a replica that is asked before it has read the log
    assert late.manifest(Place(DIGESTS[0], 0)).digest == DIGESTS[0]
    late.download(Place(DIGESTS[0], 0), WEIGHTS_NAME, tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == synthetic(0)[1][WEIGHTS_NAME]


def test_files_are_spared_for_a_while_after_upload_and_after_retirement(
    one: Publisher, memory: Memory
) -> None:
    one.publish("a", 0)
    memory.now_s += 1000
    one.publish("b", 1)
    one.registry.retire("t", "a")
    memory.now_s += 49
    one.registry.retire("t", "b")
    assert one.collect(50).files == []
    memory.now_s += 1
    assert one.collect(50).places == {Place(DIGESTS[0], 0)}
    memory.now_s += 48
    assert one.collect(50).files == []
    memory.now_s += 1
    assert one.collect(50).places == {Place(DIGESTS[1], 0)}


def test_an_upload_without_a_record_is_spared_for_a_while(
    one: Publisher, new: Callable[[], Publisher], memory: Memory
) -> None:
    now(one, "put_if_absent", lambda: new().collect(50), "log/")
    one.publish("a", 0)
    assert keys(memory, f"blobs/{DIGESTS[0]}/") != []
    place = Place(DIGESTS[1], 0)
    one.objects.put(file_key(place, WEIGHTS_NAME), b"the upload ended here")
    assert one.collect(50).files == []
    memory.now_s += 50
    assert one.collect(50).places == {place}
    assert served(MemoryStore(memory)) == {"a@1": DIGESTS[0], "a": DIGESTS[0]}


def test_a_collection_between_upload_and_record_makes_the_upload_again(
    one: Publisher, new: Callable[[], Publisher], memory: Memory
) -> None:
    now(one, "put_if_absent", lambda: new().collect(), "log/")
    one.publish("a", 0)
    assert served(MemoryStore(memory)) == {"a@1": DIGESTS[0], "a": DIGESTS[0]}
    assert one.registry.place_of(DIGESTS[0]) == Place(DIGESTS[0], 1)


def test_unneeded_files_that_a_publisher_has_just_found_are_uploaded_again(
    one: Publisher, new: Callable[[], Publisher], memory: Memory
) -> None:
    one.publish("a", 0)
    one.registry.retire("t", "a")
    memory.now_s += 10**6
    now(one, "put_if_absent", lambda: new().collect(10**5), "log/")  # it has looked at their sizes
    one.publish("b", 0)
    assert served(MemoryStore(memory)) == {"b@1": DIGESTS[0], "b": DIGESTS[0]}


@pytest.mark.parametrize("when", ["check_writes", "put_if_absent", "remove"])
def test_a_collector_that_slept_removes_nothing_that_is_published_meanwhile(
    when: str, one: Publisher, new: Callable[[], Publisher], memory: Memory
) -> None:
    one.publish("a", 0)
    one.registry.retire("t", "a")
    sleeper = new()
    now(sleeper, when, lambda: (one.publish("b", 0), one.collect()))
    sleeper.collect()
    assert served(MemoryStore(memory)) == {"b@1": DIGESTS[0], "b": DIGESTS[0]}


def test_files_that_a_stopped_collector_left_need_no_further_record(
    one: Publisher, new: Callable[[], Publisher], memory: Memory
) -> None:
    one.publish("a", 0)
    one.registry.retire("t", "a")

    def stop() -> None:
        raise KeyboardInterrupt

    now(one, "remove", stop)
    with pytest.raises(KeyboardInterrupt):
        one.collect()
    num_records = len(keys(memory, "log/"))
    assert new().collect().places == {Place(DIGESTS[0], 0)}
    assert len(keys(memory, "log/")) == num_records
    assert keys(memory, "blobs/") == []


def test_what_is_no_file_of_an_adapter_stays(one: Publisher, memory: Memory) -> None:
    strange = [
        *(
            "blobs/readme.txt",
            f"blobs/{DIGESTS[0]}/notes.txt",
            f"blobs/{DIGESTS[0]}.0/{MANIFEST_NAME}",
        ),
        *(f"blobs/{DIGESTS[0]}.01/{MANIFEST_NAME}", f"blobs/{'0' * 63}/{MANIFEST_NAME}", "other"),
        *("bases/b.json", "snapshots/readme.txt"),
    ]
    for key in strange:
        one.objects.put(key, b"")
    one.collect()
    assert sorted(memory.objects) == sorted(strange)


# ---- log and snapshots -------------------------------------------------------------------------


def fill(publisher: Publisher, num_records: int) -> None:
    """Append records, of which the last retires what the others have published."""
    for n in range(num_records - 1):
        publisher.publish("filler", n % 8)
    publisher.registry.retire("t", "filler")


@pytest.mark.usefixtures("short_log")
@on_files
def test_what_two_snapshots_stand_for_is_removed(root: Root, tmp_path: Path) -> None:
    one = Publisher(root.open(), tmp_path)
    one.publish("a", 0)
    fill(one, 13)
    before = served(root.open())
    removed = one.collect()
    assert [len(removed.records), len(removed.snapshots)] == [8, 1]
    objects = root.objects()
    assert [key for key in objects if "log/" in key] == [log_key(n) for n in range(9, 16)]
    assert [key for key in objects if "snap" in key] == [snapshot_key(8), snapshot_key(12)]
    assert served(root.open()) == before
    assert Publisher(root.open(), tmp_path).publish("filler", 0).version == 13


@pytest.mark.usefixtures("short_log")
def test_the_log_stays_short(one: Publisher, memory: Memory) -> None:
    for n in range(30):
        one.publish("a", n % 8)
        one.registry.retire("t", f"a@{n + 1}")
        one.collect()
        assert len(keys(memory, "log/")) <= 12 and len(keys(memory, "snapshots/")) <= 3
        assert len(keys(memory, "blobs/")) == 0
    assert served(MemoryStore(memory)) == {}


@pytest.mark.usefixtures("short_log")
def test_records_and_snapshots_are_spared_for_a_while(one: Publisher, memory: Memory) -> None:
    fill(one, 14)
    assert one.collect(50).objects == []
    memory.now_s += 50
    assert len(one.collect(50).records) == 8


@pytest.mark.usefixtures("short_log")
@pytest.mark.parametrize("num_read", range(12))
def test_a_reader_that_lagged_goes_on_from_a_snapshot(
    num_read: int, one: Publisher, new: Callable[[], Publisher], caplog: pytest.LogCaptureFixture
) -> None:
    one.publish("a", 0)
    for n in range(num_read):
        one.publish("b", n % 8)
    reader, writer = new(), new()
    for n in range(14):
        one.publish("c", n % 8)
    one.registry.alias("t", "a", "prod", 1)
    one.collect()
    with caplog.at_level(logging.WARNING):
        reader.registry.refresh()
    assert reader.registry.list() == one.registry.list()
    assert writer.publish("d", 1).version == 1
    assert reader.registry.damage is None and caplog.text == ""


@pytest.mark.usefixtures("short_log")
@pytest.mark.parametrize("when", ["list", "get"])
@pytest.mark.parametrize("key", ["log/", "snapshots/"])
def test_a_start_during_a_collection_finds_every_name(
    when: str, key: str, one: Publisher, memory: Memory, tmp_path: Path
) -> None:
    one.publish("a", 0)
    fill(one, 9)
    store = MemoryStore(memory)
    calls = 0

    def hook(method: str, asked: str) -> None:
        nonlocal calls
        if method == when and key in asked and calls < 3:
            calls += 1
            fill(one, 9)
            one.collect()

    store.hook = hook
    reader = Registry(store, wall_clock=lambda: 0.0)
    assert calls and reader.damage is None
    assert reader.resolve("t", "a").digest == DIGESTS[0]


@pytest.mark.usefixtures("short_log")
@pytest.mark.parametrize(("num_before", "num_more"), [(1, 10), (2, 9), (3, 5), (3, 6), (3, 20)])
def test_a_record_in_a_place_that_became_free_counts_for_nobody(
    num_before: int,
    num_more: int,
    one: Publisher,
    new: Callable[[], Publisher],
    memory: Memory,
) -> None:
    one.publish("a", 0)
    for n in range(num_before - 1):
        one.publish("b", n)
    lagging, sleeper = new(), new()
    place = log_key(num_before + 1)

    def meanwhile() -> None:
        one.registry.retire("t", "a")
        fill(one, num_more - 1)
        one.collect()
        assert place not in memory.objects

    now(sleeper, "put_if_absent", meanwhile, "log/")
    with pytest.raises(SourceUnavailable, match="whether it counts is not known"):
        sleeper.registry.alias("t", "a", "prod", 1)
    assert place in memory.objects
    for reader in (lagging.registry, sleeper.registry, new().registry):
        reader.refresh()
        assert reader.list() == one.registry.list()
        with pytest.raises(AdapterNotFound):
            reader.resolve("t", "a@prod")
    assert lagging.publish("c", 1).version == 1
    assert place in [each.key for each in one.collect().records]


@pytest.mark.usefixtures("short_log")
def test_a_snapshot_that_is_damaged_loses_no_name(
    one: Publisher, new: Callable[[], Publisher], memory: Memory
) -> None:
    one.publish("a", 0)
    fill(one, 13)
    one.collect()
    before = served(MemoryStore(memory))
    one.objects.put(snapshot_key(12), b"damaged")
    assert served(MemoryStore(memory)) == before
    fill(one, 3)  # and snapshot 16
    removed = new().collect()
    assert removed.records == [] and removed.snapshots == [], "12 does not count as the second"
    assert served(MemoryStore(memory)) == before


@pytest.mark.usefixtures("short_log")
def test_a_snapshot_of_other_records_stands_for_nothing(one: Publisher, memory: Memory) -> None:
    fill(one, 13)
    data = json.loads(gzip.decompress(one.objects.get(snapshot_key(8))))
    data["adapters"][0]["versions"][0]["digest"] = DIGESTS[7]
    one.objects.put(snapshot_key(8), gzip.compress(json.dumps(data).encode()))
    assert len(one.collect().records) == 4


@pytest.mark.usefixtures("short_log")
def test_a_snapshot_that_a_writer_failed_to_write_is_made_up_for(
    one: Publisher, memory: Memory
) -> None:
    fill(one, 3)
    for n in range(5):
        one.publish("b", n)
        memory.objects.pop(snapshot_key(4), None)
        memory.objects.pop(snapshot_key(8), None)
    assert keys(memory, "snapshots/") == []
    one.collect()
    assert keys(memory, "snapshots/") == [snapshot_key(8)]


# ---- refusals ----------------------------------------------------------------------------------


def test_nothing_is_removed_from_a_store_with_a_damaged_log(one: Publisher, memory: Memory) -> None:
    one.publish("a", 0)
    one.registry.retire("t", "a")
    one.objects.put(log_key(3), b"{}")
    before = memory.copy()
    with pytest.raises(StoreCorrupt, match=log_key(3)):
        one.collect()
    assert memory == before


def test_finding_writes_nothing(one: Publisher, memory: Memory) -> None:
    one.publish("a", 0)
    one.registry.retire("t", "a")
    before = memory.copy()
    assert one.collector.find(0).places == {Place(DIGESTS[0], 0)}
    assert memory == before
