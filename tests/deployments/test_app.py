"""The Serve graph: Ray's options for the deployments, and what they import."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
import subprocess
import sys
from typing import Any

import pytest

from deployments.app import autoscaling_config, engine_options
from deployments.config import load_config


def model(**replicas: Any) -> Any:
    section = {"id": "m", "source": "somewhere", "replicas": replicas}
    return load_config({"models": [section]}).models[0]


def test_a_range_of_replicas_switches_autoscaling_on() -> None:
    scaling = {"target_requests": 7.0, "upscale_delay_s": 1.5, "look_back_s": 3.0}
    config = autoscaling_config(model(min=2, max=5, autoscaling=scaling))
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    assert (config.upscale_delay_s, config.look_back_period_s) == (1.5, 3.0)
    assert config.policy.policy_kwargs["num_requests"] == 7.0
    assert "num_replicas" not in engine_options(model(min=2, max=5))


@pytest.mark.parametrize("replicas", [{"min": 3}, {"min": 3, "max": 3}])
def test_a_fixed_number_of_replicas_leaves_autoscaling_off(replicas: dict[str, int]) -> None:
    options = engine_options(model(**replicas))
    assert options["num_replicas"] == 3 and "autoscaling_config" not in options


def test_ray_waits_longer_for_a_replica_than_the_replica_for_its_requests() -> None:
    options = engine_options(model(drain_s=50.0))
    assert options["graceful_shutdown_timeout_s"] > 50.0


def test_serving_processes_never_import_torch() -> None:
    names = [f"deployments.{module}" for module in ("app", "local.serve")]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
