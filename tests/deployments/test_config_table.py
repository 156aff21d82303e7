"""The table of keys comes from the models, and the models agree with the engine."""

from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from deployments.config import AppConfig
from deployments.config_sections import (
    AdaptersSection,
    EngineSection,
    ModelSection,
    SpeculationSection,
)
from deployments.config_table import config_keys, config_table
from engine.config import EngineConfig, SpeculationConfig

CONFIGURATION = Path(__file__).parents[2] / "docs" / "configuration.md"
OF_MODEL = {"source", "dtype", "quantization", "generation_config"}
ELSEWHERE = OF_MODEL | {"host_adapter_bytes", "speculation"}  # in other sections


def test_the_documented_table_is_this_one() -> None:
    assert config_table() in CONFIGURATION.read_text(), "print it with `reef config-keys`"


@pytest.mark.parametrize(("path", "field"), list(config_keys(AppConfig)))
def test_every_key_says_what_it_means(path: str, field: object) -> None:
    description = getattr(field, "description", None)
    assert description and "|" not in description and not description.endswith(".")


def test_a_row_has_the_key_its_default_and_its_meaning() -> None:
    rows = config_table().splitlines()
    assert rows[2] == "| `models[].id` | | the base model's name in the API |"
    beginnings = [
        "| `models[].engine.max_num_seqs` | 64 | ",
        "| `models[].engine.enable_prefix_caching` | true | ",
        "| `models[].engine.num_threads` | all cores | ",
        "| `models[].replicas.autoscaling.kv_used` | 0.8 | ",
        "| `adapters.disk_bytes` | `10GiB` | ",
        "| `adapters.root` | `file://.data/store` | ",
    ]
    assert all(any(row.startswith(beginning) for row in rows) for beginning in beginnings)


def test_the_section_of_speculation_is_the_engines() -> None:
    wanted = {f.name: f.default for f in fields(SpeculationConfig)}
    assert {name: f.default for name, f in SpeculationSection.model_fields.items()} == wanted
    assert get_type_hints(SpeculationSection).items() >= get_type_hints(SpeculationConfig).items()


def test_the_engines_section_is_the_engines_config() -> None:
    """Field by field: names, types and defaults."""
    wanted = {f.name: f.default for f in fields(EngineConfig) if f.name not in ELSEWHERE}
    shown = EngineSection.model_fields.items()
    assert {name: f.default for name, f in shown if name != "speculation"} == wanted
    of_config, of_section = get_type_hints(EngineConfig), get_type_hints(EngineSection)
    assert all(of_section[name] == of_config[name] for name in wanted)


def test_what_other_sections_say_of_the_engine_is_its_config_too() -> None:
    defaults = {f.name: f.default for f in fields(EngineConfig)}
    model, adapters = ModelSection.model_fields, AdaptersSection.model_fields
    assert model["dtype"].default == defaults["dtype"]
    assert model["quantization"].default == defaults["quantization"]
    assert model["generation_config"].default == defaults["generation_config"]
    assert adapters["host_bytes"].default == defaults["host_adapter_bytes"]
