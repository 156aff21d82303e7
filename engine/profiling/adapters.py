"""Writes adapters of random numbers for a model's linear layers, to measure with."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.messages import AdapterFolder
from engine.model.layers import LoraSite


def write_adapter(
    folder: Path, sites: Sequence[LoraSite], lora_rank: int, seed: int
) -> AdapterFolder:
    """Write a PEFT folder that changes every linear layer; its digest is the folder's name."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).mul_(0.01).bfloat16()

    tensors: dict[str, torch.Tensor] = {}
    for site in sites:
        for part in site.slices:
            name = f"base_model.model.{part.module}"
            tensors[f"{name}.lora_A.weight"] = noise(lora_rank, site.in_features)
            tensors[f"{name}.lora_B.weight"] = noise(part.out_features, lora_rank)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted({part.module.rpartition(".")[2] for site in sites for part in site.slices})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora_rank,
        "lora_alpha": lora_rank,
        "target_modules": modules,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return AdapterFolder(folder.name, str(folder))
