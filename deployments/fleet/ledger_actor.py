"""The ledger of several ingresses as an actor, which whichever of them first asks for it makes.

It ends with the ingress that has made it, or by itself; the next that asks makes another. It is no
deployment's actor: Serve gives those a runtime environment, which not every cluster can make.
"""

# Ray's own types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
import contextvars
import hashlib
import time
import uuid
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from adapter_store.open_store import open_store
from deployments.fleet.budget_keeper import BudgetKeeper
from deployments.fleet.ledger_link import Call
from deployments.policy.ledger import Answer, Ledger, Message

PROTOCOL = 1  # of the messages and of the book: an ingress never meets a ledger of another one


def ledger_name(root: str, endpoint_url: str | None, may_write: bool) -> str:
    """Name the actor of this replica's application: another one where it is to be another."""
    settings = f"{PROTOCOL} {root} {endpoint_url} {may_write}"
    which = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return f"{serve.get_replica_context().app_name}-quota-ledger-{which}"


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


def ledger_call(root: str, endpoint_url: str | None, may_write: bool) -> Call:
    """Make the way to the actor from a replica. It finds or makes one, after each error again."""
    handle: Any = None

    def find() -> Any:
        name = ledger_name(root, endpoint_url, may_write)
        options = {"name": name, "get_if_exists": True, "num_cpus": 0}
        return LedgerActor.options(**options).remote(root, endpoint_url, may_write)

    async def call(message: Message) -> Answer:
        nonlocal handle
        if handle is None:
            handle = await asyncio.to_thread(find)
        try:
            # Not in the context of the request that happens to wait: Ray would cancel both.
            return await contextvars.Context().run(handle.take.remote, message)
        except RayError:
            handle = None
            raise

    return call
