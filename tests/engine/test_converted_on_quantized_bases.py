"""Methods that multiply the base's weights act on a quantized base as PEFT's layers do."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapter_store.bases import describe_base
from adapter_store.layout import WEIGHTS_NAME, read_lora_layout
from tests.adapter_store.training import add_noise, convert_and_check
from tests.engine.support.tiny import write_tiny

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "OFT": ("OFT", {"oft_block_size": 8}),
    "BOFT": ("BOFT", {"boft_block_size": 4}),
    "HiRA": ("Hira", {"r": 3}),
}
SLOW = {("int8", "OFT"), ("int8", "HiRA")}  # peft's BOFT does not wrap int8 layers


def load_quantized(dense: Path, quantization: str) -> nn.Module:
    config = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    return AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dense"), intermediate_size=128).folder


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        *(("nf4", method) for method in METHODS),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(SLOW)),
    ],
)
def test_a_converted_method_adds_what_pefts_layer_adds(
    quantization: str, method: str, dense: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = load_quantized(dense, quantization)
    model.save_pretrained(tmp_path / "base")
    kind, settings = METHODS[method]
    targets = ["q_proj", "down_proj"]
    config = getattr(peft, f"{kind}Config")(
        task_type="CAUSAL_LM", target_modules=targets, **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config).eval()
    add_noise(adapted, 0.1)
    adapted.save_pretrained(tmp_path / "upload")
    base = describe_base(tmp_path / "base", tmp_path, lambda _: None)
    options: dict[str, Any] = {"lora_rank": 128, "base_folder": tmp_path / "base"}
    convert_and_check(tmp_path / "upload", tmp_path / "out", base, **options)
    tensors = load_file(tmp_path / "out" / WEIGHTS_NAME)
    modules = read_lora_layout(tmp_path / "out").modules
    assert len(modules) == 6
    for name, module in modules.items():
        layer = adapted.get_submodule(f"base_model.model.{name}")
        # where nothing is trained, bitsandbytes multiplies in bfloat16 on some processors
        x = torch.randn(5, module.in_features, requires_grad=True)
        expected = layer(x) - layer.base_layer(x)
        found = module.scaling * x @ tensors[module.lora_a].T @ tensors[module.lora_b].T
        # int8 rounds the input, which is rotated first, to 8 bits in the layer alone
        close = 0.05 if quantization == "int8" else 1e-4
        assert (found - expected).norm() < close * expected.norm(), name
