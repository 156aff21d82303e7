"""Adapters in plain folders, on a disk and on a real S3 server: found, fetched and checked."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter_store.errors import (
    AdapterInvalid,
    AdapterNotFound,
    InvalidName,
    SourceUnavailable,
)
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.object_store import ObjectStore
from adapter_store.open_store import open_store
from adapter_store.peft_config import CONFIG_NAME
from adapter_store.plain_folders import FRESH_S, PlainFolders
from adapter_store.plain_origin import PLAIN_NAMESPACE as PLAIN
from adapter_store.store import AdapterStore
from tests.adapter_store.adapters import changed
from tests.adapter_store.memory_store import Memory, MemoryStore
from tests.adapter_store.roots import Root


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_by(self) -> None:
        self.now_s += FRESH_S + 0.1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain(root: Root) -> ObjectStore:
    """What an operator fills; nobody else writes there."""
    return open_store(root.url, read_only=True)  # without the objects of a probe


@pytest.fixture
def store(root: Root, tmp_path: Path, base_folder: Path, clock: Clock) -> AdapterStore:
    own = f"file://{tmp_path}/store"
    opened = AdapterStore(own, tmp_path / "cache", 2**30, plain_root=root.url, clock=clock)
    opened.register_base(base_folder)
    return opened


def put(plain: ObjectStore, name: str, folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            plain.put(f"{name}/{path.name}", path.read_bytes())


def resolve(store: AdapterStore, name: str) -> Any:
    (base,) = store.bases()
    return store.resolve_first([("public", base), (PLAIN, base)], name)


def test_a_folder_is_served_as_it_is_and_another_state_of_it_is_another_adapter(
    store: AdapterStore, plain: ObjectStore, peft_folder: Path, tmp_path: Path, clock: Clock
) -> None:
    put(plain, "sql", peft_folder)
    plain.put("sql/checkpoint-5/optimizer.pt", b"not read")
    before = plain.describe("")
    ref = resolve(store, "sql")
    assert (ref.tenant, ref.version) == (PLAIN, 0) and store.find_local(ref) is None
    folder = store.ensure_local(ref)
    assert (folder / WEIGHTS_NAME).read_bytes() == (peft_folder / WEIGHTS_NAME).read_bytes()
    published = store.publish(peft_folder, "public", "same")
    config = (folder / CONFIG_NAME).read_bytes()
    assert config == (store.ensure_local(published) / CONFIG_NAME).read_bytes()
    assert store.find_local(ref) == folder == store.ensure_local(ref)
    assert store.is_bare(ref)
    other = changed(peft_folder, tmp_path / "other", {"lora_alpha": 3})
    put(plain, "sql", other)
    assert resolve(store, "sql") == ref, "as it was seen a moment ago"
    clock.pass_by()
    newer = resolve(store, "sql@latest")
    assert newer.digest != ref.digest
    assert store.ensure_local(newer) != folder == store.ensure_local(ref), "requests go on with it"
    assert {each.key for each in plain.describe("")} == {each.key for each in before}
    store._cache.check_integrity()


def test_what_changes_between_the_look_and_the_fetch_is_never_mixed(
    store: AdapterStore, plain: ObjectStore, peft_folder: Path, clock: Clock, tmp_path: Path
) -> None:
    put(plain, "sql", peft_folder)
    ref = resolve(store, "sql")
    put(plain, "sql", changed(peft_folder, tmp_path / "other", {"lora_alpha": 3}))
    with pytest.raises(SourceUnavailable, match="sql has changed since the request came"):
        store.ensure_local(ref)
    clock.pass_by()
    assert store.ensure_local(resolve(store, "sql")).is_dir()


def test_names_that_are_not_there_cost_one_look_for_a_while(
    store: AdapterStore, plain: ObjectStore, peft_folder: Path, clock: Clock
) -> None:
    assert store._plain is not None
    looks: list[str] = []
    listed = store._plain.folders._objects.describe_folder

    def counted(folder: str, most: int) -> Any:
        looks.append(folder)
        return listed(folder, most)

    store._plain.folders._objects.describe_folder = counted  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(AdapterNotFound):
            resolve(store, "new")
    assert looks == ["new/"]
    put(plain, "new", peft_folder)
    clock.pass_by()
    (base,) = store.bases()
    assert store.resolve_known([(PLAIN, base)], "new") is None, "it takes a look"
    assert store.resolve_known([(PLAIN, base)], "new") is None
    ref = resolve(store, "new")
    clock.now_s -= 0.2  # the log has just been read
    assert store.resolve_known([(PLAIN, base)], "new") == ref and looks == ["new/"] * 2
    for wrong in ("new@1", "new@stable"):
        with pytest.raises(AdapterNotFound, match="has no versions"):
            resolve(store, wrong)
    with pytest.raises(InvalidName):
        resolve(store, "../new")


def test_a_published_name_comes_first(
    store: AdapterStore, plain: ObjectStore, peft_folder: Path
) -> None:
    put(plain, "sql", peft_folder)
    assert resolve(store, "sql").tenant == PLAIN
    published = store.publish(peft_folder, "public", "sql")
    assert resolve(store, "sql") == published


def broken(settings: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


@pytest.mark.parametrize("root", ["file"], indirect=True)
@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (broken({"use_rslora": "maybe"}), "use_rslora"),
        (broken({"target_parameters": ["x"]}), "target_parameters"),
        (lambda folder: (folder / WEIGHTS_NAME).unlink(), f"has no {WEIGHTS_NAME}"),
        (lambda folder: (folder / WEIGHTS_NAME).write_bytes(b"x" * 100), WEIGHTS_NAME),
        (
            lambda folder: (folder / "tokenizer.json").write_bytes(bytes(2**25)),
            "tokenizer.json has",
        ),
    ],
    ids=["a setting", "not served", "no weights", "no safetensors", "a large tokenizer"],
)
def test_what_cannot_be_served_is_refused_once_and_without_paths_of_this_machine(
    breaks: Callable[[Path], None],
    reason: str,
    store: AdapterStore,
    plain: ObjectStore,
    peft_folder: Path,
    tmp_path: Path,
    clock: Clock,
) -> None:
    folder = changed(peft_folder, tmp_path / "broken")
    breaks(folder)
    put(plain, "sql", folder)
    ref = resolve(store, "sql")
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match=reason) as refused:
            store.ensure_local(ref)
        assert str(tmp_path) not in str(refused.value)
        plain.remove([f"sql/{WEIGHTS_NAME}"])  # the second time nothing is fetched
    assert os.listdir(tmp_path / "cache" / ".partial") == []
    put(plain, "sql", peft_folder)
    plain.remove(["sql/tokenizer.json"])
    clock.pass_by()
    assert store.ensure_local(resolve(store, "sql")).is_dir()


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_what_an_adapter_brings_beside_its_weights_is_read(
    store: AdapterStore, plain: ObjectStore, peft_folder: Path, tmp_path: Path
) -> None:
    folder = changed(peft_folder, tmp_path / "own")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    put(plain, "sql", folder)
    ref = resolve(store, "sql")
    assert not store.is_bare(ref)
    template = store.own_files(ref).template
    assert template is not None and template.source == "{{ messages }}"
    assert {p.name for p in store.ensure_local(ref).iterdir()} > {"manifest.json", WEIGHTS_NAME}


def test_folders_are_listed_in_pages_without_a_look_at_each(
    store: AdapterStore, plain: ObjectStore
) -> None:
    for name in ("b", "b-2", "a", "c.1", "-bad", "d"):
        plain.put(f"{name}/{CONFIG_NAME}", b"{}")
    plain.put("readme", b"no folder")
    found, first = [], ""
    while page := store.list_from(PLAIN, first, 2):
        found += [record.name for record in page]
        first = f"{page[-1].name}\0"
    assert found == ["a", "b-2", "b", "c.1", "d"]
    assert [record.name for record in store.list_from(PLAIN, "b", 1)] == ["b"]
    assert [record.name for record in store.list_from(PLAIN, "b.absent", 1)] == ["b"]


def test_a_root_that_cannot_be_read_leaves_what_is_known_as_it_was(clock: Clock) -> None:
    is_down = False

    def hook(method: str, key: str) -> None:
        if is_down:
            raise SourceUnavailable("down")

    objects = MemoryStore(Memory(), hook)
    objects.put(f"sql/{CONFIG_NAME}", b"{}")
    folders = PlainFolders("s3://bucket/root", objects, clock)
    ref = folders.resolve("sql", "0" * 64)
    is_down = True
    clock.pass_by()
    assert folders.resolve("sql", "0" * 64) == ref
    with pytest.raises(SourceUnavailable):
        folders.resolve("unknown", None)
