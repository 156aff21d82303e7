"""The Serve graph: one Ingress deployment in front of one Engine deployment per base model.

The only module, beside `serve`, that imports Ray. What a deployment does is in `ingress` and
`replica`; here is how Ray starts it and how the two reach each other.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from adapter_store.store import AdapterStore
from deployments.config import AppConfig, ModelSection, load_config
from deployments.ingress import Ingress, build_api
from deployments.link import EngineLink
from deployments.metrics import Metrics
from deployments.models import Models, ServedModel
from deployments.replica import EngineReplica
from deployments.text import Vocabulary
from deployments.transport import Command, Frame, Hello, Lease
from engine.client import EngineClient

# Limits of Ray's own, far above ours: requests are counted where the engine is.
MAX_ONGOING = 100_000
FAST_PATH = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")

logger = logging.getLogger(__name__)


def build_app(args: dict[str, Any]) -> Application:
    """The whole graph. Raises ConfigError for anything in `args` that is not understood."""
    config = load_config(args)
    warn_if_slow(os.environ)
    engines = {
        model.id: serve.deployment(
            EngineDeployment,
            name=f"Engine-{number}" if number else "Engine",
            num_replicas=model.replicas.min,
            max_ongoing_requests=MAX_ONGOING,
            ray_actor_options=_actor_options(model),
            health_check_period_s=2,
            # Streams to the ingress never end by themselves: there is nothing to wait for.
            graceful_shutdown_timeout_s=1,
            graceful_shutdown_wait_loop_s=0.5,
        ).bind(config, model)
        for number, model in enumerate(config.models)
    }
    ingress = serve.deployment(
        IngressDeployment,
        name="Ingress",
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": config.ingress.num_cpus},
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return ingress.bind(config, engines)


def warn_if_slow(environment: Mapping[str, str]) -> None:
    missing = [name for name in FAST_PATH if environment.get(name) != "1"]
    if missing:
        logger.warning(
            "%s not set: each streamed token will cost about six times the CPU. Set both to 1 on "
            "every node and where the application is built.",
            " and ".join(f"{name}=1" for name in missing),
        )


def _actor_options(model: ModelSection) -> dict[str, float]:
    return {"num_cpus": model.replicas.num_cpus, "num_gpus": model.replicas.num_gpus}


class EngineDeployment:
    """Running once the model is loaded; failed, with the engine's own words, if it cannot be."""

    async def __init__(self, config: AppConfig, model: ModelSection) -> None:
        store = await asyncio.to_thread(_open_store, config)
        fingerprint = await asyncio.to_thread(store.register_base, Path(model.source))
        engine_config = config.engine_config(model)
        self._replica = EngineReplica(
            lambda on_frame: EngineClient(engine_config, on_frame),
            store,
            fingerprint,
            engine_config.max_num_seqs + config.ingress.max_queued_requests,
        )
        await self._replica.start()

    async def attach(self, stream_id: str) -> AsyncIterator[Hello | Frame]:
        async for frame in self._replica.attach(stream_id):
            yield frame

    async def control(
        self, stream_id: str, commands: Sequence[Command], renew: bool
    ) -> Lease | None:
        return await self._replica.control(stream_id, commands, renew)

    def check_health(self) -> None:
        self._replica.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_replica"):
            await self._replica.close()


@serve.ingress()
class IngressDeployment:
    """Up before the engines are, so that /health can say that they are not."""

    def __init__(self, config: AppConfig, engines: dict[str, DeploymentHandle]) -> None:
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
        self._ingress = Ingress(
            Models(models, _open_store(config)),
            Metrics(),
            config.ingress.max_body_bytes,
            int(time.time()),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._ingress)


class RayConnection:
    """A Connection over a Serve handle. Frames are pickled by C, not by cloudpickle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        handle = handle.options(request_serialization="pickle", response_serialization="pickle")
        self._unary = handle
        self._streaming = handle.options(stream=True)

    async def attach(self, stream_id: str) -> AsyncIterator[Hello | Frame]:
        response = self._streaming.attach.remote(stream_id)
        try:
            async for frame in response:
                yield frame
        finally:
            response.cancel()

    async def control(
        self, stream_id: str, commands: Sequence[Command], renew: bool
    ) -> Lease | None:
        return await self._unary.control.remote(stream_id, commands, renew)


def _open_store(config: AppConfig) -> AdapterStore:
    adapters = config.adapters
    return AdapterStore(adapters.root, Path(adapters.disk_path), adapters.disk_bytes)
