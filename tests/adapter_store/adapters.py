"""Make small real adapters with PEFT, and changed copies of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import CONFIG_NAME

PREFIX = "base_model.model."


def write_base(folder: Path, seed: int = 0, **save_options: Any) -> Path:
    """Write a Llama of two layers: hidden size 32, 16 key-value features, 48 in the middle."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder, **save_options)
    return folder


def load_base(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def write_peft(folder: Path, base_folder: Path, seed: int = 1, **settings: Any) -> PeftModel:
    """Save an adapter with PEFT, with B not zero; return the model it was saved from."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | settings
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = get_peft_model(load_base(base_folder), config)
    model.save_pretrained(folder)
    return model.eval()


def changed(
    source: Path,
    target: Path,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
) -> Path:
    """Copy an adapter with other config keys, or with its tensors put through a function."""
    shutil.copytree(source, target)
    if config is not None:
        path = target / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors is not None:
        path = target / WEIGHTS_NAME
        save_file(tensors(load_file(path)), path)
    return target
