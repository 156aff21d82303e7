"""From publishing on one machine to a verified folder on another."""

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_store.errors import (
    AccessDenied,
    AdapterInvalid,
    AdapterNotFound,
    BaseNotFound,
    InvalidName,
    ObjectNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.layout import WEIGHTS_NAME, read_lora_layout
from adapter_store.manifest import CONFIG_NAME, MANIFEST_NAME
from adapter_store.store import MISS_INTERVAL_S, AdapterStore
from tests.adapter_store.adapters import changed, write_base
from tests.adapter_store.roots import Root

NewStore = Callable[..., AdapterStore]


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(new_store: NewStore, base_folder: Path) -> AdapterStore:
    """With one base."""
    store = new_store()
    store.register_base(base_folder)
    return store


def version_of(peft_folder: Path, folder: Path, alpha: int) -> Path:
    return changed(peft_folder, folder, {"lora_alpha": alpha})


# ---- publish and fetch -------------------------------------------------------------------------


def test_one_machine_fetches_what_another_has_published(
    store: AdapterStore, new_store: NewStore, peft_folder: Path
) -> None:
    ref = store.publish(peft_folder, "public", "sql")
    other = new_store()
    assert other.resolve("public", "sql") == ref
    assert not other.is_local(ref)
    with other.pinned(ref) as folder:
        assert other.is_local(ref)
        assert (folder / WEIGHTS_NAME).read_bytes() == (peft_folder / WEIGHTS_NAME).read_bytes()
        assert read_lora_layout(folder) == read_lora_layout(peft_folder)
    assert other.ensure_local(ref.digest) == folder
    assert other.manifest(ref).digest == ref.digest
    assert other.manifest(ref).base == ref.base == store.base_model().fingerprint


def test_new_weights_under_a_name_are_a_new_version_and_digest(
    store: AdapterStore, peft_folder: Path, tmp_path: Path
) -> None:
    first = store.publish(peft_folder, "public", "sql")
    double = changed(
        peft_folder, tmp_path / "new", tensors=lambda t: {n: 2 * v for n, v in t.items()}
    )
    second = store.publish(double, "public", "sql")
    assert (first.version, second.version) == (1, 2)
    assert first.digest != second.digest
    assert store.ensure_local(first) != store.ensure_local(second)
    assert store.resolve("public", "sql") == second
    assert store.publish(double, "public", "sql") == second


def test_publishing_reports_every_byte_three_times(store: AdapterStore, peft_folder: Path) -> None:
    seen: list[int] = []
    store.publish(peft_folder, "public", "sql", on_bytes=seen.append)
    size = (peft_folder / WEIGHTS_NAME).stat().st_size
    assert 2.5 * size < sum(seen) <= 3 * size


def test_a_refused_upload_leaves_no_trace(
    store: AdapterStore, root: Root, peft_folder: Path, tmp_path: Path
) -> None:
    bad = changed(peft_folder, tmp_path / "bad", {"kasa_config": {"a": 1}})
    before = root.objects()
    with pytest.raises(AdapterInvalid, match="kasa_config"):
        store.publish(bad, "public", "sql")
    with pytest.raises(InvalidName):
        store.publish(peft_folder, "public", "../sql")
    with pytest.raises(InvalidName):
        store.publish(peft_folder, "a/b", "sql")
    with pytest.raises(SourceUnavailable, match="not a folder"):
        store.publish(tmp_path / "absent", "public", "sql")
    for remote in ("hf://org/adapter", "s3://bucket/adapter"):
        with pytest.raises(SourceUnavailable, match="is no folder of this machine"):
            store.publish(remote, "public", "sql")
    assert root.objects() == before


def test_threads_that_publish_the_same_content_agree(
    store: AdapterStore, peft_folder: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        refs = list(pool.map(lambda n: store.publish(peft_folder, "public", f"a{n % 2}"), range(8)))
    assert {(ref.name, ref.version) for ref in refs} == {("a0", 1), ("a1", 1)}
    assert store.verify(store.list()) == []


def test_an_upload_that_was_interrupted_is_completed_by_the_next(
    store: AdapterStore, root: Root, peft_folder: Path
) -> None:
    ref = store.publish(peft_folder, "public", "sql")
    root.remove(f"blobs/{ref.digest}/{MANIFEST_NAME}")
    root.open().put(f"blobs/{ref.digest}/{WEIGHTS_NAME}", b"half")
    assert store.publish(peft_folder, "public", "again").digest == ref.digest
    assert store.verify(store.list()) == []


def test_publishing_again_replaces_a_file_of_the_wrong_size(
    store: AdapterStore, root: Root, peft_folder: Path
) -> None:
    ref = store.publish(peft_folder, "public", "sql")
    root.open().put(f"blobs/{ref.digest}/{WEIGHTS_NAME}", b"half")
    assert store.publish(peft_folder, "public", "sql") == ref
    assert store.verify(store.list()) == []


# ---- bases -------------------------------------------------------------------------------------


def test_with_no_or_several_bases_the_error_lists_them(
    new_store: NewStore, base_folder: Path, peft_folder: Path, tmp_path: Path
) -> None:
    store = new_store()
    with pytest.raises(BaseNotFound, match="none: register one first"):
        store.publish(peft_folder, "public", "sql")
    first = store.register_base(base_folder)
    second = store.register_base(write_base(tmp_path / "second", seed=5))
    assert store.register_base(base_folder) == first
    assert set(store.bases()) == {first, second}
    with pytest.raises(BaseNotFound) as error:
        store.publish(peft_folder, "public", "sql")
    assert first in str(error.value)
    assert second in str(error.value)
    with pytest.raises(BaseNotFound, match="'00000000' is not one of the bases"):
        store.publish(peft_folder, "public", "sql", "0" * 8)
    with pytest.raises(BaseNotFound, match="at least 8 digits"):
        store.publish(peft_folder, "public", "sql", "")
    for_first = store.publish(peft_folder, "public", "sql", first[:8])
    for_second = store.publish(peft_folder, "public", "sql", second)
    assert (for_first.base, for_second.base) == (first, second)
    assert for_first.digest != for_second.digest
    assert store.resolve("public", "sql") == for_second
    assert store.resolve("public", "sql", first) == for_first


def test_a_folder_that_may_only_be_read_is_enough_to_serve(
    file_root: Root,
    base_folder: Path,
    peft_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    writer = AdapterStore(file_root.url, tmp_path / "w", 2**30)
    fingerprint = writer.register_base(base_folder)
    ref = writer.publish(peft_folder, "public", "sql")
    mkdir = Path.mkdir

    def refuse(path: Path, *options: Any, **more: Any) -> None:
        if path.is_relative_to(tmp_path / "root"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *options, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    reader = AdapterStore(file_root.url, tmp_path / "r", 2**30)
    assert reader.register_base(base_folder) == fingerprint
    assert reader.resolve("public", "sql") == ref and reader.ensure_local(ref).is_dir()
    other = write_base(tmp_path / "other", seed=9)
    assert len(reader.register_base(other, required=False)) == 64
    assert "is not registered" in caplog.text
    for write in (lambda: reader.register_base(other), lambda: reader.retire("public", "sql")):
        with pytest.raises(AccessDenied, match="Read-only"):
            write()


# ---- following the log -------------------------------------------------------------------------


def test_resolving_a_known_name_needs_no_request(
    store: AdapterStore, peft_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = store.publish(peft_folder, "public", "sql")
    store.refresh()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the store was asked")

    for method in ("list", "get", "get_many", "get_range", "size"):
        monkeypatch.setattr(store._objects, method, forbidden)
        monkeypatch.setattr(store._log_reader, method, forbidden)
    assert {store.resolve("public", "sql") for _ in range(1000)} == {ref}


def test_new_records_are_read_after_the_interval_and_not_before(
    store: AdapterStore, new_store: NewStore, peft_folder: Path, tmp_path: Path
) -> None:
    clock = Clock()
    store.publish(peft_folder, "public", "sql")
    reader = new_store(clock=clock, refresh_interval_s=1.0)
    store.publish(version_of(peft_folder, tmp_path / "v2", 9), "public", "sql")
    clock.now_s += 0.99
    assert reader.resolve("public", "sql").version == 1
    clock.now_s += 0.01
    assert reader.resolve("public", "sql").version == 2
    store.retire("public", "sql@2")
    assert reader.resolve("public", "sql").version == 2
    reader.refresh()
    assert reader.resolve("public", "sql").version == 1


def test_resolve_known_answers_from_memory_or_not_at_all(
    store: AdapterStore, new_store: NewStore, peft_folder: Path, tmp_path: Path
) -> None:
    clock = Clock()
    ref = store.publish(peft_folder, "public", "sql")
    reader = new_store(clock=clock, refresh_interval_s=1.0)
    places = [("acme", None), ("public", None)]
    assert reader.resolve_known(places, "sql") == ref
    assert reader.resolve_known(places, "nobody") is None
    newer = store.publish(version_of(peft_folder, tmp_path / "v2", 9), "public", "sql")
    assert reader.resolve_known(places, "sql") == ref
    clock.now_s += 1.0
    assert reader.resolve_known(places, "sql") is None, "there may be new records"
    assert reader.resolve_first(places, "sql") == newer
    assert reader.resolve_known(places, "sql") == newer
    with pytest.raises(InvalidName):
        reader.resolve_known(places, "/")


def test_misses_read_the_log_at_most_once_per_interval(
    store: AdapterStore, new_store: NewStore, peft_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    reader = new_store(clock=clock, refresh_interval_s=float("inf"))
    store.publish(peft_folder, "public", "sql")
    assert reader.resolve("public", "sql").version == 1
    store.publish(peft_folder, "public", "other")
    with pytest.raises(AdapterNotFound):
        reader.resolve("public", "other")
    clock.now_s += MISS_INTERVAL_S
    assert reader.resolve("public", "other").version == 1


def test_known_names_resolve_while_the_store_is_down(
    store: AdapterStore,
    new_store: NewStore,
    peft_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    ref = store.publish(peft_folder, "public", "sql")
    reader = new_store(clock=clock)
    reader.ensure_local(ref)

    def down(*_: object, **__: object) -> None:
        raise SourceUnavailable("no route to the store")

    monkeypatch.setattr(reader._log_reader, "list", down)
    clock.now_s += 10
    assert reader.resolve("public", "sql") == ref
    assert "no route to the store" in caplog.text
    assert reader.ensure_local(ref).is_dir()
    with pytest.raises(SourceUnavailable, match="no route"):
        reader.resolve("public", "unknown")


def test_a_damaged_log_leaves_known_names_and_a_start_and_decides_no_unknown_name(
    store: AdapterStore, new_store: NewStore, root: Root, peft_folder: Path
) -> None:
    clock = Clock()
    ref = store.publish(peft_folder, "public", "sql")
    running = new_store(clock=clock)
    root.open().put(f"log/{2:020}.json", b"{}")
    clock.now_s += 10
    for reader in (running, new_store()):
        assert [reader.resolve("public", "sql") for _ in range(3)] == [ref] * 3
        assert [record.name for record in reader.list()] == ["sql"]
        with pytest.raises(StoreCorrupt, match=r"log/0+2\.json"):
            reader.resolve("public", "unknown")
        assert reader.damage is not None and "log/" in reader.damage
        assert reader.ensure_local(ref).is_dir()
    root.remove(f"log/{2:020}.json")
    clock.now_s += 10
    with pytest.raises(AdapterNotFound):
        running.resolve("public", "unknown")
    assert running.damage is None


# ---- aliases, retirement, listing --------------------------------------------------------------


def test_aliases_and_retirement_reach_other_machines(
    store: AdapterStore, new_store: NewStore, peft_folder: Path, tmp_path: Path
) -> None:
    store.publish(peft_folder, "public", "sql")
    store.publish(version_of(peft_folder, tmp_path / "v2", 9), "public", "sql")
    store.alias("public", "sql", "prod", 1)
    assert new_store().resolve("public", "sql@prod").version == 1
    assert store.retire("public", "sql@1") == (1,)
    with pytest.raises(AdapterNotFound):
        new_store().resolve("public", "sql@prod")
    (record,) = new_store().list("public")
    assert (record.name, record.version, record.aliases) == ("sql", 2, ("latest",))
    assert new_store().list("somebody") == ()


# ---- garbage -----------------------------------------------------------------------------------


def test_what_a_machine_has_on_disk_is_served_after_a_collection_until_it_is_evicted(
    store: AdapterStore, root: Root, peft_folder: Path, tmp_path: Path
) -> None:
    ref = store.publish(peft_folder, "public", "sql")
    size = sum(path.stat().st_size for path in store.ensure_local(ref).iterdir())
    replica = AdapterStore(root.url, tmp_path / "replica", int(1.5 * size))
    replica.ensure_local(ref)
    store.retire("public", "sql")
    assert store.remove_garbage(store.find_garbage(0)).places != set()
    with replica.pinned(ref) as folder:
        assert (folder / WEIGHTS_NAME).read_bytes() == (peft_folder / WEIGHTS_NAME).read_bytes()
    other = store.publish(version_of(peft_folder, tmp_path / "other", 9), "public", "other")
    replica.ensure_local(other)
    assert not replica.is_local(ref)
    with pytest.raises(ObjectNotFound):
        replica.ensure_local(ref)


# ---- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_damaged_blob_is_never_served_and_verify_names_it(
    name: str, store: AdapterStore, root: Root, peft_folder: Path
) -> None:
    ref = store.publish(peft_folder, "public", "sql")
    assert store.verify(store.list()) == []
    objects, key = root.open(), f"blobs/{ref.digest}/{name}"
    raw = objects.get(key)
    objects.put(key, raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(StoreCorrupt, match=name):
        store.ensure_local(ref)
    (problem,) = store.verify(store.list())
    assert f"{ref.digest}/{name} has sha256" in problem
    root.remove(key)
    (problem,) = store.verify(store.list())
    assert f"no object blobs/{ref.digest}/{name}" in problem


def test_verify_reports_every_damaged_adapter(
    store: AdapterStore, root: Root, peft_folder: Path, tmp_path: Path
) -> None:
    refs = [
        store.publish(version_of(peft_folder, tmp_path / str(alpha), alpha), "public", f"a{alpha}")
        for alpha in (1, 2, 3)
    ]
    root.open().put(f"blobs/{refs[0].digest}/{MANIFEST_NAME}", b"{}")
    root.remove(f"blobs/{refs[2].digest}/{MANIFEST_NAME}")
    problems = store.verify(store.list())
    assert len(problems) == 2
    assert refs[0].digest in problems[0]
    assert refs[2].digest in problems[1]


def test_an_upload_that_changes_underway_is_refused(
    store: AdapterStore, peft_folder: Path, tmp_path: Path
) -> None:
    folder = changed(peft_folder, tmp_path / "moving")
    weights = folder / WEIGHTS_NAME
    original = weights.read_bytes()
    heard = 0

    def rewrite(num_bytes: int) -> None:
        nonlocal heard
        heard += num_bytes
        if heard >= 2 * len(original) - 4096:
            weights.write_bytes(original[:-4] + np.float32(0.5).tobytes())

    with pytest.raises(StoreCorrupt, match="changed while it was uploaded"):
        store.publish(folder, "public", "sql", on_bytes=rewrite)
    assert store.list() == ()


def test_pins_of_the_store_prevent_eviction_from_its_cache(
    store: AdapterStore, peft_folder: Path, tmp_path: Path
) -> None:
    ref = store.publish(peft_folder, "public", "sql")
    store.pin(ref)
    store.ensure_local(ref)
    locks = tmp_path / "cache0" / ".locks"
    assert os.listdir(locks) == [f"{ref.digest}.pin"]
    store.unpin(ref.digest)
    assert os.listdir(locks) == []
    with pytest.raises(ValueError, match="not pinned"):
        store.unpin(ref)


def test_blobs_hold_no_trace_of_the_machine_that_published(
    store: AdapterStore, peft_folder: Path, tmp_path: Path
) -> None:
    marked = changed(peft_folder, tmp_path / "a", {"base_model_name_or_path": "/home/secret"})
    ref = store.publish(marked, "public", "sql")
    config = json.loads((store.ensure_local(ref) / CONFIG_NAME).read_text())
    assert "base_model_name_or_path" not in config
