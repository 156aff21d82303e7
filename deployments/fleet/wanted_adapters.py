"""WantedAdapters: what requests have asked for lately, to tell replicas that start."""

from collections.abc import Callable, Iterable

from adapter_store.names import AdapterRef
from deployments.fleet.protocol import DIGEST_CHARS
from deployments.policy.demand import Demand
from deployments.policy.prewarm import adapters_to_warm

MAX_KNOWN = 1000
DEFAULT_ROOM = 16  # adapters for a replica, while no other tells how many it has


class WantedAdapters:
    """Those of one ingress. Combinations are left out. Not thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._demand = Demand(max_keys=MAX_KNOWN)
        self._refs: dict[str, AdapterRef] = {}  # by the digest that routers know

    def add(self, ref: AdapterRef) -> None:
        if ref.recipe is not None:
            return
        key = ref.digest[:DIGEST_CHARS]
        self._demand.add(key, self._clock())
        self._refs[key] = ref
        if len(self._refs) > 2 * MAX_KNOWN:
            self._refs = {key: self._refs[key] for key, _ in self._demand.shares(MAX_KNOWN)}

    def of_newcomer(
        self, newcomer: str, replica_ids: Iterable[str], num_requests: int, room: int
    ) -> list[AdapterRef]:
        """Return what a new replica will be asked for, the most wanted first.

        `room` is the most adapters that another one has on its device; 0 is not known.
        """
        shares = self._demand.shares(MAX_KNOWN)
        most = room or DEFAULT_ROOM
        chosen = adapters_to_warm(shares, replica_ids, newcomer, num_requests, most)
        return [self._refs[key] for key in chosen]
