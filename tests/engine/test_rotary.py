"""Tests each RoPE scaling against transformers: angles at real sizes, and whole models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.backends.torch.ops import torch_build
from engine.model.families import read_spec
from engine.model.loader import load_decoder
from engine.model.rotary import RotaryTable
from tests.engine.support.tiny import (
    Tiny,
    greedy,
    logits_in_chunks,
    random_prompt,
    reference_greedy,
    reference_logits,
)

MakeTiny = Callable[..., Tiny]
CPU = torch.device("cpu")

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(64)],
    "long_factor": [1.0 + 0.5 * i for i in range(64)],
    "original_max_position_embeddings": 256,
}
# name: rope parameters, max_position_embeddings, max_model_len. Head dim 128.
REAL: dict[str, tuple[dict[str, Any], int, int]] = {
    "default": ({"rope_type": "default"}, 4096, 4096),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 4096, 4096),
    "dynamic, within the trained length": ({"rope_type": "dynamic", "factor": 4.0}, 512, 512),
    "dynamic, beyond it": ({"rope_type": "dynamic", "factor": 4.0}, 512, 1500),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
        16384,
        4096,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        4096,
        4096,
    ),
    "yarn, all keys": (
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "mscale": 0.707,
            "mscale_all_dim": 1.3,
            "truncate": False,
        },
        163840,
        4096,
    ),
    "yarn, own amplitude": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "attention_factor": 0.9,
        },
        4096,
        4096,
    ),
    "longrope, short": (LONGROPE, 4096, 256),
    "longrope, long": (LONGROPE, 4096, 2048),
    "longrope, own amplitude": (LONGROPE | {"attention_factor": 1.19}, 4096, 2048),
    "longrope, own factor": (LONGROPE | {"factor": 16.0}, 4096, 2048),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_angles_equal_those_of_transformers(name: str, theta: float, tmp_path: Path) -> None:
    parameters, max_position, max_model_len = REAL[name]
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=256,
        max_position_embeddings=max_position,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    config.save_pretrained(tmp_path)
    (rotary,) = read_spec(tmp_path, max_model_len).rotaries
    positions = torch.arange(max_model_len)
    cos, sin = RotaryTable(rotary, max_model_len, torch.float32, CPU)(positions)
    expected = LlamaRotaryEmbedding(config)(torch.empty(1), positions[None])
    half = cos.shape[-1] // 2
    torch.testing.assert_close(cos, expected[0][0], rtol=0.0, atol=5e-4)
    torch.testing.assert_close(sin[:, half:], expected[1][0, :, half:], rtol=0.0, atol=5e-4)
    torch.testing.assert_close(sin[:, :half], -expected[1][0, :, :half], rtol=0.0, atol=5e-4)


TINY_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 2.0 * i for i in range(8)],
    "original_max_position_embeddings": 80,
}
# name: model_type, config changes, max_model_len
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
        256,
    ),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}},
        256,
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        256,
    ),
    "yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        256,
    ),
    "longrope, short": (
        "phi3",
        {"rope_parameters": TINY_LONGROPE, "original_max_position_embeddings": 80},
        80,
    ),
    "linear in full attention only": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        256,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_scaled_model_equals_that_of_transformers(name: str, tiny_model: MakeTiny) -> None:
    model_type, changes, max_model_len = MODELS[name]
    tiny, prompt = tiny_model(model_type, **changes), random_prompt(41)
    decoder = load_decoder(
        tiny.folder, torch_build(CPU, torch.float32), max_model_len=max_model_len
    )
    expected = reference_logits(tiny.reference, prompt)
    for chunk in (41, 7, 1):
        found = logits_in_chunks(decoder, prompt, chunk)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)
    start = prompt[:12]
    assert greedy(decoder, start, 64) == reference_greedy(tiny.reference, start, 64)


BEYOND = {
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": TINY_LONGROPE | {"original_max_position_embeddings": 24},
            "original_max_position_embeddings": 24,
        },
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_length_dependent_scaling_is_settled_by_the_longest_length(
    name: str, tiny_model: MakeTiny
) -> None:
    """transformers changes its angles as a sequence grows; at full length both agree."""
    model_type, changes = BEYOND[name]
    tiny, prompt = tiny_model(model_type, **changes), random_prompt(48)
    decoder = load_decoder(tiny.folder, torch_build(CPU, torch.float32), max_model_len=48)
    expected = reference_logits(tiny.reference, prompt)
    for chunk in (48, 7, 1):
        found = logits_in_chunks(decoder, prompt, chunk)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)
    shorter = load_decoder(tiny.folder, torch_build(CPU, torch.float32), max_model_len=24)
    unscaled = reference_logits(tiny.reference, prompt[:23])
    found = logits_in_chunks(shorter, prompt[:23], 5)
    torch.testing.assert_close(found, unscaled, rtol=0.0, atol=1e-4)


def test_long_phi3_text_equals_that_of_transformers(tiny_model: MakeTiny) -> None:
    model_type, changes = BEYOND["longrope"]
    tiny, prompt = tiny_model(model_type, **changes), random_prompt(30)
    decoder = load_decoder(tiny.folder, torch_build(CPU, torch.float32), max_model_len=128)
    assert greedy(decoder, prompt, 64) == reference_greedy(tiny.reference, prompt, 64)
