"""Every method that the installed PEFT has is served as PEFT runs it, or refused by its name."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from adapter_store.bases import BaseModel
from adapter_store.conversion.convert import open_upload
from adapter_store.conversion.options import ConversionOptions
from adapter_store.errors import AdapterInvalid
from tests.adapter_store.adapters import load_base
from tests.adapter_store.training import add_noise, convert_and_check

TYPES = sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
CONVERTED = [
    *("ADALORA", "BOFT", "C3A", "DELORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA"),
    *("LOKR", "MISS", "OFT", "TRAINABLE_TOKENS", "VERA"),
]
LINEAR = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, **LINEAR},
    "BOFT": {"boft_block_size": 4, **LINEAR},
    "C3A": {"block_size": 8, **LINEAR},
    "GRALORA": {"r": 4, "hybrid_r": 2, **LINEAR},
    "IA3": {},
    "LN_TUNING": {"target_modules": r".*(layernorm|model\.norm)"},
    "MISS": {"r": 4, **LINEAR},
    "OFT": {"oft_block_size": 8, **LINEAR},
    "TRAINABLE_TOKENS": {"token_indices": [2, 9, 63]},
}


@pytest.mark.parametrize("peft_type", [t for t in TYPES if t not in (*CONVERTED, "LORA")])
def test_what_is_not_converted_is_refused_by_its_name(peft_type: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    with pytest.raises(AdapterInvalid, match=f"peft_type='{peft_type}' cannot be converted"):
        open_upload(tmp_path, ConversionOptions(base_folder=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("peft_type", CONVERTED)
def test_what_is_converted_computes_as_peft_does(
    peft_type: str, base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    settings = SETTINGS.get(peft_type, LINEAR)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_base(base_folder), config)
        add_noise(model, 0.2)
        model.save_pretrained(tmp_path / "upload")
        converted, _ = convert_and_check(
            tmp_path / "upload", tmp_path / "out", base, lora_rank=64, base_folder=base_folder
        )
        expected, found = (logits(base_folder, tmp_path / name) for name in ("upload", "out"))
    assert converted.max_residual < 1e-5
    assert (expected - logits(base_folder, None)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def logits(base_folder: Path, adapter: Path | None) -> torch.Tensor:
    model: torch.nn.Module = load_base(base_folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()(torch.arange(64)[None]).logits
