#!/usr/bin/env bash
# peft's add_weighted_adapter makes adapters with rsLoRA too strong, by the square root of the rank.
#
# Versions:  peft 0.21.2, torch 2.13.0 (CPU)
# Expected:  an adapter added with one source and the weight 1 changes the layer as its source does.
# Seen:      for plain LoRA it does. For use_rslora=True (scaling alpha / sqrt(r)) the change is
#            sqrt(r) times too large: 2 at rank 4, 4 at rank 16. The new adapter's config keeps
#            use_rslora, so its alpha, set to the rank for a scaling of 1, is divided by sqrt(r) only.
#            So it is with the combination types linear and cat; no warning is given. (2026-11-30)
# Matters:   whoever merges rsLoRA adapters with peft, or takes peft as the reference for merging,
#            gets other weights than the sum. Safe is to take use_rslora out of the result's config, or
#            to divide the result's scaling by sqrt(r).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model

warnings.simplefilter("ignore")


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def ratio(rank: int, rslora: bool, kind: str) -> float:
    """How much stronger the copy is than its source."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["layer"], use_rslora=rslora)
    model = get_peft_model(Tiny(), config, adapter_name="source")
    layer = model.base_model.model.layer
    torch.nn.init.normal_(layer.lora_B["source"].weight)
    model.add_weighted_adapter(["source"], [1.0], "copy", combination_type=kind)
    deltas = {name: layer.get_delta_weight(name) for name in ("source", "copy")}
    return (deltas["copy"].norm() / deltas["source"].norm()).item()


seen = {}
for rslora in (False, True):
    for rank in (4, 16):
        for kind in ("linear", "cat"):
            seen[rslora, rank, kind] = ratio(rank, rslora, kind)
            print(f"use_rslora={rslora} rank {rank} {kind}: {seen[rslora, rank, kind]:.3f} times")
expected = {key: key[1] ** 0.5 if key[0] else 1.0 for key in seen}
if any(abs(seen[key] - expected[key]) > 1e-3 for key in seen):
    sys.exit("changed: this finding no longer holds")
PYTHON
