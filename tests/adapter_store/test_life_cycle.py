"""Versions are retired, restored and deleted, and the audit log says by whom, also after `gc`."""

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import followed_log
from adapter_store.audit import AuditLog
from adapter_store.errors import (
    AdapterNotFound,
    FilesRemoved,
    InvalidName,
    LimitExceeded,
    StoreCorrupt,
)
from adapter_store.limits import PublishLimits
from adapter_store.listing import Position, Wanted, page_of, parse_position
from adapter_store.record_log import log_key
from adapter_store.store import AdapterStore
from tests.adapter_store.adapters import changed
from tests.adapter_store.memory_store import Memory, MemoryStore
from tests.adapter_store.publisher import Publisher, prepare_synthetic, served
from tests.adapter_store.synthetic import synthetic

on_files = pytest.mark.parametrize("root", ["file"], indirect=True)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def one(memory: Memory, tmp_path: Path) -> Publisher:
    publisher = Publisher(MemoryStore(memory), tmp_path)
    publisher.publish("sql", 0)
    publisher.publish("sql", 1)
    return publisher


# ---- retire, restore, delete ---------------------------------------------------------------


def test_a_restored_version_answers_as_before_by_all_its_names(
    one: Publisher, memory: Memory
) -> None:
    one.registry.alias("t", "sql", "prod", 2)
    before = served(MemoryStore(memory))
    one.registry.retire("t", "sql@2")
    assert served(MemoryStore(memory))["sql"] == synthetic(0)[0].digest
    assert one.restore("sql@2").version == 2
    assert served(MemoryStore(memory)) == before
    assert one.restore("sql@2").version == 2, "what is live stays so"


def test_a_version_is_restored_after_a_collection_that_spared_its_files(
    one: Publisher, memory: Memory, tmp_path: Path
) -> None:
    """Files of an earlier generation may go at any time, so they are copied."""
    before = served(MemoryStore(memory))
    garbage = one.collector
    one.registry.retire("t", "sql@1")
    found = garbage.find(0)
    one.registry.begin_generation()
    one.restore("sql@1")
    garbage.remove(found, lambda _: None)
    assert served(MemoryStore(memory)) == before


def test_what_was_collected_or_deleted_is_not_restored(one: Publisher) -> None:
    one.registry.retire("t", "sql@1")
    one.collect()
    with pytest.raises(FilesRemoved, match="sql@1 of tenant t cannot be restored"):
        one.restore("sql@1")
    assert one.registry.delete("t", "sql@2") == (2,)
    with pytest.raises(AdapterNotFound, match="sql@2' of tenant t was deleted"):
        one.restore("sql@2")
    with pytest.raises(AdapterNotFound, match="has no adapter 'sql@2'"):
        one.registry.delete("t", "sql@2")
    for wrong, error in (("sql", InvalidName), ("sql@x", InvalidName), ("sql@9", AdapterNotFound)):
        with pytest.raises(error):
            one.restore(wrong)


def test_deletion_takes_all_versions_of_a_name_and_frees_their_files(
    one: Publisher, memory: Memory
) -> None:
    one.registry.retire("t", "sql@1")
    assert one.registry.delete("t", "sql") == (1, 2)
    assert len(one.collect().places) == 2
    assert not [key for key in memory.objects if key.startswith("blobs/")]
    assert one.publish("sql", 0).version == 3, "numbers are not used again"


def test_a_reader_from_a_snapshot_knows_what_is_retired_and_deleted(
    one: Publisher, memory: Memory
) -> None:
    one.publish("sql", 2)
    one.registry.retire("t", "sql@1")
    one.registry.delete("t", "sql@2")
    one.registry.save_snapshot()
    other = Publisher(MemoryStore(memory), Path())
    states = [record.state for record in other.registry.versions_of("t", "sql")]
    assert states == ["retired", "deleted", "live"]
    assert other.registry.num_live("t") == one.registry.num_live("t") == 1


# ---- limits --------------------------------------------------------------------------------


def test_what_is_beyond_a_limit_leaves_nothing(one: Publisher, memory: Memory) -> None:
    before = dict(memory.objects)
    for limits, words in (
        (PublishLimits(max_lora_rank=3), "its rank 4 is above the limit of 3"),
        (PublishLimits(max_versions=2), "tenant t has 2 live versions, and the limit is 2"),
    ):
        with pytest.raises(LimitExceeded, match=words):
            one.publish("new", 5, limits=limits)
        assert memory.objects == before
    room = PublishLimits(max_lora_rank=4, max_versions=2)
    assert one.publish("sql", 1, limits=room).version == 2, "what is there needs no room"
    one.registry.retire("t", "sql@1")
    assert one.publish("new", 5, limits=room).version == 1
    with pytest.raises(LimitExceeded):
        one.registry.restore("t", "sql", 1, 0, limits=room)


def test_bytes_count_over_all_live_versions_also_after_a_snapshot(
    one: Publisher, memory: Memory, tmp_path: Path
) -> None:
    stored = sum(record.nbytes for record in one.registry.list("t"))
    each = max(record.nbytes for record in one.registry.list("t"))
    one.registry.save_snapshot()
    other = Publisher(MemoryStore(memory), tmp_path / "other")
    room = PublishLimits(max_bytes=stored + each + each // 2)
    assert other.publish("new", 5, limits=room).version == 1
    with pytest.raises(LimitExceeded, match="max_stored_bytes"):
        other.publish("more", 6, limits=room)
    other.registry.retire("t", "new@1")
    assert other.publish("more", 6, limits=room).version == 1
    with pytest.raises(LimitExceeded):
        other.registry.restore("t", "new", 1, 0, limits=room)


def test_of_two_publishers_for_the_last_room_one_gets_it(one: Publisher, tmp_path: Path) -> None:
    """Both have asked before either has uploaded."""
    room = PublishLimits(max_versions=3)
    manifests = [prepare_synthetic(tmp_path, seed).manifest for seed in (4, 5)]
    for number, manifest in enumerate(manifests):
        one.registry.check_room("t", f"n{number}", manifest, room)
    one.registry.publish("t", "n0", manifests[0], limits=room)
    with pytest.raises(LimitExceeded):
        one.registry.publish("t", "n1", manifests[1], limits=room)


# ---- lists ---------------------------------------------------------------------------------


def test_pages_together_hold_what_fits_in_order(one: Publisher) -> None:
    for number in range(5):
        one.publish(f"a{number}", number % 3)
    one.registry.retire("t", "a1")
    one.registry.delete("t", "sql@1")

    def all_of(wanted: Wanted, limit: int) -> list[str]:
        found, after = list[str](), None
        while True:
            page = page_of(one.registry, wanted, after, limit)
            found += [str(Position(r.tenant, r.name, r.version)) for r in page.records]
            if page.next_after is None:
                return found
            after = parse_position(str(page.next_after))

    live = ["t/a0@1", "t/a2@1", "t/a3@1", "t/a4@1", "t/sql@2"]
    for limit in (1, 2, 3, 10):
        assert all_of(Wanted(), limit) == live
        assert all_of(Wanted("t", name="a*", state=None), limit) == [f"t/a{n}@1" for n in range(5)]
    assert all_of(Wanted(state="deleted"), 9) == ["t/sql@1"]
    assert all_of(Wanted(state="retired"), 9) == ["t/a1@1"]
    assert all_of(Wanted("u"), 9) == all_of(Wanted(base="0000"), 9) == []
    assert all_of(Wanted(proof="none"), 9) == live


def test_a_page_that_finds_nothing_looks_at_a_bounded_number(
    one: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_store.listing.MAX_LOOKED_AT", 1)
    page = page_of(one.registry, Wanted(name="x*"), None, 10)
    assert (page.records, page.next_after) == ([], Position("t", "sql", 1))


# ---- audit ---------------------------------------------------------------------------------


@on_files
def test_every_change_says_who_made_it_and_when(
    new_store: Callable[..., AdapterStore], base_folder: Path, peft_folder: Path, tmp_path: Path
) -> None:
    store = new_store(wall_clock=lambda: 77.5)
    base = store.register_base(base_folder)
    second = changed(peft_folder, tmp_path / "second", {"lora_alpha": 3})
    store.publish(peft_folder, "t", "sql", base, by="ann")
    store.publish(second, "u", "sql", base, by="bob")
    store.alias("t", "sql", "prod", 1, by="carl")
    store.retire("t", "sql", by="dora")
    store.restore("t", "sql@1", by="emil")
    store.delete("t", "sql@1", by="fred")
    page = new_store().audit()
    assert [(e.number, e.kind, e.by) for e in reversed(page.entries)] == [
        *((1, "publish", "ann"), (2, "publish", "bob"), (3, "alias", "carl")),
        *((4, "retire", "dora"), (5, "restore", "emil"), (6, "delete", "fred")),
    ]
    assert {e.at_s for e in page.entries} == {77.5} and page.next_before is None
    assert page.entries[3].details == {"alias": "prod", "version": 1}
    first = store.audit(limit=2, tenant="u")
    assert ([e.kind for e in first.entries], first.next_before) == ([], 5)
    assert [e.by for e in store.audit(before=4, limit=3, tenant="u").entries] == ["bob"]
    assert store.versions_of("u", "sql")[0].published_by == "bob"
    with pytest.raises(ValueError, match="limit must be in"):
        store.audit(limit=0)


def test_entries_outlive_the_records_and_are_still_a_chain(
    one: Publisher, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_log, "SNAPSHOT_EVERY", 4)
    for number in range(14):
        one.publish(f"n{number % 3}", number % 4)
    written = {key: raw for key, (raw, _) in memory.objects.items() if key.startswith("log/")}
    assert one.collect().records
    assert log_key(1) not in memory.objects
    page = AuditLog(one.objects).read(one.registry.num_records, 100, None)
    numbers = [entry.number for entry in page.entries]
    assert numbers == list(range(one.registry.num_records, 0, -1))
    raw = AuditLog(one.objects)._archived(numbers)
    assert raw and all(written[log_key(n)].decode() == text for n, text in raw.items())
    digests = {n: hashlib.sha256(text.encode()).hexdigest() for n, text in raw.items()}
    assert all(f'"previous": "{digests[n - 1]}"' in raw[n] for n in raw if n - 1 in raw)


def test_a_damaged_archive_is_named(one: Publisher, memory: Memory) -> None:
    one.objects.put("audit/00000000000000000001-00000000000000000002.json.gz", b"x")
    with pytest.raises(StoreCorrupt, match=r"audit/0+1-0+2\.json\.gz is damaged"):
        AuditLog(one.objects).read(2, 10, None)
    one.objects.put(log_key(2), gzip.compress(b""))
    with pytest.raises(StoreCorrupt):
        AuditLog(one.objects).archive([log_key(2)])
