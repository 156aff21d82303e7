"""Adapters that are fetched before they are published, from a folder and from a real S3 server."""

from pathlib import Path

import pytest

from adapter_store.errors import AdapterInvalid
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.peft_config import CONFIG_NAME
from adapter_store.sources import fetch_folder
from tests.adapter_store.roots import Root

FILES = {CONFIG_NAME: b"{}", WEIGHTS_NAME: b"weights", "chat_template.jinja": b"{{ x }}"}


def test_the_files_of_an_adapter_are_fetched_and_no_others(root: Root, tmp_path: Path) -> None:
    for name, data in {**FILES, "optimizer.pt": b"large"}.items():
        root.open().put(f"my/adapter/{name}", data)
    fetch_folder(f"{root.url}/my/adapter", None, tmp_path, sum(map(len, FILES.values())))
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert found == FILES


def test_what_is_no_adapter_or_too_large_is_refused(file_root: Root, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with pytest.raises(AdapterInvalid, match=f"has no {name}"):
            fetch_folder(f"{file_root.url}/a", None, target, 100)
        file_root.open().put(f"a/{name}", FILES[name])
    with pytest.raises(AdapterInvalid, match="more than the 5 allowed"):
        fetch_folder(f"{file_root.url}/a", None, target, 5)
    assert list(target.iterdir()) == []


def test_files_of_what_can_be_converted_are_fetched_too(file_root: Root, tmp_path: Path) -> None:
    files = {"adapters.safetensors": b"MLX's", CONFIG_NAME: b"{}", "a.gguf": b"x", "t.jinja": b""}
    store = file_root.open()
    for name, data in {**files, "weights.npz": b"large", "old/config.json": b"{}"}.items():
        store.put(f"a/{name}", data)
    target = tmp_path / "target"
    target.mkdir()
    fetch_folder(f"{file_root.url}/a", None, target, 8, any_form=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
    with pytest.raises(AdapterInvalid, match="more than the 7 allowed"):
        fetch_folder(f"{file_root.url}/a", None, target, 7, any_form=True)
    with pytest.raises(AdapterInvalid, match="0 files of an adapter"):
        fetch_folder(f"{file_root.url}/b", None, target, 7, any_form=True)
