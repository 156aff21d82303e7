"""Writes the base model and the adapters of a run: the same seed gives the same files."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.deployments.support.tiny_models import make_adapter, make_base

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RANKS = (4, 8)
MODEL = "tiny"
MAX_POSITION = 8192


@dataclass(frozen=True, slots=True)
class Content:
    """What one version of an adapter holds."""

    adapter_name: str
    number: int
    folder: Path


def write_base(folder: Path) -> Path:
    make_base(folder / "base", MAX_POSITION)
    return folder / "base"


def write_contents(
    folder: Path, base: Path, adapter_names: Sequence[str], num_each: int
) -> dict[str, list[Content]]:
    """Write adapters of the same modules with other random weights; ranks take turns by name."""
    templates = {rank: folder / f"template-{rank}" for rank in RANKS}
    for rank, template in templates.items():
        make_adapter(template, base, rank, seed=rank)
    contents: dict[str, list[Content]] = {}
    for at, name in enumerate(adapter_names):
        template = templates[RANKS[at % len(RANKS)]]
        for number in range(num_each):
            target = folder / "contents" / f"{name}-{number}"
            _write_variant(template, target, seed=1000 * at + number)
            contents.setdefault(name, []).append(Content(name, number, target))
    return contents


def _write_variant(template: Path, target: Path, seed: int) -> None:
    """Draw each weight anew, as large as the template's."""
    target.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * tensor.std()
        for name, tensor in sorted(load_file(template / WEIGHTS).items())
    }
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    shutil.copy(template / CONFIG, target / CONFIG)


def write_config(path: Path, args: dict[str, object]) -> Path:
    """Write a Serve config file of one application, as JSON, which is valid YAML."""
    application = {
        "name": "reef",
        "import_path": "deployments.app:build_app",
        "route_prefix": "/",
        "args": args,
    }
    path.write_text(json.dumps({"applications": [application]}), encoding="utf-8")
    return path
