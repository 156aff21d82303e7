"""Objects appear whole or not at all, and of many writers of one key exactly one succeeds."""

import hashlib
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapter_store.errors import (
    DownloadStopped,
    ObjectChanged,
    ObjectNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.file_store import SETTLED_NS, FileStore
from adapter_store.object_store import ObjectStore, Reading
from adapter_store.open_store import endpoint_from, open_store
from tests.adapter_store.roots import Root


@pytest.fixture
def store(root: Root) -> ObjectStore:
    return root.open()


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "root")


def test_an_object_is_read_back_whole_and_in_ranges(store: ObjectStore) -> None:
    store.put("a/b", b"0123456789")
    assert store.get("a/b") == b"0123456789"
    assert store.get_range("a/b", 3, 4) == b"3456"
    assert store.get_range("a/b", 8, 4) == b"89"
    assert store.get_range("a/b", 10, 4) == b""
    assert store.size("a/b") == 10
    store.put("a/b", b"new")
    assert store.get("a/b") == b"new"


def test_many_objects_are_read_in_the_order_asked(store: ObjectStore) -> None:
    for n in range(20):
        store.put(f"n/{n}", str(n).encode())
    wanted = [7, *range(19, -1, -1), 7]
    assert list(store.get_many([f"n/{n}" for n in wanted])) == [str(n).encode() for n in wanted]
    assert list(store.get_many([])) == []
    with pytest.raises(ObjectNotFound, match="n/20"):
        store.get_many(["n/0", "n/20", "n/1"])


@pytest.mark.parametrize("nbytes", [0, 1, 100_000])
def test_an_object_is_read_into_a_file(nbytes: int, store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"something longer was here before" * 10_000)
    data = random.Random(nbytes).randbytes(nbytes)
    store.put("k", data)
    store.get_file("k", path)
    assert path.read_bytes() == data
    with pytest.raises(ObjectNotFound, match="absent"):
        store.get_file("absent", path)
    with pytest.raises(OSError, match="no such folder"):
        store.get_file("k", tmp_path / "no such folder" / "file")


def test_folders_are_paged_and_what_lies_directly_in_one_is_described(store: ObjectStore) -> None:
    for key in ("top", "a/x", "a/y", "a/deep/z", "a-1/x", "b/x"):
        store.put(key, key.encode())
    found = [name for name in store.folders("", 10) if name != "probe/"]
    assert found == ["a-1/", "a/", "b/"]  # in the order of keys
    assert list(store.folders("", 2)) == ["a-1/", "a/"]
    assert list(store.folders("a/", 1)) == ["b/"] and list(store.folders("z/", 2)) == []
    described = store.describe_folder("a/", 10)
    assert [(each.key, each.nbytes) for each in described] == [("a/x", 3), ("a/y", 3)]
    assert list(store.describe_folder("absent/", 10)) == []
    tags = {each.key: each.etag for each in described}
    store.put("a/y", b"new")
    again = {each.key: each.etag for each in store.describe_folder("a/", 10)}
    assert tags["a/x"] == again["a/x"] and tags["a/y"] != again["a/y"] != ""


def test_a_file_is_read_in_the_state_that_was_asked_for(store: ObjectStore, tmp_path: Path) -> None:
    store.put("k", b"old")
    (listed,) = store.describe("k")
    seen: list[int] = []
    store.get_file("k", tmp_path / "file", Reading(seen.append, etag=listed.etag))
    assert sum(seen) == 3
    store.put("k", b"new")
    with pytest.raises(ObjectChanged, match="k changed"):
        store.get_file("k", tmp_path / "file", Reading(etag=listed.etag))
    with pytest.raises(DownloadStopped):
        store.get_file("k", tmp_path / "file", Reading(is_wanted=lambda: False))


def test_a_folder_is_listed_from_memory_until_something_comes_or_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[str] = []
    names_in = FileStore._names_in

    def counted(self: FileStore, parent: str) -> Any:
        scans.append(parent)
        return names_in(self, parent)

    monkeypatch.setattr(FileStore, "_names_in", counted)
    store, folder = FileStore(tmp_path), tmp_path / "log"
    keys = [f"log/{n}" for n in range(1, 6)]

    def list_after(number: int, is_settled: bool) -> list[str]:
        if is_settled:
            os.utime(folder, ns=(1, folder.stat().st_mtime_ns - 10 * SETTLED_NS))
        return list(store.list("log/", f"log/{number}"))

    for key in keys:
        store.put(key, b"")
    assert list_after(2, False) == keys[2:] and list_after(2, True) == keys[2:]
    assert len(scans) == 2, "what has just changed is not kept"
    for number in (2, 3, 5):
        assert list(store.list("log/", f"log/{number}")) == keys[number:]
    assert len(scans) == 2
    assert list_after(1, False) == keys[1:] and len(scans) == 3, "it holds what comes behind"
    FileStore(tmp_path).put("log/6", b"")
    assert list(store.list("log/", "log/4")) == ["log/5", "log/6"]
    store.remove(["log/5"])
    assert list(store.list("log/", "log/4")) == ["log/6"]
    assert list_after(0, True) == [*keys[:4], "log/6"]
    before = len(scans)
    monkeypatch.setattr("adapter_store.file_store.KEPT_NS", 0)
    assert list_after(0, False) == [*keys[:4], "log/6"] and len(scans) == before + 1
    store.put("log/more/7", b"")
    assert list_after(0, True)[-1] == "log/more/7" == list_after(0, False)[-1]


def test_an_absent_object_is_reported_as_such(store: ObjectStore) -> None:
    store.put("file", b"")
    for key in ("absent", "absent/deeper", "file/deeper"):
        assert store.size(key) is None
        with pytest.raises(ObjectNotFound, match=key):
            store.get(key)
        with pytest.raises(ObjectNotFound, match=key):
            store.get_range(key, 0, 1)


def test_the_second_put_if_absent_changes_nothing(store: ObjectStore) -> None:
    assert store.put_if_absent("k", b"first")
    assert not store.put_if_absent("k", b"second")
    assert store.get("k") == b"first"


def test_exactly_one_of_many_concurrent_put_if_absent_succeeds(store: ObjectStore) -> None:
    start = threading.Barrier(8)

    def race(writer: int) -> list[bool]:
        start.wait()
        return [store.put_if_absent(f"k/{n}", bytes([writer])) for n in range(10)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    for n in range(10):
        winners = [writer for writer in range(8) if won[writer][n]]
        assert len(winners) == 1
        assert store.get(f"k/{n}") == bytes(winners)


def test_keys_are_listed_in_order_after_the_last_one_seen(store: ObjectStore) -> None:
    keys = ["log/1", "log/10", "log/2", "log/sub/x", "logs/9", "other", "log.json"]
    for key in keys:
        store.put(key, b"")
    assert store.list("log/") == ["log/1", "log/10", "log/2", "log/sub/x"]
    assert store.list("log/", start_after="log/10") == ["log/2", "log/sub/x"]
    assert store.list("log/1") == ["log/1", "log/10"]
    assert store.list("log") == sorted(key for key in keys if key.startswith("log"))
    assert [key for key in store.list("") if key in keys] == sorted(keys)
    assert store.list("absent/") == []


def test_a_description_has_keys_sizes_and_times_by_the_stores_clock(store: ObjectStore) -> None:
    for key, data in (("log/2", b"12"), ("log/1", b"1"), ("logs/3", b"")):
        store.put(key, data)
    described = store.describe("log/")
    assert [(each.key, each.nbytes) for each in described] == [("log/1", 1), ("log/2", 2)]
    assert all(abs(each.modified_s - store.now_s()) < 60 for each in described)
    assert store.describe("absent/") == []


def test_removed_objects_are_gone_and_absent_ones_are_no_error(store: ObjectStore) -> None:
    for n in range(12):
        store.put(f"a/{n}", b"x")
    store.remove([f"a/{n}" for n in range(1, 20)])
    store.remove([])
    assert store.list("a/") == ["a/0"]
    with pytest.raises(ObjectNotFound):
        store.get("a/5")
    assert store.put_if_absent("a/5", b"again") and store.get("a/5") == b"again"


def test_the_time_is_that_of_a_folder_where_nothing_can_be_written(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert abs(files.now_s() - time.time()) < 60


def test_a_folder_that_is_removed_while_it_is_empty_stops_no_writer(
    files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def write(writer: int) -> None:
        for n in range(200):
            key = f"shared/{writer}"
            if n % 2:
                files.put(key, b"x")
            else:
                assert files.put_if_absent(key, b"x")
            files.list("")
            files.describe("")
            files.remove([key])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert files.list("") == []


def test_a_draft_is_never_listed_and_never_left_behind(
    files: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: listed.extend(files.list("")))
    files.put("k", b"x")
    files.put_if_absent("k", b"y")
    assert set(listed) <= {"k"}
    assert not list((tmp_path / "root" / ".drafts").iterdir())


def test_drafts_of_a_crash_are_removed_after_a_day(files: FileStore, tmp_path: Path) -> None:
    drafts = tmp_path / "root" / ".drafts"
    drafts.mkdir(parents=True)
    for name in ("old", "new"):
        (drafts / name).touch()
    os.utime(drafts / "old", (0, 0))
    FileStore(tmp_path / "root")
    assert os.listdir(drafts) == ["new"]


def test_a_write_that_fails_leaves_the_old_object(
    files: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("no space left")

    files.put("k", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SourceUnavailable, match="no space left"):
        files.put("k", b"new")
    with pytest.raises(SourceUnavailable, match="no space left"):
        files.put_if_absent("other", b"new")
    assert files.get("k") == b"old"
    assert files.list("") == ["k"]
    assert not list((tmp_path / "root" / ".drafts").iterdir())


def test_a_file_is_stored_only_if_it_has_the_expected_sha256(
    store: ObjectStore, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 1000)
    seen: list[int] = []
    store.put_file("w", path, hashlib.sha256(b"x" * 1000).hexdigest(), seen.append)
    assert store.get("w") == b"x" * 1000
    assert sum(seen) == 1000
    path.write_bytes(b"y" * 1000)
    with pytest.raises(StoreCorrupt, match="changed while it was uploaded"):
        store.put_file("w", path, hashlib.sha256(b"x" * 1000).hexdigest(), seen.append)
    assert store.get("w") == b"x" * 1000


BAD_KEYS = ["", "/", "/etc", "..", "a/../b", "a/./b", "a//b", "a/", ".hidden", "a b", "a\n", "é"]


def test_a_key_that_could_leave_the_root_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    uses = [
        store.get,
        store.size,
        lambda key: store.put(key, b""),
        lambda key: store.put_if_absent(key, b""),
        lambda key: store.put_file(key, tmp_path / "file", hashlib.sha256().hexdigest(), print),
        lambda key: store.get_range(key, 0, 1),
        lambda key: store.get_many([key]),
        lambda key: store.get_file(key, tmp_path / "file"),
        lambda key: store.remove([key]),
    ]
    for key in BAD_KEYS:
        for use in uses:
            with pytest.raises(ValueError, match="object key"):
                use(key)


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("file://relative/path", "not absolute"),
        ("file:relative", "not absolute"),
        ("/srv/adapters", "must begin with file:/// or s3://"),
        ("", "must begin with file:/// or s3://"),
    ],
)
def test_a_root_that_is_no_absolute_file_url_is_refused(root: str, reason: str) -> None:
    with pytest.raises(SourceUnavailable, match=reason):
        open_store(root)


def test_a_file_root_has_no_endpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="leave endpoint_url out"):
        open_store(f"file://{tmp_path}", "http://127.0.0.1:1")


def test_the_endpoint_of_the_environment_is_only_for_s3() -> None:
    environment = {"S3_ENDPOINT_URL": "http://127.0.0.1:1"}
    assert endpoint_from(environment, "s3://bucket") == "http://127.0.0.1:1"
    assert endpoint_from(environment, "file:///srv/adapters") is None
    assert endpoint_from({"S3_ENDPOINT_URL": ""}, "s3://bucket") is None
    assert endpoint_from({}, "s3://bucket") is None


def test_a_file_url_may_be_quoted(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/with%20space").put("k", b"v")
    assert (tmp_path / "with space" / "k").read_bytes() == b"v"
