"""Rounds the linear layers of a dense model to a GPTQ or AWQ checkpoint, to nearest.

Without data to calibrate with, so its answers are worse than those of a checkpoint made well. GPTQ
is made without zero points, as is its default, AWQ with them: two kernels.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.engine.support.packed import awq_tensors, gptq_tensors, quantize, quantize_symmetric

GROUP = 128
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
}


def packed_base(base: Path, method: str, folder: Path) -> Path:
    """Write the model of `base` to `folder`, by a method of CONFIGS; return the folder."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.json.index"))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors |= (
            _packed(name, tensor, method) if name.endswith("_proj.weight") else {name: tensor}
        )
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = CONFIGS[method]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _packed(name: str, weight: torch.Tensor, method: str) -> dict[str, torch.Tensor]:
    if method == "gptq":
        made = gptq_tensors(quantize_symmetric(weight.float(), GROUP))
    else:
        made = awq_tensors(quantize(weight.float(), GROUP))
    return {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in made.items()}
