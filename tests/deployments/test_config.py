"""The configuration file: what is accepted, and how the rest is refused."""

from pathlib import Path
from typing import Any

import pytest

from deployments.config import load_config
from deployments.config_sections import parse_bytes
from deployments.local.serve_yaml import read_application
from engine.config import ConfigError

MODEL: dict[str, Any] = {"id": "demo", "source": "somewhere"}


def with_format(entry: dict[str, str]) -> dict[str, Any]:
    return {"models": [{**MODEL, "adapter_tool_formats": [entry]}]}


def test_a_minimal_configuration_has_defaults_and_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config({"models": [MODEL], "adapters": {"root": "file://store"}})
    assert config.models[0].source == str(tmp_path / "somewhere")
    assert config.adapters.root == f"file://{tmp_path}/store"
    assert config.engine_config(config.models[0]).max_num_seqs == 64


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"models": [MODEL], "nonsense": 1}, "nonsense: unknown key"),
        ({"models": [{**MODEL, "engine": {"max_seqs": 1}}]}, "models.0.engine.max_seqs: unknown"),
        ({"models": [{**MODEL, "engine": {"memory_bytes": "2 bananas"}}]}, "'2 bananas'"),
        ({"models": [{**MODEL, "engine": {"max_num_seqs": 0}}]}, "max_num_seqs=0 is outside"),
        ({"models": [{**MODEL, "engine": {"max_num_seqs": "8"}}]}, "models.0.engine.max_num_seqs"),
        ({"models": [{**MODEL, "replicas": {"min": -1}}]}, "models.0.replicas.min"),
        ({"models": [{**MODEL, "replicas": {"min": 3, "max": 2}}]}, "min=3 must be at most max=2"),
        ({"models": [{**MODEL, "replicas": {"drain_s": -1.0}}]}, "models.0.replicas.drain_s"),
        ({"models": [{**MODEL, "id": "a@b"}]}, "models.0.id"),
        ({"models": [{**MODEL, "tool_format": "x"}]}, "models.0.tool_format: Value error, must be"),
        (
            {
                "models": [
                    {**MODEL, "adapter_tool_formats": [{"adapter": "sql", "tool_format": "x"}]}
                ]
            },
            "models.0.adapter_tool_formats.0.tool_format: Value error, must be auto, none or one",
        ),
        (
            {
                "models": [
                    {**MODEL, "adapter_tool_formats": [{"adapter": "a b", "tool_format": "glm"}]}
                ]
            },
            "models.0.adapter_tool_formats.0.adapter: ",
        ),
        (
            with_format({"adapter": "sql"}),
            "models.0.adapter_tool_formats.0.tool_format: Field required",
        ),
        ({"models": []}, "models"),
        ({}, "models"),
        ({"models": [MODEL, MODEL]}, "distinct"),
        ({"models": [MODEL], "tenancy": {"mode": "keys"}}, "tenancy.keys_file"),
    ],
)
def test_a_bad_setting_is_refused_with_its_path(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(args)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("2GiB", 2 << 30), ("1.5 KB", 1500), ("7", 7), ("64MiB", 64 << 20), (12, 12), ("3B", 3)],
)
def test_sizes_in_bytes_have_units(text: object, wanted: int) -> None:
    assert parse_bytes(text) == wanted


def test_the_configurations_that_come_along_are_valid() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs").glob("[!s]*.yaml"))
    assert paths
    for path in paths:
        load_config(read_application(path)["args"])


@pytest.mark.parametrize("more", [{"load_from": ["/x"]}, {}], ids=["load_from", "admin"])
def test_a_store_with_one_writer_takes_nothing_from_clients(more: dict[str, Any]) -> None:
    args: dict[str, Any] = {
        "models": [{"id": "m", "source": "m"}],
        "adapters": {"single_writer": True, **more},
        "tenancy": {"mode": "keys", "keys_file": "keys.yaml"},
    }
    args |= {} if more else {"admin": {"enabled": True}}
    with pytest.raises(ConfigError, match=r"not where adapters\.single_writer is true"):
        load_config(args)
