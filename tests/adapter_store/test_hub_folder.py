"""Adapters of a hub: the real client package against a hub on loopback."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from adapter_store.errors import (
    AdapterInvalid,
    DownloadStopped,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.object_store import Reading
from adapter_store.peft_config import CONFIG_NAME
from adapter_store.sources import remote_folder
from tests.adapter_store.fake_hub import REPOSITORY, FakeHub, running_hub

FILES = {CONFIG_NAME: b"{}", WEIGHTS_NAME: bytes(range(256)) * 100, "README.md": b"#"}
URL = f"hf://{REPOSITORY}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[FakeHub, None, None]:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.commit(folder)
        (folder / WEIGHTS_NAME).write_bytes(b"newer")
        hub.commit(folder, "refs/pr/1")
        yield hub


def fetched(url: str, folder: Path, how: Reading | None = None) -> dict[str, bytes]:
    folder.mkdir()
    found = remote_folder(url, None, 10**6)
    found.fetch(folder, how or Reading())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("cut_after", [None, 9000])
def test_the_files_of_one_commit_are_fetched_also_in_pieces(
    cut_after: int | None, hub: FakeHub, tmp_path: Path
) -> None:
    hub.cut_after = cut_after
    seen: list[int] = []
    found = fetched(URL, tmp_path / "main", Reading(seen.append))
    assert found == {name: FILES[name] for name in (CONFIG_NAME, WEIGHTS_NAME)}
    assert sum(seen) == sum(map(len, found.values()))
    assert fetched(f"{URL}@refs/pr/1", tmp_path / "pr")[WEIGHTS_NAME] == b"newer"
    assert all("/resolve/main/" not in path for path in hub.requests)


def test_a_revision_that_moves_between_look_and_fetch_changes_nothing(
    hub: FakeHub, tmp_path: Path
) -> None:
    found = remote_folder(URL, None, 10**6)
    hub.revisions["main"] = hub.revisions["refs/pr/1"]
    found.fetch(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == FILES[WEIGHTS_NAME]


def test_what_is_too_large_is_refused_before_a_byte_of_it_is_fetched(hub: FakeHub) -> None:
    with pytest.raises(AdapterInvalid, match="25602 bytes, more than the 25601 allowed"):
        remote_folder(URL, None, 25601)
    assert not any("/resolve/" in path for path in hub.requests)


def test_what_is_not_what_the_hub_said_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.is_sure = False
    with pytest.raises(StoreCorrupt, match="does not have the sha256"):
        fetched(URL, tmp_path / "other")
    hub.said_sizes = {CONFIG_NAME: 1}
    with pytest.raises(StoreCorrupt, match="longer than the hub says"):
        fetched(URL, tmp_path / "longer")
    hub.said_sizes = {CONFIG_NAME: 3}
    with pytest.raises(SourceUnavailable, match=r"adapter_config.json .*cut again and again"):
        fetched(URL, tmp_path / "shorter")
    hub.cut_after = 0
    with pytest.raises(SourceUnavailable, match="cut again and again"):
        fetched(URL, tmp_path / "cut")


def test_a_fetch_that_is_not_wanted_any_more_ends(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DownloadStopped):
        fetched(URL, tmp_path / "folder", Reading(is_wanted=lambda: False))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"{URL}@absent", "no such repository or revision"),
        ("hf://acme", "must be hf://organisation/name@revision"),
        (f"{URL}/sub/folder", "must be hf://organisation/name@revision"),
        ("hf://a--b/c@main", "no such repository or revision"),
    ],
)
def test_what_is_no_revision_is_refused_by_name(url: str, reason: str, hub: FakeHub) -> None:
    with pytest.raises(AdapterInvalid, match=reason) as refused:
        remote_folder(url, None, 10**6)
    assert url in str(refused.value)


def test_a_hub_that_is_gone_and_a_missing_package_are_named(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceUnavailable, match=f"{URL} cannot be read"):
        remote_folder(URL, None, 10**6)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceUnavailable, match=r"needs the package .*reef\[hub\]"):
        remote_folder(URL, None, 10**6)
