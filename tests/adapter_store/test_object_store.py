"""Objects appear whole or not at all, and of many writers of one key exactly one succeeds."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_store.errors import ObjectNotFound, SourceUnavailable, StoreCorrupt
from adapter_store.object_store import FileStore, open_store


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "root")


def test_an_object_is_read_back_whole_and_in_ranges(store: FileStore) -> None:
    store.put("a/b", b"0123456789")
    assert store.get("a/b") == b"0123456789"
    assert store.get_range("a/b", 3, 4) == b"3456"
    assert store.get_range("a/b", 8, 4) == b"89"
    assert store.get_range("a/b", 10, 4) == b""
    assert store.size("a/b") == 10
    store.put("a/b", b"new")
    assert store.get("a/b") == b"new"


def test_an_absent_object_is_reported_as_such(store: FileStore) -> None:
    store.put("file", b"")
    for key in ("absent", "absent/deeper", "file/deeper"):
        assert store.size(key) is None
        with pytest.raises(ObjectNotFound, match=key):
            store.get(key)
        with pytest.raises(ObjectNotFound, match=key):
            store.get_range(key, 0, 1)


def test_the_second_put_if_absent_changes_nothing(store: FileStore) -> None:
    assert store.put_if_absent("k", b"first")
    assert not store.put_if_absent("k", b"second")
    assert store.get("k") == b"first"


def test_of_many_threads_one_put_if_absent_succeeds(store: FileStore) -> None:
    start = threading.Barrier(8)

    def race(writer: int) -> list[bool]:
        start.wait()
        return [store.put_if_absent(f"k/{n}", bytes([writer])) for n in range(20)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    for n in range(20):
        winners = [writer for writer in range(8) if won[writer][n]]
        assert len(winners) == 1
        assert store.get(f"k/{n}") == bytes(winners)


def test_keys_are_listed_in_order_after_the_last_one_seen(store: FileStore) -> None:
    keys = ["log/1", "log/10", "log/2", "log/sub/x", "logs/9", "other", "log.json"]
    for key in keys:
        store.put(key, b"")
    assert store.list("log/") == ["log/1", "log/10", "log/2", "log/sub/x"]
    assert store.list("log/", start_after="log/10") == ["log/2", "log/sub/x"]
    assert store.list("log/1") == ["log/1", "log/10"]
    assert store.list("log") == sorted(key for key in keys if key.startswith("log"))
    assert store.list("") == sorted(keys)
    assert store.list("absent/") == []


def test_a_draft_is_never_listed_and_never_left_behind(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: listed.extend(store.list("")))
    store.put("k", b"x")
    store.put_if_absent("k", b"y")
    assert set(listed) <= {"k"}
    assert not list((tmp_path / "root" / ".drafts").iterdir())


def test_drafts_of_a_crash_are_removed_after_a_day(store: FileStore, tmp_path: Path) -> None:
    drafts = tmp_path / "root" / ".drafts"
    for name in ("old", "new"):
        (drafts / name).touch()
    os.utime(drafts / "old", (0, 0))
    FileStore(tmp_path / "root")
    assert os.listdir(drafts) == ["new"]


def test_a_write_that_fails_leaves_the_old_object(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("no space left")

    store.put("k", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SourceUnavailable, match="no space left"):
        store.put("k", b"new")
    with pytest.raises(SourceUnavailable, match="no space left"):
        store.put_if_absent("other", b"new")
    assert store.get("k") == b"old"
    assert store.list("") == ["k"]
    assert not list((tmp_path / "root" / ".drafts").iterdir())


def test_a_file_is_stored_only_with_the_content_that_was_promised(
    store: FileStore, tmp_path: Path
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


@pytest.mark.parametrize(
    "key", ["", "/", "/etc/passwd", "..", "a/../b", "a/./b", "a//b", "a/", ".hidden", "a b", "a\n"]
)
def test_a_key_that_could_leave_the_root_is_refused(store: FileStore, key: str) -> None:
    for use in (
        store.get,
        store.size,
        lambda k: store.put(k, b""),
        lambda k: store.get_range(k, 0, 1),
    ):
        with pytest.raises(ValueError, match="object key"):
            use(key)


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("s3://bucket/prefix", "not supported in this version"),
        ("file://relative/path", "not absolute"),
        ("file:relative", "not absolute"),
        ("/srv/adapters", "must begin with file:///"),
        ("", "must begin with file:///"),
    ],
)
def test_a_root_that_is_no_absolute_file_url_is_refused(root: str, reason: str) -> None:
    with pytest.raises(SourceUnavailable, match=reason):
        open_store(root)


def test_a_file_url_may_be_quoted(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/with%20space").put("k", b"v")
    assert (tmp_path / "with space" / "k").read_bytes() == b"v"
