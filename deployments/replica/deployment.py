"""EngineDeployment: one engine replica as a Ray Serve deployment."""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve

from adapter_store.names import AdapterRef
from deployments.config import AppConfig, open_adapter_store
from deployments.config_sections import AutoscalingSection, ModelSection
from deployments.fleet import router
from deployments.fleet.direct_server import DirectServer
from deployments.fleet.direct_socket import Greeting
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
from deployments.live_settings import engine_name, reconfigured
from deployments.loopback_grpc import keep_grpc_on_loopback
from deployments.policy.shared_service import ServiceReport
from deployments.replica import autoscaler
from deployments.replica.replica import EngineReplica, ReplicaSettings
from deployments.replica.verdict_writer import VerdictWriter
from deployments.serve_logging import log_to_serves_file
from engine.client import EngineClient
from engine.gc_freeze import keep_what_is_loaded
from engine.messages import AdapterVerdict, Item, describe_engine

ASK_S = 5.0  # for the ingresses to say which adapters will be wanted; the model loads meanwhile


class EngineDeployment:
    """Runs once the model is loaded. If it cannot be, Ray shows the engine's own message."""

    async def __init__(self, config: AppConfig, model: ModelSection) -> None:
        log_to_serves_file()
        keep_grpc_on_loopback()
        self._config, self._model, self._has_begun = config, model, False
        self._wanted_scaling: AutoscalingSection | None = None  # if it is not that of the start
        self._id = serve.get_replica_context().replica_id.unique_id
        self._replica = await _make_replica(self._id, config, model)
        self._sockets = DirectServer(self._replica)
        await self._sockets.listen(cast(str, ray.util.get_node_ip_address()))
        await self._replica.start(partial(_ask_ingresses, model.id, self._id))
        keep_what_is_loaded()

    async def reconfigure(self, user_config: object, rank: object = None) -> None:
        """Take settings that change while requests run.

        Ray calls it at the start, too, and passes None only to those that ask for the rank.
        """
        number = self._config.models.index(self._model)
        name = engine_name(number)
        config = reconfigured(self._config, name, user_config, self._has_begun)
        self._has_begun = True
        if config is None:
            return
        model = config.models[number]
        self._replica.set_limits(config.queue_limits(model))
        scaling = model.replicas.autoscaling
        self._wanted_scaling = None if scaling == self._model.replicas.autoscaling else scaling

    async def submit(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int], submit: Submit
    ) -> Receipt:
        return self._replica.submit(ingress_id, epochs, submit)

    async def attach(
        self, hints: Hints, ingress_id: str, epochs: Mapping[str, int]
    ) -> AsyncIterator[Greeting | Frame]:
        self._check_target(hints)
        stream = self._replica.attach(ingress_id, epochs)
        async for item in self._sockets.relay(stream, ingress_id):
            yield item

    async def control(
        self,
        hints: Hints,
        stream_id: StreamId,
        aborts: Sequence[Abort],
        renew: bool,
        elsewhere: Sequence[ServiceReport] = (),
    ) -> Lease | None:
        self._check_target(hints)
        if hints.is_leaving:
            self._replica.drain()
        return await self._replica.control(stream_id, aborts, renew, elsewhere)

    def _check_target(self, hints: Hints) -> None:
        if hints.target not in ("", self._id):
            raise UnknownStream(f"{hints.target} is gone; this is {self._id}")

    # All async: Ray calls other methods in a thread, concurrently with the loop that changes what
    # they read.

    async def record_routing_stats(self) -> dict[str, Any]:
        return router.to_stats(self._replica.figures())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        stats = autoscaler.to_stats(self._replica.load())
        scaling = self._wanted_scaling
        if scaling is None:
            return stats
        return stats | autoscaler.to_settings(scaling.objective, scaling.policy)

    async def check_health(self) -> None:
        self._replica.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_sockets"):
            self._sockets.close()
            await self._replica.close()


async def _ask_ingresses(model_id: str, replica_id: str) -> list[AdapterRef]:
    """Ask every ingress what this replica will be asked for; the answers taken in turn."""
    app = serve.get_replica_context().app_name
    ingress: Any = serve.get_deployment_handle("Ingress", app)
    answers = await ingress.broadcast("adapters_for", model_id, replica_id).results_async(
        timeout_s=ASK_S, return_exceptions=True
    )
    lists = [answer for answer in answers if not isinstance(answer, BaseException)]
    in_turn = chain.from_iterable(zip_longest(*lists))
    found = {ref.digest: ref for ref in in_turn if ref is not None}
    return list(found.values())[: max(map(len, lists), default=0)]


async def _make_replica(replica_id: str, config: AppConfig, model: ModelSection) -> EngineReplica:
    store = await asyncio.to_thread(open_adapter_store, config.adapters)
    register = partial(store.register_base, required=False)  # read-only credentials suffice
    fingerprint = await asyncio.to_thread(register, Path(model.source))
    engine_config = config.engine_config(model)
    settings = ReplicaSettings(
        replica_id,
        fingerprint,
        engine_config.max_num_seqs,
        config.queue_limits(model),
        model.replicas.drain_s,
        model.replicas.prewarm_s,
    )
    writer = VerdictWriter(store)

    def make_engine(on_frame: Callable[[list[Item]], None]) -> EngineClient:
        def note(found: AdapterVerdict) -> None:
            writer.note(found, describe_engine(engine_config, client.info))

        client = EngineClient(
            engine_config, on_frame, on_verdict=note, on_served=lambda s: replica.note_served(s)
        )
        return client

    replica = EngineReplica(make_engine, store, settings)
    return replica
