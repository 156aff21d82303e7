"""Stands in for a training, and for the conversion of what came out of it."""

from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from adapter_store.bases import BaseModel
from adapter_store.conversion.convert import convert, open_upload
from adapter_store.conversion.options import ConversionOptions
from adapter_store.conversion.record import ConversionRecord
from adapter_store.conversion.upload import vocabulary_shapes
from adapter_store.layout import WEIGHTS_NAME, read_lora_layout
from adapter_store.manifest import CONFIG_NAME, PreparedAdapter, prepare
from tests.adapter_store.adapters import load_base

Deltas = dict[str, torch.Tensor]  # by module, [out, in]


@torch.no_grad()
def add_noise(model: torch.nn.Module, size: float, seed: int = 0) -> None:
    """Add random numbers to every parameter that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def convert_and_check(
    upload: Path, target: Path, base: BaseModel, **options: Any
) -> tuple[ConversionRecord, PreparedAdapter]:
    """Convert an upload into a new folder, and check that as an upload of its own."""
    chosen = ConversionOptions(**options)
    source = open_upload(upload, chosen)
    assert source is not None
    target.mkdir()
    modules = {**base.modules, **vocabulary_shapes(base.parameters)}
    record = convert(source, modules, chosen, target, lambda _: None)
    prepared = prepare(target, base, lambda _: None)
    (target / CONFIG_NAME).write_bytes(prepared.config)
    return record, prepared


def train(folder: Path, base_folder: Path, kind: str, **settings: Any) -> Deltas:
    """Save an adapter with random weights; return what it adds to each weight when merged."""
    torch.manual_seed(0)  # of what is not noise
    before = load_base(base_folder)
    options = {"target_modules": ["q_proj", "v_proj", "up_proj"]} | settings
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_base(base_folder), config)
    add_noise(model, 0.1)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(load_base(base_folder), str(folder))
    after = dict(loaded.merge_and_unload().named_parameters())
    return {
        name.removesuffix(".weight"): (after[name] - weight).detach()
        for name, weight in before.named_parameters()
        if not torch.equal(after[name], weight)
    }


def converted(
    folder: Path, target: Path, base: BaseModel, **options: Any
) -> tuple[ConversionRecord, Deltas]:
    """Convert an upload and check the result as an upload of its own; return its deltas."""
    record, _ = convert_and_check(folder, target, base, **options)
    tensors = load_file(target / WEIGHTS_NAME)
    return record, {
        name: m.scaling * tensors[m.lora_b].float() @ tensors[m.lora_a].float()
        for name, m in read_lora_layout(target).modules.items()
    }


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
