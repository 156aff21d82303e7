"""A base's fingerprint follows its content, and its modules are those that adapters may change."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_store.bases import HASHES_NAME, BaseModel, describe_base, parse_base, weight_files
from adapter_store.errors import BaseInvalid, StoreCorrupt
from tests.adapter_store.adapters import load_base, write_base


def describe(folder: Path, cache: Path) -> BaseModel:
    return describe_base(folder, cache, lambda _: None)


@pytest.fixture
def copy(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


def test_the_modules_are_the_linear_layers_of_the_decoder(
    base: BaseModel, base_folder: Path
) -> None:
    layers = load_base(base_folder).named_modules()
    expected = {
        name: (layer.out_features, layer.in_features)
        for name, layer in layers
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    assert base.modules == expected
    assert len(expected) == 14


def test_a_sharded_model_has_the_same_modules(base: BaseModel, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "sharded", max_shard_size="20KB")
    assert len(weight_files(folder)) > 1
    assert describe(folder, tmp_path).modules == base.modules


def test_a_copy_has_the_same_fingerprint(base: BaseModel, copy: Path, tmp_path: Path) -> None:
    path = copy / "config.json"
    noise = {"_name_or_path": "/elsewhere", "transformers_version": "0"}
    config = json.loads(path.read_text()) | noise
    path.write_text(json.dumps(config, indent=7, sort_keys=True))
    assert describe(copy, tmp_path) == base


def test_a_change_of_config_or_weights_changes_the_fingerprint(
    base: BaseModel, copy: Path, tmp_path: Path
) -> None:
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights)
    changed = describe(copy, tmp_path)
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert len({base.fingerprint, changed.fingerprint, describe(copy, tmp_path).fingerprint}) == 3


def test_weights_are_hashed_once_until_they_change(copy: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    weights = copy / "model.safetensors"
    first = describe_base(copy, tmp_path / "hashes", seen.append)
    assert sum(seen) == weights.stat().st_size
    assert describe_base(copy, tmp_path / "hashes", seen.append) == first
    assert sum(seen) == weights.stat().st_size
    (tmp_path / "hashes" / HASHES_NAME).write_text("damaged")
    assert describe_base(copy, tmp_path / "hashes", seen.append) == first
    assert sum(seen) == 2 * weights.stat().st_size


def test_a_folder_that_is_no_model_is_refused_with_the_reason(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    (copy / "model.safetensors").rename(copy / "elsewhere")
    with pytest.raises(BaseInvalid, match="which is not in the folder"):
        describe(copy, tmp_path)
    (copy / "model.safetensors.index.json").unlink()
    with pytest.raises(BaseInvalid, match=r"model\.safetensors"):
        describe(copy, tmp_path)
    save_file({"lm_head.weight": torch.ones(2, 2)}, copy / "model.safetensors")
    with pytest.raises(BaseInvalid, match="_proj"):
        describe(copy, tmp_path)
    (copy / "config.json").write_text("[]")
    with pytest.raises(BaseInvalid, match="not a usable model folder"):
        describe(copy, tmp_path)


def test_a_description_survives_its_json_and_damage_is_noticed(base: BaseModel) -> None:
    assert parse_base(base.to_json(), base.fingerprint) == base
    for raw in (b"", b"[]", b"{}", base.to_json()[:-1], base.to_json().replace(b"32", b"null")):
        with pytest.raises(StoreCorrupt, match=base.fingerprint):
            parse_base(raw, base.fingerprint)
    with pytest.raises(StoreCorrupt, match=r"is .*'s"):
        parse_base(base.to_json(), "0" * 64)
