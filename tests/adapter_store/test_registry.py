"""The log loses nothing, every reader comes to the same state, and names resolve as documented."""

import gzip
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapter_store import followed_log
from adapter_store import registry as names_module
from adapter_store.catalog import Catalog
from adapter_store.errors import (
    AdapterNotFound,
    InvalidName,
    InvalidShares,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.file_store import FileStore
from adapter_store.garbage import Collector
from adapter_store.manifest import AdapterManifest
from adapter_store.names import split_name
from adapter_store.object_store import ObjectStore
from adapter_store.registry import Registry
from tests.adapter_store.roots import Root
from tests.adapter_store.synthetic import BASE, synthetic

M = [synthetic(seed)[0] for seed in range(6)]


class CountingStore:
    """A store that counts the calls which read."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
        self.calls["list"] += 1
        return self._store.list(prefix, start_after)

    def get(self, key: str) -> bytes:
        self.calls["get"] += 1
        return self._store.get(key)

    def get_many(self, keys: Sequence[str]) -> Sequence[bytes]:
        if keys:
            self.calls["get"] += len(keys)
        return self._store.get_many(keys)


on_files = pytest.mark.parametrize("root", ["file"], indirect=True)  # the store plays no part


@pytest.fixture
def store(root: Root) -> CountingStore:
    return CountingStore(root.open())


def open_registry(store: Any) -> Registry:
    return Registry(store, wall_clock=lambda: 12.5)


@pytest.fixture
def registry(store: CountingStore) -> Registry:
    return open_registry(store)


# ---- versions ----------------------------------------------------------------------------------


def test_new_content_under_a_name_is_its_next_version(registry: Registry) -> None:
    refs = [registry.publish("t", "sql", manifest) for manifest in M[:3]]
    assert [ref.version for ref in refs] == [1, 2, 3]
    assert [ref.digest for ref in refs] == [manifest.digest for manifest in M[:3]]
    assert registry.resolve("t", "sql") == registry.resolve("t", "sql@latest") == refs[2]
    assert registry.resolve("t", "sql@1") == refs[0]


def test_the_same_content_under_a_name_is_the_same_version(
    registry: Registry, store: CountingStore
) -> None:
    first = registry.publish("t", "sql", M[0])
    assert registry.publish("t", "sql", M[0]) == first
    assert len(store.list("log/")) == 1


def test_publishing_older_content_again_makes_it_the_latest(registry: Registry) -> None:
    first, second = registry.publish("t", "sql", M[0]), registry.publish("t", "sql", M[1])
    again = registry.publish("t", "sql", M[0])
    assert (again.version, again.digest) == (3, first.digest)
    assert registry.resolve("t", "sql") == again != second


def test_the_same_content_under_another_name_or_tenant_starts_at_one(registry: Registry) -> None:
    registry.publish("t", "sql", M[1])
    refs = [registry.publish(t, n, M[0]) for t, n in (("t", "sql"), ("t", "b"), ("u", "sql"))]
    assert [ref.version for ref in refs] == [2, 1, 1]
    assert len({ref.digest for ref in refs}) == 1


def test_a_retired_version_does_not_resolve_and_its_number_is_not_used_again(
    registry: Registry,
) -> None:
    for manifest in M[:3]:
        registry.publish("t", "sql", manifest)
    assert registry.retire("t", "sql@3") == (3,)
    assert registry.resolve("t", "sql").version == 2
    with pytest.raises(AdapterNotFound, match="no live adapter 'sql@3'"):
        registry.resolve("t", "sql@3")
    assert registry.publish("t", "sql", M[2]).version == 4
    assert registry.retire("t", "sql") == (1, 2, 4)
    with pytest.raises(AdapterNotFound):
        registry.resolve("t", "sql")
    with pytest.raises(AdapterNotFound):
        registry.retire("t", "sql")
    assert registry.publish("t", "sql", M[0]).version == 5


def test_an_alias_moves_and_ends_with_the_retirement_of_its_version(registry: Registry) -> None:
    for manifest in M[:2]:
        registry.publish("t", "sql", manifest)
    registry.alias("t", "sql", "prod", 1)
    assert registry.resolve("t", "sql@prod").version == 1
    registry.alias("t", "sql", "prod", 2)
    assert registry.resolve("t", "sql@prod").version == 2
    assert registry.retire("t", "sql@prod") == (2,)
    with pytest.raises(AdapterNotFound):
        registry.resolve("t", "sql@prod")
    for version in (2, 3, 0):
        with pytest.raises((AdapterNotFound, InvalidName)):
            registry.alias("t", "sql", "prod", version)


def test_a_name_belongs_to_its_tenant(registry: Registry) -> None:
    registry.publish("t", "sql", M[0])
    with pytest.raises(AdapterNotFound, match="tenant u has no adapter 'sql'"):
        registry.resolve("u", "sql")


def test_latest_for_a_base_is_the_latest_of_that_base(registry: Registry) -> None:
    registry.publish("t", "sql", M[0])
    assert registry.resolve("t", "sql", BASE).version == 1
    with pytest.raises(AdapterNotFound, match="for base other"):
        registry.resolve("t", "sql", "other")
    with pytest.raises(AdapterNotFound, match="not of other"):
        registry.resolve("t", "sql@1", "other")


def test_a_listing_shows_live_versions_with_their_aliases(registry: Registry) -> None:
    for manifest in M[:3]:
        registry.publish("t", "sql", manifest)
    registry.publish("a", "zoo", M[3])
    registry.alias("t", "sql", "prod", 1)
    registry.alias("t", "sql", "canary", 3)
    registry.retire("t", "sql@2")
    shown = [(r.tenant, r.name, r.version, r.aliases) for r in registry.list()]
    assert shown == [
        ("a", "zoo", 1, ("latest",)),
        ("t", "sql", 1, ("prod",)),
        ("t", "sql", 3, ("latest", "canary")),
    ]
    (zoo,) = registry.list("a")
    assert (zoo.digest, zoo.base, zoo.lora_rank, zoo.nbytes, zoo.published_s) == (
        *(M[3].digest, BASE, 4, M[3].nbytes, 12.5),
    )
    assert registry.list("nobody") == ()


def test_a_tenants_names_are_listed_from_one_on_also_from_a_snapshot(registry: Registry) -> None:
    for number, name in enumerate(("c", "a", "d", "b", "a")):
        registry.publish("t", name, M[number])
    registry.publish("u", "z", M[0])
    registry.retire("t", "c")
    assert [r.name for r in registry.list_from("t", "", 2)] == ["a", "a", "b"]
    assert [r.name for r in registry.list_from("t", "aa", 5)] == ["b", "d"]
    assert registry.list_from("nobody", "", 5) == []


def test_a_restored_catalog_lists_names_in_order() -> None:
    catalog = Catalog()
    for name in ("b", "c", "a"):
        fields = {"digest": name, "base": BASE, "lora_rank": 4, "nbytes": 1, "published_s": 1.0}
        catalog.apply({"kind": "publish", "tenant": "t", "name": name, "version": 1, **fields})
    restored = Catalog.from_data(catalog.to_data())
    for each in (catalog, restored):
        assert [record.name for record in each.list_from("t", "b")] == ["b", "c"]
        assert [record.name for record in each.list()] == ["a", "b", "c"]


# ---- names -------------------------------------------------------------------------------------

BAD_NAMES = ["", ".", "..", "../etc", "a/b", "-a", ".a", "a b", "a\n", "é", "a" * 97, "a\x00"]


@on_files
@pytest.mark.parametrize("bad", BAD_NAMES)
def test_a_name_that_is_not_one_is_refused_everywhere(bad: str, registry: Registry) -> None:
    registry.publish("t", "sql", M[0])
    uses = [
        lambda: registry.publish("t", bad, M[0]),
        lambda: registry.publish(bad, "sql", M[0]),
        lambda: registry.resolve("t", bad),
        lambda: registry.resolve("t", f"sql@{bad}"),
        lambda: registry.alias("t", "sql", bad, 1),
        lambda: registry.alias("t", bad, "prod", 1),
        lambda: registry.retire("t", bad),
    ]
    for use in uses:
        with pytest.raises(InvalidName):
            use()
    assert len(registry.list()) == 1


@on_files
@pytest.mark.parametrize("alias", ["latest", "7", "007", "a@b"])
def test_an_alias_that_could_be_a_version_is_refused(alias: str, registry: Registry) -> None:
    registry.publish("t", "sql", M[0])
    with pytest.raises(InvalidName, match="alias"):
        registry.alias("t", "sql", alias, 1)


def test_selectors_are_versions_aliases_or_latest() -> None:
    assert split_name("sql") == split_name("sql@latest") == ("sql", "latest")
    assert split_name("sql@12") == ("sql", 12)
    assert split_name("A.b-c_9@prod") == ("A.b-c_9", "prod")
    for bad in ("sql@", "sql@0", "sql@01", "sql@1@2", "@1", "sql@٣"):
        with pytest.raises(InvalidName):
            split_name(bad)


# ---- the log -----------------------------------------------------------------------------------


def test_following_the_log_is_one_list_and_one_get_per_new_record(
    registry: Registry, store: CountingStore, root: Root
) -> None:
    reader = registry
    registry = open_registry(root.open())
    for manifest in M[:3]:
        registry.publish("t", "sql", manifest)
    store.calls.clear()
    reader.refresh()
    assert store.calls == {"list": 1, "get": 3}
    assert reader.resolve("t", "sql").version == 3
    store.calls.clear()
    reader.refresh()
    assert store.calls == {"list": 1}


def test_threads_that_publish_at_once_lose_nothing(root: Root) -> None:
    store = root.open()
    registries = [open_registry(store) for _ in range(2)]

    def publish(writer: int) -> list[int]:
        manifests = [synthetic(100 * writer + n)[0] for n in range(5)]
        return [registries[writer % 2].publish("t", "sql", m).version for m in manifests]

    with ThreadPoolExecutor(4) as pool:
        versions = [version for got in pool.map(publish, range(4)) for version in got]
    assert sorted(versions) == list(range(1, 21))
    assert len(open_registry(store).list()) == 20


PUBLISH = """
import sys
from adapter_store.manifest import AdapterManifest
from adapter_store.open_store import open_store
from adapter_store.registry import Registry
root, writer = sys.argv[1:]
registry = Registry(open_store(root), lambda: 0.0)
print("ready", flush=True)
sys.stdin.readline()
for n in range(8):
    manifest = AdapterManifest(f"{writer}-{n}", "base", 1, 1, 1, {}, {})
    print(registry.publish("t", "shared", manifest).version)
    registry.publish("t", f"own-{writer}", manifest)
"""


def test_processes_that_publish_at_once_lose_nothing(root: Root) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH, root.url, str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    # As long as it takes: each makes some 150 requests, on a busy machine for a minute and more.
    ends = [writer.communicate() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], [errors for _, errors in ends]
    versions = [int(line) for output, _ in ends for line in output.split()]
    assert sorted(versions) == list(range(1, 17))
    registry = open_registry(root.open())
    assert len(registry.list()) == 32
    assert registry.resolve("t", "own-0@8").digest == "0-7"
    assert len({record.digest for record in registry.list() if record.name == "shared"}) == 16


def test_a_store_that_hides_a_record_it_has_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_log, "LISTING_PAUSES_S", (0.001, 0.001))

    class Forgetful(FileStore):
        def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
            return []

    open_registry(FileStore(tmp_path)).publish("t", "sql", M[0])
    with pytest.raises(SourceUnavailable, match="has record 1 but does not list it"):
        open_registry(Forgetful(tmp_path)).publish("t", "sql", M[1])


def test_a_listing_that_lags_behind_a_write_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lagging(FileStore):
        """Shows a record from the third listing after it was written on."""

        num_hidden: ClassVar[Counter[str]] = Counter()

        def list(self, prefix: str, start_after: str = "") -> Sequence[str]:
            keys = super().list(prefix, start_after)
            self.num_hidden.update(keys)
            return [key for key in keys if self.num_hidden[key] > 2]

    monkeypatch.setattr(followed_log, "LISTING_PAUSES_S", (0.001,) * 6)
    writers = [open_registry(Lagging(tmp_path)) for _ in range(2)]
    versions = [writers[n % 2].publish("t", "sql", M[n]).version for n in range(6)]
    assert versions == [1, 2, 3, 4, 5, 6]


@on_files
@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"kind": "unheard-of"}',
        b'{"kind": "retire", "tenant": "t", "name": "sql", "versions": [0]}',
        b'{"kind": "alias", "tenant": "t", "name": "sql", "alias": "latest", "version": 1}',
        b'{"kind": "alias", "tenant": "t", "name": "sql", "alias": "prod", "version": 2}',
        b'{"kind": "alias", "tenant": "t", "name": "none", "alias": "prod", "version": 1}',
        b'{"kind": ["publish"]}',
        b'{"kind": "publish", "tenant": "t", "name": "sql", "digest": "d", "base": "b", '
        b'"lora_rank": Infinity, "nbytes": 1, "published_s": 0, "version": 2}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_damaged_record_stops_the_reader_instead_of_being_skipped(
    damage: bytes, registry: Registry, store: CountingStore
) -> None:
    registry.publish("t", "sql", M[0])
    store.put(f"log/{2:020}.json", damage)
    with pytest.raises(StoreCorrupt):
        registry.refresh()
    assert registry.resolve("t", "sql").version == 1


def test_a_damaged_record_leaves_what_is_known_and_is_read_again_once_repaired(
    registry: Registry, store: CountingStore, root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    refs = [registry.publish("t", "sql", manifest) for manifest in M[:3]]
    key = f"log/{2:020}.json"
    whole = store.get(key)
    store.put(key, b"{}")
    reader = open_registry(store)  # a start does not fail
    assert reader.damage is not None and key in reader.damage and registry.damage is None
    assert reader.resolve("t", "sql") == refs[0]
    with pytest.raises(StoreCorrupt, match=key):
        reader.publish("t", "other", M[3])
    store.calls.clear()
    for _ in range(3):
        with pytest.raises(StoreCorrupt, match=key):
            reader.refresh()
    assert store.calls == {"list": 3, "get": 3}  # not what follows the record too
    errors = [r for r in caplog.records if r.levelno == logging.ERROR and key in r.message]
    assert len(errors) == 1
    store.put(key, whole)
    reader.refresh()
    assert reader.damage is None and reader.list() == registry.list()
    assert reader.publish("t", "other", M[3]).version == 1


def test_a_change_that_another_writer_has_overwritten_is_reported_as_that(tmp_path: Path) -> None:
    class CheckThenWrite(FileStore):
        """Another writer's put, which was under way at the same time, replaces each of ours."""

        def put_if_absent(self, key: str, data: bytes) -> bool:
            other = {**json.loads(data), "name": "theirs", "digest": M[1].digest}
            self.put(key, json.dumps(other).encode())
            return True

    registry = open_registry(CheckThenWrite(tmp_path))
    with pytest.raises(StoreCorrupt, match=r"log/0+1\.json was overwritten by another writer"):
        registry.publish("t", "ours", M[0])
    assert [record.name for record in registry.list()] == ["theirs"]


def test_a_missing_record_stops_the_reader(registry: Registry, store: CountingStore) -> None:
    registry.publish("t", "sql", M[0])
    store.put(f"log/{3:020}.json", b"{}")
    with pytest.raises(StoreCorrupt, match="not the record before it"):
        registry.refresh()


# ---- snapshots ---------------------------------------------------------------------------------


@pytest.fixture
def snapshots(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> tuple[CountingStore, Registry]:
    """A store after 11 records with a snapshot every 4."""
    monkeypatch.setattr(followed_log, "SNAPSHOT_EVERY", 4)
    registry = open_registry(store)
    for n in range(6):
        registry.publish("t", f"a{n % 2}", M[n])
    registry.alias("t", "a0", "prod", 2)
    registry.retire("t", "a1@1")
    registry.alias("t", "a1", "prod", 3)
    registry.publish("u", "a0", M[0])
    registry.retire("u", "a0")
    assert len(store.list("log/")) == 11
    return store, registry


def test_a_new_reader_needs_the_newest_snapshot_and_what_follows(
    snapshots: tuple[CountingStore, Registry],
) -> None:
    store, registry = snapshots
    assert [key[-9:] for key in store.list("snapshots/")] == ["4.json.gz", "8.json.gz"]
    store.calls.clear()
    reader = open_registry(store)
    assert store.calls["get"] == 1 + 3
    assert reader.list() == registry.list()
    assert reader.publish("t", "a1", M[1]).version == 4  # version 1 was retired


@on_files
def test_names_change_while_a_snapshot_is_made_and_are_in_it(
    snapshots: tuple[CountingStore, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, registry = snapshots
    monkeypatch.setattr(names_module, "AT_ONCE", 1)
    monkeypatch.setattr(followed_log, "SNAPSHOT_EVERY", 10**9)
    encode = names_module.encode
    changes = [
        lambda: registry.retire("t", "a0@1"),
        lambda: registry.publish("t", "a0", M[5]),
        lambda: registry.publish("new", "name", M[0]),
    ]

    def change_first(data: Any) -> bytes:
        if "versions" in data and "tenant" in data and "kind" not in data and changes:
            changes.pop(0)()
        return encode(data)

    monkeypatch.setattr(names_module, "encode", change_first)
    registry.save_snapshot()
    assert changes == [] and len(store.list("log/")) == 14
    newest = store.list("snapshots/")[-1]
    assert newest.endswith("14.json.gz")
    with registry._lock:
        state = registry._catalog.to_data()
    assert gzip.decompress(store.get(newest)) == encode(state)
    assert Catalog.from_data(state).to_data() == state


@on_files
@pytest.mark.parametrize("damage", ["truncate", "flip", "no gzip", "other number", "other format"])
def test_a_damaged_snapshot_is_skipped(
    damage: str, snapshots: tuple[CountingStore, Registry], caplog: pytest.LogCaptureFixture
) -> None:
    store, registry = snapshots
    newest = store.list("snapshots/")[-1]
    raw = store.get(newest)
    data = json.loads(gzip.decompress(raw))
    store.put(
        newest,
        {
            "truncate": raw[:-9],
            "flip": raw[:40] + bytes([raw[40] ^ 0xFF]) + raw[41:],
            "no gzip": b"{}",
            "other number": gzip.compress(json.dumps(data | {"num_records": 9}).encode()),
            "other format": gzip.compress(json.dumps(data | {"format": 2}).encode()),
        }[damage],
    )
    store.calls.clear()
    with caplog.at_level(logging.WARNING):
        reader = open_registry(store)
    assert reader.list() == registry.list()
    assert store.calls["get"] == 2 + 7
    assert newest in caplog.text


def test_the_state_is_rebuilt_without_snapshots(snapshots: tuple[CountingStore, Registry]) -> None:
    store, registry = snapshots
    for key in store.list("snapshots/"):
        store.put(key, b"")
    assert open_registry(store).list() == registry.list()


# ---- a brute-force model -----------------------------------------------------------------------


def test_random_histories_agree_with_a_simple_model(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_log, "SNAPSHOT_EVERY", 3)
    monkeypatch.setattr("os.fsync", lambda _: None)
    names, writers = st.sampled_from(["a", "b"]), st.integers(0, 1)
    aliases, versions = st.sampled_from(["x", "y"]), st.integers(1, 4)

    class Machine(RuleBasedStateMachine):
        """Two registries over one store, and a table: name -> [(digest, live)], aliases."""

        def __init__(self) -> None:
            super().__init__()
            self.store = FileStore(tmp_path_factory.mktemp("registry"))
            self.registries = [open_registry(self.store) for _ in range(2)]
            self.table: dict[str, list[tuple[str, bool]]] = {"a": [], "b": []}
            self.aliases: dict[tuple[str, str], dict[int, float]] = {}

        def is_live(self, name: str, version: int) -> bool:
            return version <= len(self.table[name]) and self.table[name][version - 1][1]

        @rule(writer=writers, name=names, manifest=st.sampled_from(M))
        def publish(self, writer: int, name: str, manifest: AdapterManifest) -> None:
            registry = self.registries[writer]
            registry.refresh()
            generation = registry.place_of(manifest.digest).generation
            ref = registry.publish("t", name, manifest, generation)
            rows = self.table[name]
            live = [row for row in rows if row[1]]
            if not live or live[-1][0] != ref.digest:
                rows.append((ref.digest, True))
            same = [n for n, row in enumerate(rows, start=1) if row == (ref.digest, True)]
            assert ref.version == same[-1]

        @rule(writer=writers, name=names, alias=aliases, version=versions)
        def alias(self, writer: int, name: str, alias: str, version: int) -> None:
            if self.is_live(name, version):
                self.registries[writer].alias("t", name, alias, version)
                self.aliases[name, alias] = {version: 1}
            else:
                with pytest.raises(AdapterNotFound):
                    self.registries[writer].alias("t", name, alias, version)

        @rule(
            writer=writers,
            name=names,
            alias=aliases,
            weights=st.dictionaries(versions, st.integers(0, 3), min_size=1, max_size=3),
        )
        def share(self, writer: int, name: str, alias: str, weights: dict[int, float]) -> None:
            registry, live = self.registries[writer], [self.is_live(name, v) for v in weights]
            if any(weights.values()) and all(live):
                registry.share("t", name, alias, weights)
                # One version alone has all of it, whatever its weight.
                self.aliases[name, alias] = (
                    weights if len(weights) > 1 else dict.fromkeys(weights, 1)
                )
            else:
                with pytest.raises((AdapterNotFound, InvalidShares)):
                    registry.share("t", name, alias, weights)

        @rule(writer=writers, name=names, version=versions)
        def retire(self, writer: int, name: str, version: int) -> None:
            if self.is_live(name, version):
                self.registries[writer].retire("t", f"{name}@{version}")
                self.table[name][version - 1] = (self.table[name][version - 1][0], False)
            else:
                with pytest.raises(AdapterNotFound):
                    self.registries[writer].retire("t", f"{name}@{version}")

        @rule(collector=writers)
        def collect(self, collector: int) -> None:
            garbage = Collector(self.store, self.registries[collector])
            garbage.remove(garbage.find(0), lambda _: None)

        @rule(reader=writers)
        def reopen(self, reader: int) -> None:
            self.registries[reader] = open_registry(self.store)

        @invariant()
        def every_reader_resolves_as_the_table_says(self) -> None:
            for registry in self.registries:
                registry.refresh()
                for name, rows in self.table.items():
                    live = [n for n in range(1, len(rows) + 1) if self.is_live(name, n)]
                    self.agrees(registry, name, live[-1] if live else None)
                    for version in range(1, len(rows) + 2):
                        expected = version if version in live else None
                        self.agrees(registry, f"{name}@{version}", expected)
                for (name, alias), weights in self.aliases.items():
                    left = {v: weight for v, weight in weights.items() if self.is_live(name, v)}
                    view = registry.alias_view("t", f"{name}@{alias}")
                    assert view is not None
                    assert {ref.version: weight for ref, weight in view.shares} == left
                    heaviest = sorted((-weight, v) for v, weight in left.items() if weight)
                    expected = heaviest[0][1] if heaviest else None
                    self.agrees(registry, f"{name}@{alias}", expected)

        def agrees(self, registry: Registry, full_name: str, version: int | None) -> None:
            if version is None:
                with pytest.raises(AdapterNotFound):
                    registry.resolve("t", full_name)
                return
            ref = registry.resolve("t", full_name)
            assert ref.version == version
            assert ref.digest == self.table[full_name.partition("@")[0]][version - 1][0]

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=50,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
