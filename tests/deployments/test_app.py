"""The Serve graph: Ray's options for the deployments, and what they import."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import RayActorOptionsSchema

from deployments.app import autoscaling_config, engine_options, surge_percents
from deployments.config import load_config
from deployments.policy.redeploy import Room
from deployments.replica.autoscaler import LoadPolicy
from deployments.room import DEFAULT_MEMORY_BYTES, needs_of
from engine.backends import needs
from engine.config import ConfigError


def model(**replicas: Any) -> Any:
    section = {"id": "m", "source": "somewhere", "replicas": replicas}
    return load_config({"models": [section]}).models[0]


def test_a_range_of_replicas_switches_autoscaling_on() -> None:
    scaling = {"ttft_s": 1.5, "busy": 0.5}
    config = autoscaling_config(model(min=2, max=5, autoscaling=scaling))
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert config.policy.policy_kwargs["objective"] == {"ttft_s": 1.5, "tpot_s": 0.2}
    assert config.policy.policy_kwargs["policy"]["busy"] == 0.5
    LoadPolicy(**config.policy.policy_kwargs)
    assert "num_replicas" not in engine_options(model(min=2, max=5), 0)


def test_a_model_may_be_without_replicas_and_says_how_many_there_may_be() -> None:
    config = autoscaling_config(model(min=0, max=2, autoscaling={"zero_delay_s": 7.0}))
    assert (config.min_replicas, config.max_replicas) == (0, 2)
    assert config.policy.policy_kwargs["policy"]["zero_delay_s"] == 7.0
    with pytest.raises(ConfigError, match="min=0 needs a max of at least 1"):
        model(min=0)


@pytest.mark.parametrize("replicas", [{"min": 3}, {"min": 3, "max": 3}])
def test_a_fixed_number_of_replicas_leaves_autoscaling_off(replicas: dict[str, int]) -> None:
    options = engine_options(model(**replicas), 0)
    assert options["num_replicas"] == 3 and "autoscaling_config" not in options


def test_labels_select_the_nodes_as_ray_understands_them() -> None:
    labels = {
        "ray.io/accelerator-type": "H100",
        "ray.io/market-type": "!spot",
        "zone": "in(a-1, b_2)",
        "rack": "!in(x,y)",
    }
    options = engine_options(model(labels=labels), 0)["ray_actor_options"]
    assert options["label_selector"] == labels
    RayActorOptionsSchema.model_validate(options)
    assert "label_selector" not in engine_options(model(), 0)["ray_actor_options"]


@pytest.mark.parametrize("labels", [{"zone": "a b"}, {"zone": "in()"}, {"-zone": "a"}, {"z": ""}])
def test_labels_that_ray_would_not_take_are_refused_by_name(labels: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"replicas.labels.{next(iter(labels))}"):
        model(labels=labels)


def test_ray_waits_longer_for_a_replica_than_the_replica_for_its_requests() -> None:
    options = engine_options(model(drain_s=50.0), 0)
    assert options["graceful_shutdown_timeout_s"] > 50.0


@pytest.mark.parametrize("percent", [0, 1, 100])
def test_a_configured_surge_is_taken_as_it_is(percent: int) -> None:
    configured = model(surge_percent=percent, num_gpus=1)
    assert surge_percents([configured], Room(num_cpus=0, nbytes=0)) == [percent]
    assert engine_options(configured, percent)["max_surge_percent"] == percent


@pytest.mark.parametrize("percent", [-1, 101, 1.5, "50"])
def test_a_surge_that_is_no_percentage_is_refused(percent: object) -> None:
    with pytest.raises(ConfigError, match="surge_percent"):
        model(surge_percent=percent)


def test_one_replica_is_started_first_as_long_as_there_is_room(caplog: Any) -> None:
    caplog.set_level("INFO")
    models = [model(), model(), model()]
    assert surge_percents(models, Room()) == [1, 1, 1], "what is not known refuses nothing"
    assert surge_percents(models, Room(num_cpus=2.5)) == [1, 1, 0]
    assert "0.5 CPUs are free, not 1" in caplog.text
    assert surge_percents(models, Room(nbytes=DEFAULT_MEMORY_BYTES)) == [1, 0, 0]
    assert f"0 bytes of memory are free, not {DEFAULT_MEMORY_BYTES}" in caplog.text


def test_on_a_gpu_no_replica_is_started_first() -> None:
    def on(device: str, has_gpus: bool, **replicas: Any) -> list[int]:
        section = {"id": "m", "source": "x", "engine": {"device": device}, "replicas": replicas}
        models = load_config({"models": [section]}).models
        return surge_percents(models, Room(has_gpus=has_gpus))

    assert on("cuda", False) == on("auto", True) == on("auto", False, num_gpus=0.5) == [0]
    assert on("cpu", True) == on("auto", False) == [1]


def test_a_replica_needs_its_weights_and_its_arena(tmp_path: Path) -> None:
    for name, nbytes in (("a.safetensors", 100), ("b.safetensors", 20), ("tokenizer.json", 3)):
        (tmp_path / name).write_bytes(bytes(nbytes))
    section = {"id": "m", "source": str(tmp_path), "engine": {"memory_bytes": "4KiB"}}
    assert needs_of(load_config({"models": [section]}).models[0]).nbytes == 120 + 4096
    assert DEFAULT_MEMORY_BYTES == needs.DEFAULT_MEMORY_BYTES


def test_serving_processes_never_import_torch() -> None:
    names = [f"deployments.{module}" for module in ("app", "local.serve")]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
