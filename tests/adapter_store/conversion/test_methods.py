"""Methods other than LoRA become the factors of what PEFT would merge into the weights."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from adapter_store.bases import BaseModel
from adapter_store.conversion.convert import convert, open_upload
from adapter_store.conversion.options import ConversionOptions
from adapter_store.conversion.record import ConversionRecord
from adapter_store.conversion.upload import vocabulary_shapes
from adapter_store.layout import WEIGHTS_NAME, read_lora_layout
from adapter_store.manifest import prepare
from adapter_store.peft_config import CONFIG_NAME
from tests.adapter_store.adapters import load_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor"),
]
Deltas = dict[str, torch.Tensor]
LORA_LIKE: dict[str, Any] = {
    "r": 3,
    "alpha": 5,
    "rank_pattern": {"layers.1.self_attn.v_proj": 2},
    "alpha_pattern": {"up_proj": 7},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoHa": ("LoHa", LORA_LIKE),
    "LoHa, many ranks": ("LoHa", {"r": 8}),
    "LoKr": ("LoKr", {"r": 4, "alpha": 3}),
    "LoKr, factors": ("LoKr", {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    "VeRA": ("Vera", {"r": 6}),
    "AdaLoRA": ("AdaLora", {"init_r": 5, "lora_alpha": 7, "total_step": 10}),
    "AdaLoRA without alpha": ("AdaLora", {"init_r": 5, "lora_alpha": 0, "total_step": 10}),
    "MiSS": ("Miss", {"r": 5}),
    "MiSS, mini": ("Miss", {"r": 4, "mini_r": 4, "init_weights": "mini"}),
    "HiRA": ("Hira", {"r": 3}),
    "DeLoRA": ("Delora", {"r": 4, "rank_pattern": {"up_proj": 3}}),
    "HRA": ("HRA", {"r": 4}),
    "HRA, orthogonal": ("HRA", {"r": 4, "apply_GS": True}),
    "OFT": ("OFT", {"oft_block_size": 8}),
    "OFT, exact": ("OFT", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "OFT, shared": ("OFT", {"oft_block_size": 8, "block_share": True}),
    "OFT, few terms": ("OFT", {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "BOFT": ("BOFT", {"boft_block_size": 4}),
    "BOFT, butterfly": ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
}


def train(folder: Path, base_folder: Path, kind: str, **settings: Any) -> Deltas:
    """Save an adapter with random weights; return what it adds to each weight when merged."""
    torch.manual_seed(0)
    before = load_base(base_folder)
    options = {"target_modules": ["q_proj", "v_proj", "up_proj"]} | settings
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_base(base_folder), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
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
    chosen = ConversionOptions(**options)
    source = open_upload(folder, chosen)
    assert source is not None
    target.mkdir()
    modules = {**base.modules, **vocabulary_shapes(base.parameters)}
    record = convert(source, modules, chosen, target, lambda _: None)
    prepared = prepare(target, base, lambda _: None)
    (target / CONFIG_NAME).write_bytes(prepared.config)
    tensors = load_file(target / WEIGHTS_NAME)
    return record, {
        name: m.scaling * tensors[m.lora_b].float() @ tensors[m.lora_a].float()
        for name, m in read_lora_layout(target).modules.items()
    }


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


VARIANTS = {name for name in METHODS if "," in name or "without" in name} - {"BOFT, butterfly"}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if name in VARIANTS else ())
        for name, case in METHODS.items()
    ],
)
def test_at_full_rank_a_method_is_what_peft_merges(
    kind: str, settings: dict[str, Any], base_folder: Path, base: BaseModel, tmp_path: Path
) -> None:
    expected = train(tmp_path / "a", base_folder, kind, **settings)
    record, found = converted(
        tmp_path / "a", tmp_path / "b", base, lora_rank=48, base_folder=base_folder
    )
    assert set(found) == set(expected) and len(found) == 6
    # the difference of two weights of size 0.02 has lost digits, of which the factors know nothing
    for name, delta in expected.items():
        assert distance(found[name], delta) < 3e-5, name
    assert record.source == json.loads((tmp_path / "a" / CONFIG_NAME).read_text())["peft_type"]
    assert record.max_residual < 1e-6
