"""Tests how open settings are derived from the device and from other settings."""

import json
from pathlib import Path

import pytest

from engine.backends.needs import arena_bytes
from engine.config import ConfigError, EngineConfig
from engine.settle import settle
from tests.engine.support.tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_tiny(folder, "qwen2")
    return folder


@pytest.mark.parametrize(
    ("max_num_seqs", "told", "settled"),
    [(1, None, 128), (64, None, 128), (200, None, 400), (64, 64, 64), (64, 2048, 2048)],
)
def test_half_of_a_step_is_left_to_prompts_unless_the_config_says_otherwise(
    folder: Path, max_num_seqs: int, told: int | None, settled: int
) -> None:
    config = EngineConfig(
        str(folder), device="cpu", max_num_seqs=max_num_seqs, max_num_batched_tokens=told
    )
    assert settle(config, arena_bytes).max_num_batched_tokens == settled


def test_a_step_too_small_for_the_running_requests_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=63 must be at least max_num_seq"):
        EngineConfig("folder", max_num_seqs=64, max_num_batched_tokens=63)


@pytest.mark.parametrize(
    ("changes", "output_layer"),
    [
        ({}, "model"),
        ({"quantization": "int8"}, "int8"),
        ({"quantization": "int8", "kernels": "torch"}, "int8"),
        ({"quantization": "int8", "output_layer": "model"}, "model"),
        ({"output_layer": "int8"}, "int8"),
        ({"quantization": "int8", "dtype": "float32"}, "model"),
    ],
    ids=str,
)
def test_the_output_layer_is_int8_beside_quantized_linear_layers_unless_the_config_says_otherwise(
    folder: Path, changes: dict[str, str], output_layer: str
) -> None:
    config = EngineConfig(str(folder), device="cpu", **{"dtype": "bfloat16", **changes})
    assert settle(config, arena_bytes).output_layer == output_layer


def test_an_int8_output_layer_is_refused_where_it_would_gain_nothing(folder: Path) -> None:
    config = EngineConfig(str(folder), device="cpu", dtype="float32", output_layer="int8")
    with pytest.raises(ConfigError, match=r"output_layer='int8' .* not torch\.float32 on cpu; use"):
        settle(config, arena_bytes)


def test_auto_quantization_is_int8_for_a_dense_model_in_bfloat16_on_a_cpu(
    folder: Path, tmp_path: Path
) -> None:
    def chosen(folder: Path, dtype: str) -> tuple[str, str]:
        config = EngineConfig(str(folder), device="cpu", dtype=dtype, quantization="auto")
        settled = settle(config, arena_bytes)
        return settled.quantization, settled.weight_format

    assert chosen(folder, "bfloat16") == ("int8", "int8")
    assert chosen(folder, "float32") == ("none", "none")
    quantized = json.loads((folder / "config.json").read_text())
    quantized["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    assert chosen(tmp_path, "bfloat16") == ("none", "int8")
