"""PEFT's methods that scale or replace parameters are served with PEFT's own logits."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapter_store.bases import describe_base
from adapter_store.conversion.convert import open_upload
from adapter_store.conversion.options import ConversionOptions
from adapter_store.errors import AdapterInvalid
from tests.adapter_store.training import add_noise
from tests.engine.support.extracted import check, extract
from tests.engine.support.kinds import load_plain
from tests.engine.support.tiny import VOCAB_SIZE, write_tiny

KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # the base, its config, the method, its config
    "IA3": ("qwen2", "IA3", {}, {"modules_to_save": ["lm_head"]}),
    "IA3, more": (
        "qwen2",
        "IA3",
        {},
        {
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
    ),
    "IA3, fused": (
        "phi3",
        "IA3",
        {},
        {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "LN tuning": ("llama", "LNTuning", {}, {"target_modules": r".*(layernorm|model\.norm)"}),
    "tokens": ("llama", "TrainableTokens", {}, {"token_indices": [2, 9, 255]}),
    "tied tokens": (
        "llama",
        "TrainableTokens",
        {"tie_word_embeddings": True},
        {"token_indices": [2, 9, 255]},
    ),
}


def write(base: Path, folder: Path, method: str, **settings: Any) -> None:
    config = getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_plain(base), config)
        add_noise(model, 0.4)
        model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("model_type", "method", "of_base", "settings"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if "," in name else ())
        for name, case in KINDS.items()
    ],
)
def test_what_scales_or_replaces_parameters_is_exact(
    model_type: str,
    method: str,
    of_base: dict[str, Any],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    base = write_tiny(tmp_path / "base", model_type, **of_base).folder
    write(base, tmp_path / "upload", method, **settings)
    record, adapter = extract(tmp_path / "upload", base, tmp_path / "adapter")
    assert not record.residuals
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_plain(base), str(tmp_path / "upload")).eval()
    check(base, adapter, model, VOCAB_SIZE)


def test_scaled_inputs_of_other_layers_are_refused(tmp_path: Path) -> None:
    base = write_tiny(tmp_path / "base").folder
    targets = ["k_proj", "o_proj"]
    write(base, tmp_path / "a", "IA3", target_modules=targets, feedforward_modules=["o_proj"])
    options = ConversionOptions(base_folder=base)
    with pytest.raises(AdapterInvalid, match="o_proj: its inputs are scaled"):
        open_upload(tmp_path / "a", options)
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: v[:5] if "k_proj" in n else v.T for n, v in load_file(path).items()}, path)
    described = describe_base(base, tmp_path / "hashes", lambda _: None)
    source = open_upload(tmp_path / "a", options)
    assert source is not None
    name = "model.layers.0.self_attn.k_proj"
    with pytest.raises(AdapterInvalid, match="k_proj has 32 outputs, and ia3_l is for 5"):
        source.change(name, described.modules[name])
