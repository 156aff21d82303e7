"""The Serve graph: one Ingress deployment in front of one Engine deployment per base model.

What a deployment does is in `ingress` and `replica`; here is how Ray starts, stops and scales it.
How the two reach each other is in `connection`, and who goes where in `router`.
"""

import asyncio
import logging
import os
import time
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig, ModelSection, check_exposure, load_config
from deployments.fleet import router
from deployments.fleet.direct_socket import Greeting, WireServer
from deployments.fleet.engine_link import EngineLink
from deployments.fleet.protocol import (
    Abort,
    Frame,
    Hints,
    Lease,
    Receipt,
    StreamId,
    Submit,
    UnknownStream,
)
from deployments.fleet.ray_connection import RayConnection
from deployments.ingress.asgi import Api
from deployments.ingress.limiter import Limiter
from deployments.ingress.metrics import Metrics
from deployments.ingress.model_resolver import Models, ServedModel
from deployments.ingress.routes import Ingress, build_api
from deployments.installation import check_one_installation
from deployments.replica import autoscaler
from deployments.replica.replica import EngineReplica, ReplicaSettings
from deployments.serve_logging import log_to_serves_file
from deployments.stores import open_adapter_store
from deployments.tenants.tenants import open_tenants
from deployments.text.vocabulary import Vocabulary
from engine.client import EngineClient
from engine.gc_freeze import keep_what_is_loaded

# Limits of Ray's own, far above ours: requests are counted where the engine is.
MAX_ONGOING = 100_000
# The controller pulls figures, and sends on those that have changed, this often.
ROUTING_STATS_PERIOD_S = 0.5
SCALING_STATS_PERIOD_S = 1.0
# After a drain: for the last frames, for whoever notices late, and for the engine to end.
STOP_MARGIN_S = 10.0
# An answer cannot move to another ingress, so this one is given the time to finish it.
INGRESS_DRAIN_S = 600.0
FAST_PATH = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")

logger = logging.getLogger(__name__)


def build_app(args: dict[str, Any]) -> Application:
    """The whole graph. Raises ConfigError for anything in `args` that is not understood."""
    check_one_installation()
    config = load_config(args)
    check_exposure(config.tenancy, http_host())
    warn_if_slow(os.environ)
    engines = {
        model.id: serve.deployment(
            EngineDeployment,
            name=f"Engine-{number}" if number else "Engine",
            **_engine_options(model),
        ).bind(config, model)
        for number, model in enumerate(config.models)
    }
    ingress = serve.deployment(
        IngressDeployment,
        name="Ingress",
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        graceful_shutdown_timeout_s=INGRESS_DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return ingress.bind(config, engines)


def http_host() -> str | None:
    """Where the cluster's Serve listens; None where it does not, or there is none yet."""
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


def _engine_options(model: ModelSection) -> dict[str, Any]:
    replicas = model.replicas
    keep_s = replicas.drain_s + STOP_MARGIN_S
    scale = (
        {"autoscaling_config": _autoscaling(model)}
        if replicas.min < replicas.most
        else {"num_replicas": replicas.min}
    )
    return {
        **scale,
        "max_ongoing_requests": MAX_ONGOING,
        "ray_actor_options": {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        "max_surge_percent": replicas.surge_percent,
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": keep_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "request_router_config": RequestRouterConfig(
            request_router_class=router.AdapterRouter,
            request_router_kwargs={"keep_s": keep_s, "max_num_seqs": model.engine.max_num_seqs},
            request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,
            request_routing_stats_timeout_s=5.0,
        ),
    }


def _autoscaling(model: ModelSection) -> AutoscalingConfig:
    replicas, scaling = model.replicas, model.replicas.autoscaling
    targets = {
        "queued_tokens": scaling.target_queued_tokens,
        "kv_used": scaling.target_kv_used,
        "num_requests": scaling.target_requests or float(model.engine.max_num_seqs),
    }
    with warnings.catch_warnings():
        # Ray announces environment variables in its place, but 2.60 reads only this one; its own
        # default, 10 s, would let a burst wait for that long before anybody hears of it.
        warnings.filterwarnings("ignore", "The `metrics_interval_s` field", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.most,
            metrics_interval_s=SCALING_STATS_PERIOD_S,
            look_back_period_s=scaling.look_back_s,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            policy=AutoscalingPolicy(policy_function=autoscaler.LoadPolicy, policy_kwargs=targets),
        )


class EngineDeployment:
    """Running once the model is loaded; failed, with the engine's own words, if it cannot be."""

    async def __init__(self, config: AppConfig, model: ModelSection) -> None:
        log_to_serves_file()
        store = await asyncio.to_thread(open_adapter_store, config.adapters)
        fingerprint = await asyncio.to_thread(store.register_base, Path(model.source))
        engine_config = config.engine_config(model)
        self._id = serve.get_replica_context().replica_id.unique_id
        settings = ReplicaSettings(
            self._id,
            fingerprint,
            engine_config.max_num_seqs,
            engine_config.max_num_seqs + config.ingress.max_queued_requests,
            model.replicas.drain_s,
        )
        self._replica = EngineReplica(
            lambda on_frame: EngineClient(engine_config, on_frame), store, settings
        )
        self._wires = WireServer()
        await self._wires.listen(ray.util.get_node_ip_address())
        await self._replica.start()
        keep_what_is_loaded()

    async def submit(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int], submit: Submit
    ) -> Receipt:
        return self._replica.submit(ingress_id, epochs, submit)

    async def attach(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncIterator[Greeting | Frame]:
        self._check_target(hints)

        def submit(epoch: int, submit: Submit) -> Receipt:
            return self._replica.submit(ingress_id, {self._id: epoch}, submit)

        stream = self._replica.attach(ingress_id, epochs)
        async for item in self._wires.carry(stream, submit):
            yield item

    async def control(
        self, hints: Hints, stream_id: StreamId, aborts: Sequence[Abort], renew: bool
    ) -> Lease | None:
        self._check_target(hints)
        if hints.is_leaving:
            self._replica.drain()
        return await self._replica.control(stream_id, aborts, renew)

    def _check_target(self, hints: Hints) -> None:
        if hints.target not in ("", self._id):
            raise UnknownStream(f"{hints.target} is gone; this is {self._id}")

    # Ray calls what is not async in a thread, beside the loop that changes what they read.

    async def record_routing_stats(self) -> dict[str, Any]:
        return router.to_stats(self._replica.figures())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return autoscaler.to_stats(self._replica.load())

    async def check_health(self) -> None:
        self._replica.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_wires"):
            self._wires.close()
            await self._replica.close()


@serve.ingress()
class IngressDeployment:
    """Up before the engines are, so that /health can say that they are not."""

    def __init__(self, config: AppConfig, engines: dict[str, DeploymentHandle]) -> None:
        log_to_serves_file()
        ingress_id = serve.get_replica_context().replica_id.unique_id
        models = [
            ServedModel(
                model.id,
                Vocabulary.load(Path(model.source)),
                EngineLink(RayConnection(engines[model.id]), ingress_id),
            )
            for model in config.models
        ]
        for model in models:
            model.link.start()
        metrics = Metrics()
        tenants = open_tenants(config.tenancy)
        tenants.start()
        self._ingress = Ingress(
            Models(models, open_adapter_store(config.adapters)),
            tenants,
            Limiter(metrics),
            metrics,
            config.ingress.max_body_bytes,
            int(time.time()),
        )
        keep_what_is_loaded()

    def __serve_build_asgi_app__(self) -> Api:
        return build_api(self._ingress)
