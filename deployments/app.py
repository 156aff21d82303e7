"""The Serve graph: one Ingress deployment in front of one Engine deployment per base model.

What a deployment does is in `ingress` and `replica`; here is how Ray starts, stops and scales it.
"""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingPolicy,
    RequestRouterConfig,
)
from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]

from deployments.config import AppConfig, check_exposure, load_config
from deployments.config_sections import ModelSection, ReplicasSection
from deployments.fleet.router import AdapterRouter
from deployments.ingress.deployment import IngressDeployment
from deployments.installation import check_one_installation
from deployments.live_settings import engine_name
from deployments.policy.redeploy import Room, replicas_first
from deployments.replica.autoscaler import LoadPolicy
from deployments.replica.deployment import EngineDeployment
from deployments.room import free_room, needs_of

# Ray's own limit is far above ours: requests are counted at the engine.
MAX_ONGOING = 100_000
# Seconds between two reports of figures to routers, and to the autoscaler. A router that has no
# choice needs them for the time of a redeploy alone.
ROUTING_STATS_PERIOD_S = 0.5
LONE_ROUTING_STATS_PERIOD_S = 5.0
SCALING_STATS_PERIOD_S = 1.0
SCALING_LOOK_BACK_S = 1.5  # Ray wants it above the period; the policy averages for itself
# Extra time after a drain: last frames, slow observers, engine exit.
STOP_MARGIN_S = 10.0
# Time to finish answers: they cannot move to another ingress.
INGRESS_DRAIN_S = 600.0
SHUTDOWN_POLL_S = 0.5
HEALTH_CHECK_S = 2.0
FAST_PATH = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")

logger = logging.getLogger(__name__)


def build_app(args: dict[str, Any]) -> Application:
    """Build the whole graph. Raises ConfigError for anything in `args` that is not understood."""
    check_one_installation()
    config = load_config(args)
    check_exposure(config.tenancy, http_host())
    warn_if_slow(os.environ)
    surges = surge_percents(config.models, free_room())
    engines: dict[str, Application] = {}
    for number, model in enumerate(config.models):
        name = engine_name(number)
        engine: Any = serve.deployment(
            EngineDeployment, name=name, **engine_options(model, surges[number])
        )
        engines[model.id] = engine.bind(config, model)
    ingress: Any = serve.deployment(IngressDeployment, name="Ingress", **ingress_options(config))
    return ingress.bind(config, engines)


def http_host() -> str | None:
    """Find where the cluster's Serve listens; None if it does not listen, or does not run."""
    client = (
        _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    )
    return None if client is None else client.http_config.host


def warn_if_slow(environment: Mapping[str, str]) -> None:
    missing = [name for name in FAST_PATH if environment.get(name) != "1"]
    if missing:
        logger.warning(
            "%s not set: each streamed token will cost about six times the CPU. Set both to 1 on "
            "every node and where the application is built.",
            " and ".join(f"{name}=1" for name in missing),
        )


def ingress_options(config: AppConfig) -> dict[str, Any]:
    return {
        "num_replicas": config.ingress.replicas,
        "max_ongoing_requests": MAX_ONGOING,
        "ray_actor_options": {"num_cpus": config.ingress.num_cpus},
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_timeout_s": INGRESS_DRAIN_S,
        "graceful_shutdown_wait_loop_s": SHUTDOWN_POLL_S,
    }


def engine_options(model: ModelSection, surge_percent: int) -> dict[str, Any]:
    replicas = model.replicas
    keep_s = replicas.drain_s + STOP_MARGIN_S
    scale = (
        {"autoscaling_config": autoscaling_config(model)}
        if replicas.min < replicas.most
        else {"num_replicas": replicas.min}
    )
    return {
        **scale,
        "max_ongoing_requests": MAX_ONGOING,
        "ray_actor_options": _actor_options(replicas),
        "max_surge_percent": surge_percent,
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_timeout_s": keep_s,
        "graceful_shutdown_wait_loop_s": SHUTDOWN_POLL_S,
        "request_router_config": RequestRouterConfig(**_router_options(keep_s, model)),
    }


def _actor_options(replicas: ReplicasSection) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus}
    return options | ({"label_selector": dict(replicas.labels)} if replicas.labels else {})


def surge_percents(models: Sequence[ModelSection], room: Room) -> list[int]:
    """Return what the models are configured to, or what there is room for in their order."""
    percents: list[int] = []
    for model in models:
        percent = model.replicas.surge_percent
        if percent is None:
            percent, room, reason = replicas_first(needs_of(model), room)
            order = "starts a new replica first" if percent else "stops an old replica first"
            logger.info("a redeploy of %s %s: %s", model.id, order, reason)
        percents.append(percent)
    return percents


def _router_options(keep_s: float, model: ModelSection) -> dict[str, Any]:
    return {
        "request_router_class": AdapterRouter,
        "request_router_kwargs": {"keep_s": keep_s, "max_num_seqs": model.engine.max_num_seqs},
        "request_routing_stats_period_s": (
            LONE_ROUTING_STATS_PERIOD_S if model.replicas.most == 1 else ROUTING_STATS_PERIOD_S
        ),
        "request_routing_stats_timeout_s": 5.0,
    }


def autoscaling_config(model: ModelSection) -> AutoscalingConfig:
    """Return Ray's settings: the policy decides, and nothing of Ray's delays or scales it."""
    replicas, scaling = model.replicas, model.replicas.autoscaling
    arguments = {"objective": asdict(scaling.objective), "policy": asdict(scaling.policy)}
    with warnings.catch_warnings():
        # Ray announces environment variables in its place, but 2.60 reads only this field. Its
        # default, 10 s, would hide a burst from the autoscaler for that long.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.most,
            metrics_interval_s=SCALING_STATS_PERIOD_S,
            look_back_period_s=SCALING_LOOK_BACK_S,
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            downscale_to_zero_delay_s=0.0,
            upscaling_factor=1.0,
            downscaling_factor=1.0,
            policy=AutoscalingPolicy(policy_function=LoadPolicy, policy_kwargs=arguments),
        )
