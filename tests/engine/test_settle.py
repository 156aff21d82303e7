"""Tests how open settings are derived from the device and from other settings."""

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
