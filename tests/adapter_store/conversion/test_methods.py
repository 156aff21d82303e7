"""Methods other than LoRA become the factors of what PEFT would merge into the weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_store.bases import BaseModel
from adapter_store.peft_config import CONFIG_NAME
from tests.adapter_store.training import converted, distance, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor"),
]
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
    "GraLoRA": ("Gralora", {"r": 4, "gralora_k": 2, "hybrid_r": 3}),
    "C3A": ("C3A", {"block_size": 4}),
    "HRA": ("HRA", {"r": 4}),
    "HRA, orthogonal": ("HRA", {"r": 4, "apply_GS": True}),
    "OFT": ("OFT", {"oft_block_size": 8}),
    "OFT, exact": ("OFT", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "OFT, shared": ("OFT", {"oft_block_size": 8, "block_share": True}),
    "OFT, few terms": ("OFT", {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "BOFT": ("BOFT", {"boft_block_size": 4}),
    "BOFT, butterfly": ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
}


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
