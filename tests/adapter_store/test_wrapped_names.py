"""Adapters keep their meaning whatever wrapped the model that was trained; what cannot is named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from adapter_store.bases import BaseModel
from adapter_store.errors import AdapterInvalid
from adapter_store.layout import read_lora_layout
from adapter_store.manifest import CONFIG_NAME, PreparedAdapter, prepare
from adapter_store.wrapped_names import plain_name, without_prefix
from tests.adapter_store.adapters import PREFIX, changed, write_peft

Check = Callable[[Path], PreparedAdapter]
Tensors = dict[str, np.ndarray]
SETTINGS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "alpha_pattern": {"layers.1.self_attn.v_proj": 32},
}
WRAPPED = {
    "torch.compile": ("model.layers", "_orig_mod.model.layers"),
    "FSDP": (".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "FSDP, compiled": ("model.layers", "_fsdp_wrapped_module._orig_mod.model.layers"),
    "checkpointing": (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "DDP": (PREFIX, f"module.{PREFIX}"),
    "DDP below PEFT": ("model.layers", "module.model.layers"),
    "DeepSpeed": (PREFIX, f"_forward_module.{PREFIX}"),
    "a multimodal model": ("model.layers", "model.language_model.layers"),
    "an older multimodal model": ("model.layers", "language_model.model.layers"),
    "a model without an output layer": ("model.layers", "layers"),
    "several": ("model.layers", "_orig_mod.module.model.language_model.layers"),
}


@pytest.fixture(scope="module")
def folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("named")
    write_peft(target, base_folder, **SETTINGS)
    return target


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    def rename(tensors: Tensors) -> Tensors:
        found = {name.replace(f"{PREFIX}{old}", f"{PREFIX}{new}") for name in tensors}
        if found == set(tensors):
            return {name.replace(old, new): tensor for name, tensor in tensors.items()}
        return {
            name.replace(f"{PREFIX}{old}", f"{PREFIX}{new}"): tensor
            for name, tensor in tensors.items()
        }

    return rename


def effect(folder_or_manifest: Any) -> dict[str, tuple[int, float]]:
    return {
        name if name.startswith("model.") else f"model.{name}": (m.lora_rank, m.scaling)
        for name, m in folder_or_manifest.modules.items()
    }


@pytest.mark.parametrize("names", WRAPPED.values(), ids=WRAPPED)
def test_an_adapter_of_a_wrapped_model_means_what_the_plain_one_means(
    names: tuple[str, str], folder: Path, tmp_path: Path, check: Check
) -> None:
    wrapped = changed(folder, tmp_path / "a", tensors=renamed(*names))
    prepared = check(wrapped)
    assert effect(prepared.manifest) == effect(check(folder).manifest)
    (wrapped / CONFIG_NAME).write_bytes(prepared.config)  # as it is stored, and loaded again
    assert read_lora_layout(wrapped).modules == prepared.manifest.modules


def test_patterns_may_name_the_part_of_a_multimodal_model(
    folder: Path, tmp_path: Path, check: Check
) -> None:
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|feed_forward|ffn|dense).*?"
        r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\."
        r"[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))"
    )
    settings = {
        "target_modules": pattern,
        "alpha_pattern": {r"model\.language_model\.layers\.1\.self_attn\.v_proj": 32},
    }
    rename = renamed("model.layers", "model.language_model.layers")
    wrapped = changed(folder, tmp_path / "a", settings, rename)
    prepared = check(wrapped)
    assert effect(prepared.manifest) == effect(check(folder).manifest)
    (wrapped / CONFIG_NAME).write_bytes(prepared.config)
    assert read_lora_layout(wrapped).modules == prepared.manifest.modules


@pytest.mark.parametrize(
    ("old", "new", "reasons"),
    [
        ("model.layers", "base_model.model.model.layers", ["on top of another", "merge"]),
        ("model.layers", "vision_tower.encoder.layers", ["vision_tower", "multimodal", "frozen"]),
        (".lora_A.weight", ".lora_A.policy.weight", ["'policy'", "selected_adapters"]),
        (".lora_A.weight", ".lora_a", ["MLX", "--convert"]),
        (".lora_A.weight", ".lora_down.weight", ["kohya"]),
        (".lora_A.weight", ".hada_w1_a", ["another method", "--convert"]),
        ("q_proj.lora_A.weight", "_flat_param", ["FSDP", "FULL_STATE_DICT"]),
        ("q_proj", "q_proj\n", ["blanks"]),
    ],
)
def test_a_name_that_cannot_be_served_is_refused_with_its_cause(
    old: str, new: str, reasons: list[str], folder: Path, tmp_path: Path, check: Check
) -> None:
    with pytest.raises(AdapterInvalid) as error:
        check(changed(folder, tmp_path / "a", tensors=renamed(old, new)))
    assert all(reason in str(error.value) for reason in reasons), error.value


def test_shards_that_zero_3_did_not_gather_are_refused_with_the_cause(
    folder: Path, tmp_path: Path, check: Check
) -> None:
    def emptied(tensors: Tensors) -> Tensors:
        return {name: np.zeros(0, np.float32) for name in tensors}

    with pytest.raises(AdapterInvalid, match=r"lora_A.* is empty.*ZeRO-3.*gather"):
        check(changed(folder, tmp_path / "a", tensors=emptied))


def test_a_base_may_have_wrapped_names_too(base: BaseModel, folder: Path, check: Check) -> None:
    modules = {
        name.replace("model.", "language_model.model."): s for name, s in base.modules.items()
    }
    prepared = prepare(folder, replace(base, modules=modules), lambda _: None)
    assert prepared.manifest == check(folder).manifest


@pytest.mark.slow
def test_the_adapter_of_a_multimodal_model_fits_its_text_model(
    tmp_path: Path, base: BaseModel
) -> None:
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    for target, is_served in ((r".*language_model.*\.(q|v)_proj", True), ("q_proj", False)):
        targets = target if is_served else [target]
        config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        folder = tmp_path / target.strip(".*\\")[-6:]
        peft_model = get_peft_model(model, config)
        peft_model.save_pretrained(folder)
        peft_model.unload()
        if is_served:
            prepared = prepare(folder, base.fingerprint, base.modules, lambda _: None)
            assert len(prepared.manifest.modules) == 4
        else:
            with pytest.raises(AdapterInvalid, match=r"vision_tower.*multimodal"):
                prepare(folder, base.fingerprint, base.modules, lambda _: None)


def test_names_are_read_as_a_whole() -> None:
    assert plain_name("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert plain_name("model.my_orig_mod.layers.0.x") == "model.my_orig_mod.layers.0.x"
    assert plain_name("language_model.lm_head") == "lm_head"
    assert without_prefix("model.layers.0.x.lora_A.weight") == "model.layers.0.x.lora_A.weight"
    assert plain_name(without_prefix("model.base_model.model.model.layers.0.x")).startswith("model")
