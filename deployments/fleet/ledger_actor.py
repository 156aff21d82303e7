"""The ledger as an actor of the Ingress deployment, which outlives its replicas.

Ray's controller starts it before the first replica, and another one where it dies. Ray pickles this
module by value.
"""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
import contextvars
import time
import uuid
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import DeploymentActorConfig

from adapter_store.open_store import open_store
from deployments.fleet.budget_keeper import BudgetKeeper
from deployments.fleet.ledger_link import Call
from deployments.policy.ledger import Answer, Ledger, Message

NAME = "quota-ledger"


@ray.remote
class LedgerActor:
    """Used by all ingress replicas."""

    def __init__(self, root: str, endpoint_url: str | None, may_write: bool) -> None:
        self._ledger = Ledger(uuid.uuid4().hex, time.monotonic_ns())
        # Its writes are not conditional, so the store's test of those is left out.
        store = open_store(root, endpoint_url, read_only=True)
        self._keeper = BudgetKeeper(store, self._ledger, may_write)
        self._has_begun = False

    async def take(self, message: Message) -> Answer:
        if not self._has_begun:
            self._has_begun = True
            self._keeper.start()
        return self._ledger.take(message, time.monotonic_ns(), time.time())


def ledger_config(root: str, endpoint_url: str | None, may_write: bool) -> DeploymentActorConfig:
    return DeploymentActorConfig(
        name=NAME,
        actor_class=LedgerActor,
        init_args=(root, endpoint_url, may_write),
        actor_options={"num_cpus": 0},
    )


def ledger_call() -> Call:
    """Make the way to the actor from a replica. It finds the one that runs, after each error."""
    handle: Any = None

    async def call(message: Message) -> Answer:
        nonlocal handle
        if handle is None:
            handle = await asyncio.to_thread(serve.get_deployment_actor, NAME)
        try:
            # Not in the context of the request that happens to wait: Ray would cancel both.
            return await contextvars.Context().run(handle.take.remote, message)
        except RayError:
            handle = None
            raise

    return call
