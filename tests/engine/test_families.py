"""Tests every family against transformers: equal logits, with paged cache, and greedy text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from engine.backends.torch.ops import torch_build
from engine.model.config_keys import IRRELEVANT
from engine.model.decoder import Decoder
from engine.model.families import FAMILIES, read_dtype, read_spec
from engine.model.loader import load_decoder
from engine.model.spec import ModelError
from tests.engine.support.tiny import (
    MODEL_TYPES,
    SIZES,
    Tiny,
    greedy,
    logits_in_chunks,
    random_prompt,
    reference_greedy,
    reference_logits,
)

MakeTiny = Callable[..., Tiny]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MODEL_TYPES},
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, a key head per query head": ("llama", {"num_key_value_heads": 4}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, own head size": ("llama", {"head_dim": 20}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window in late layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3, biases and windows": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma2, tied, biases": ("gemma2", {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma2, no caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3, tied, capped logits": (
        "gemma3_text",
        {"tie_word_embeddings": True, "final_logit_softcapping": 6.0},
    ),
    "phi3, window": ("phi3", {"sliding_window": 9}),
    "phi3, part of each head turned, tied": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
}


def load(folder: Path, dtype: torch.dtype = torch.float32, max_model_len: int = 256) -> Decoder:
    cpu = torch.device("cpu")
    return load_decoder(folder, torch_build(cpu, dtype), max_model_len=max_model_len)


def changed_config(folder: Path, source: Path, **changes: Any) -> Path:
    """Write a folder with the config of `source` and these changes; ... removes a key."""
    config = json.loads((source / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


# ==== equal results ====


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers_however_the_prompt_is_cut(
    name: str, tiny_model: MakeTiny
) -> None:
    model_type, changes = CASES[name]
    tiny = tiny_model(model_type, **changes)
    decoder, prompt = load(tiny.folder), random_prompt(41)
    expected = reference_logits(tiny.reference, prompt)
    for chunk in (len(prompt), 7, 1):
        found = logits_in_chunks(decoder, prompt, chunk)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_equals_that_of_transformers(name: str, tiny_model: MakeTiny) -> None:
    model_type, changes = CASES[name]
    tiny = tiny_model(model_type, **changes)
    prompt = random_prompt(12)
    expected = reference_greedy(tiny.reference, prompt, 64)
    assert len(set(expected)) > 16, "the text is too dull to tell right from wrong"
    assert greedy(load(tiny.folder), prompt, 64) == expected


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(
    model_type: str, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    rounded = tiny_model(model_type, dtype=torch.bfloat16)
    prompt = random_prompt(41)
    decoder = load(rounded.folder, torch.bfloat16)
    exact = logits_in_chunks(load(rounded.folder), prompt, 41)
    allowed = (reference_logits(rounded.reference, prompt) - exact).abs().max()
    for chunk in (41, 7, 1):
        error = (logits_in_chunks(decoder, prompt, chunk) - exact).abs().max()
        assert error <= 1.5 * allowed


def test_an_adapter_can_name_every_linear_layer_of_a_checkpoint(tiny_model: MakeTiny) -> None:
    for model_type in ("llama", "phi3"):
        tiny = tiny_model(model_type)
        sites = load(tiny.folder).lora_sites
        found = {
            s.module: (s.out_features, site.in_features) for site in sites for s in site.slices
        }
        expected = {
            name: (module.out_features, module.in_features)
            for name, module in tiny.reference.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
        assert found == expected
        assert [site.site for site in sites[:4]] == ["qkv", "o", "gate_up", "down"]


# ==== configs ====


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_key_of_a_config_class_is_without_a_meaning(
    model_type: str, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    keys = [*AutoConfig.for_model(model_type).to_dict(), "per_layer_config", "new_key"]
    for key in keys:
        if key not in IRRELEVANT:
            folder = changed_config(tmp_path, tiny_model(model_type).folder, **{key: "nonsense"})
            with pytest.raises(ModelError, match="nonsense"):
                read_spec(folder, None)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_absent_key_has_the_default_of_transformers(model_type: str, tmp_path: Path) -> None:
    stated = SIZES | {"head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": ...}
    given = {key: value for key, value in stated.items() if value is not ...}
    full, bare = tmp_path / "full", tmp_path / "bare"
    full.mkdir()
    bare.mkdir()
    config = AutoConfig.for_model(model_type, **given).to_dict()
    (full / "config.json").write_text(json.dumps(config))
    (bare / "config.json").write_text(json.dumps(given | {"model_type": model_type}))
    assert read_spec(bare, None) == read_spec(full, None)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_missing_size_is_refused_or_defaults_as_in_transformers(
    model_type: str, tmp_path: Path
) -> None:
    stated = SIZES | {"head_dim": 16, "rms_norm_eps": 1e-6, "model_type": model_type}
    for key in (key for key in stated if key != "model_type" and "token" not in key):
        left = {k: v for k, v in stated.items() if k != key}
        (tmp_path / "config.json").write_text(json.dumps(left))
        try:
            found = read_spec(tmp_path, None)
        except ModelError as refusal:
            assert key in str(refusal)
            continue
        config = AutoConfig.for_model(**left).to_dict()
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert found == read_spec(tmp_path, None)


OLD_FORMS = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2": {"rope_theta": 1e6, "rope_scaling": None, "use_mrope": False},
    "gemma3_text": {
        "rope_theta": 2e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": ...,
        "sliding_window_pattern": 2,
        "cache_implementation": "hybrid",
    },
    "phi3": {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 6, "long_factor": [2.5] * 6},
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    },
}


@pytest.mark.parametrize("model_type", OLD_FORMS)
def test_configs_of_older_files_are_read_as_by_transformers(
    model_type: str, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    changes = OLD_FORMS[model_type] | {"rope_parameters": ..., "torch_dtype": "float32"}
    old = changed_config(tmp_path, tiny_model(model_type).folder, **changes)
    found = read_spec(old, None)
    config = AutoConfig.from_pretrained(old).to_dict()
    new = changed_config(tmp_path, tmp_path, **config | {"rope_scaling": ..., "rope_theta": ...})
    assert found == read_spec(new, None)


def test_the_original_name_of_longrope_is_accepted(tiny_model: MakeTiny, tmp_path: Path) -> None:
    specs = []
    for name in ("su", "yarn", "longrope"):
        scaling = {"type": name, "short_factor": [1.5] * 8, "long_factor": [2.5] * 8}
        changes = {"rope_parameters": ..., "rope_scaling": scaling}
        specs.append(read_spec(changed_config(tmp_path, tiny_model("phi3").folder, **changes), 64))
    assert specs[0] == specs[1] == specs[2]


REFUSED: list[tuple[str, str, Any]] = [
    ("llama", "quantization_config", ["gptq"]),
    ("llama", "hidden_act", "relu"),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "rope_scaling", {"rope_type": "proportional", "factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0, "mrope_section": [4, 4]}),
    ("llama", "architectures", ["LlamaForSequenceClassification"]),
    ("llama", "num_key_value_heads", 3),
    ("llama", "hidden_size", 64.0),
    ("llama", "is_encoder_decoder", True),
    ("mistral", "attention_bias", True),
    ("mistral", "layer_types", ["full_attention"] * 3),
    ("qwen2", "use_mrope", True),
    ("qwen2", "layer_types", ["sliding_attention"] * 3),
    ("qwen2", "layer_types", ["full_attention"] * 2),
    ("gemma2", "use_bidirectional_attention", True),
    ("gemma3_text", "attn_logit_softcapping", 50.0),
    ("gemma3_text", "layer_types", ["chunked_attention"] * 4),
    ("phi3", "attention_bias", True),
    ("phi3", "lm_head_bias", True),
    ("granite", "mlp_bias", "yes"),
    ("llama", "model_type", "mamba"),
]


@pytest.mark.parametrize(("model_type", "key", "value"), REFUSED)
def test_a_config_that_needs_unsupported_computation_is_refused_by_name(
    model_type: str, key: str, value: Any, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    folder = changed_config(tmp_path, tiny_model(model_type).folder, **{key: value})
    with pytest.raises(ModelError, match=_name_in_message(key)) as refusal:
        read_spec(folder, None)
    assert _value_in_message(key, value) in str(refusal.value)


def _name_in_message(key: str) -> str:
    return {"rope_scaling": "rope_parameters", "hidden_act": "activation"}.get(key, key)


def _value_in_message(key: str, value: Any) -> str:
    if key == "rope_scaling":
        return "mrope_section" if "mrope_section" in value else repr(value["rope_type"])
    return "sliding_window=None" if value == ["sliding_attention"] * 3 else repr(value)


@pytest.mark.parametrize("max_model_len", [0, 257])
def test_a_length_beyond_the_models_own_is_refused(
    max_model_len: int, tiny_model: MakeTiny
) -> None:
    with pytest.raises(ModelError, match=rf"max_model_len={max_model_len} is outside 1..256"):
        read_spec(tiny_model().folder, max_model_len)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff"])
def test_a_broken_config_is_refused_by_its_path(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_spec(tmp_path, None)


def test_the_dtype_is_read_under_both_of_its_names(tmp_path: Path) -> None:
    for key, name in (("dtype", "bfloat16"), ("torch_dtype", "float32")):
        (tmp_path / "config.json").write_text(json.dumps({key: name}))
        assert read_dtype(tmp_path) == getattr(torch, name)
    (tmp_path / "config.json").write_text('{"torch_dtype": "int8"}')
    with pytest.raises(ModelError, match="int8"):
        read_dtype(tmp_path)


def test_every_family_has_a_tiny_model() -> None:
    assert set(MODEL_TYPES) == FAMILIES.keys()
