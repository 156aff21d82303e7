"""Commands and configurations in the documents work as they stand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import load_config
from deployments.local.serve_yaml import read_application
from tests.deployments.support.tiny_models import make_adapter, make_base
from tests.documents import ROOT, Block, blocks

MAX_POSITION = 4096


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: a checkout, an environment, a model, an adapter."""
    folder = tmp_path_factory.mktemp("reader")
    given = folder / "path" / "to"
    make_base(given / "model", MAX_POSITION)
    make_adapter(given / "peft-folder", given / "model", 4, seed=0)
    for name in ("large", "small"):
        shutil.copytree(given / "model", given / name)
    for name in ("configs", "k8s"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.name)
def test_a_block_of_commands_runs_as_it_stands(
    block: Block, prepared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(prepared, folder, symlinks=True)
    kept = {name: value for name, value in os.environ.items() if name != "ADAPTER_STORE_ROOT"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={**kept, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_there_are_commands_to_run() -> None:
    assert len(blocks("sh")) >= 4


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.name)
def test_a_configuration_is_accepted(block: Block, tmp_path: Path) -> None:
    document: dict[str, Any] = yaml.safe_load(block.text)
    if "applications" in document:
        path = tmp_path / "config.yaml"
        path.write_text(block.text)
        load_config(read_application(path)["args"])
    else:
        load_config({"models": [{"id": "small", "source": "path/to/small"}], **document})
