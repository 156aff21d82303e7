"""Verdicts on adapters are kept by the log, beside what was published."""

from dataclasses import replace
from pathlib import Path

import pytest

from adapter_store.catalog import Catalog
from adapter_store.errors import StoreCorrupt
from adapter_store.file_store import FileStore
from adapter_store.registry import Registry
from adapter_store.verdict import Verdict
from tests.adapter_store.synthetic import synthetic

MANIFEST, OTHER = synthetic(0)[0], synthetic(1)[0]
PROVEN = Verdict("proven", "p" * 64, "bfloat16, torch", 1.5, 0.01, 0.3)
FAILED = replace(PROVEN, outcome="failed", error=1.4, reason="does not act")


def open_registry(folder: Path, now_s: float = 12.5) -> Registry:
    return Registry(FileStore(folder), wall_clock=lambda: now_s)


def verdicts(registry: Registry) -> dict[str, Verdict | None]:
    return {f"{record.name}@{record.version}": record.verdict for record in registry.list()}


def test_all_names_of_the_content_show_its_latest_verdict_to_every_reader(tmp_path: Path) -> None:
    registry = open_registry(tmp_path)
    for name, manifest in (("a", MANIFEST), ("a", OTHER), ("b", MANIFEST)):
        registry.publish("t", name, manifest)
    assert set(verdicts(registry).values()) == {None}
    assert registry.note(MANIFEST.digest, FAILED)
    reader = open_registry(tmp_path)
    dated = replace(FAILED, proven_s=12.5)
    assert verdicts(reader) == {"a@1": dated, "a@2": None, "b@1": dated}
    assert open_registry(tmp_path, 20.0).note(MANIFEST.digest, PROVEN)
    reader.refresh()
    assert reader.verdict_of(MANIFEST.digest) == replace(PROVEN, proven_s=20.0)


def test_what_is_known_is_not_written_again(tmp_path: Path) -> None:
    registry = open_registry(tmp_path)
    registry.publish("t", "a", MANIFEST)
    for error in (0.01, 0.02):
        assert registry.note(MANIFEST.digest, replace(PROVEN, error=error, engine="int8, triton"))
    assert len(FileStore(tmp_path).list("log/")) == 2


def test_a_verdict_goes_with_the_last_version_that_it_is_on(tmp_path: Path) -> None:
    registry = open_registry(tmp_path)
    assert not registry.note(MANIFEST.digest, PROVEN)
    for name in ("a", "b"):
        registry.publish("t", name, MANIFEST)
    registry.note(MANIFEST.digest, PROVEN)
    registry.retire("t", "a")
    assert registry.verdict_of(MANIFEST.digest) is not None
    registry.retire("t", "b")
    registry.publish("t", "b", MANIFEST)
    assert verdicts(registry) == {"b@2": None}


def test_a_snapshot_holds_verdicts(tmp_path: Path) -> None:
    registry = open_registry(tmp_path)
    registry.publish("t", "a", MANIFEST)
    registry.note(MANIFEST.digest, PROVEN)
    registry.save_snapshot()
    for key in FileStore(tmp_path).list("log/"):
        (tmp_path / key).unlink()
    assert verdicts(open_registry(tmp_path)) == {"a@1": replace(PROVEN, proven_s=12.5)}


def test_a_verdict_of_another_kind_is_damage() -> None:
    catalog = Catalog()
    catalog._live["d"] = [0]
    wrong = {**PROVEN.to_data(), "outcome": "perhaps"}
    with pytest.raises(StoreCorrupt, match="outcome 'perhaps' is not one of"):
        catalog.apply({"kind": "verdict", "digest": "d", "verdict": wrong})
