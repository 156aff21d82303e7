"""Ways to choose a replica: Reef's own router, and others to compare it with."""

from collections.abc import Iterable, Sequence
from random import Random
from typing import Protocol

from deployments.policy.rendezvous import Rendezvous
from deployments.policy.replica_view import ReplicaFigures
from deployments.policy.routing import RoutedRequest, Router, RoutingCosts


class Chooser(Protocol):
    def report(self, replica_id: str, figures: ReplicaFigures) -> None: ...
    def keep(self, replica_ids: Iterable[str]) -> None: ...
    def choose(self, replica_ids: Sequence[str], request: RoutedRequest) -> str: ...
    def sent(self, replica_id: str, request: RoutedRequest, now: float) -> None: ...
    def ended(self, replica_id: str, num_tokens: int) -> None: ...


class _Known:
    """What most of them look at: requests by replica, and adapters."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._figures: dict[str, ReplicaFigures] = {}
        self._sent: dict[str, int] = {}
        self._adapters: dict[str, set[str]] = {}

    def report(self, replica_id: str, figures: ReplicaFigures) -> None:
        self._figures[replica_id] = figures
        self._sent[replica_id] = 0
        self._adapters[replica_id] = set(figures.device_adapters)

    def keep(self, replica_ids: Iterable[str]) -> None:
        wanted = set(replica_ids)
        self._figures = {r: f for r, f in self._figures.items() if r in wanted}

    def sent(self, replica_id: str, request: RoutedRequest, now: float) -> None:
        self._sent[replica_id] = self._sent.get(replica_id, 0) + 1
        self._adapters.setdefault(replica_id, set()).add(request.adapter_digest)

    def ended(self, replica_id: str, num_tokens: int) -> None:
        self._sent[replica_id] = self._sent.get(replica_id, 0) - 1

    def load(self, replica_id: str) -> int:
        figures = self._figures.get(replica_id)
        return (figures.num_requests if figures else 0) + self._sent.get(replica_id, 0)

    def _of_two(self, replica_ids: Sequence[str]) -> str:
        two = self._rng.sample(list(replica_ids), min(2, len(replica_ids)))
        return min(two, key=self.load)


class PowerOfTwo(_Known):
    """The less busy one of two at random: Ray Serve's own choice without model ids."""

    def choose(self, replica_ids: Sequence[str], request: RoutedRequest) -> str:
        return self._of_two(replica_ids)


class Multiplexed(_Known):
    """Of the replicas that have the adapter the less busy one of two; if none has it, of those with
    the fewest adapters: what Ray Serve's multiplexing does."""

    def choose(self, replica_ids: Sequence[str], request: RoutedRequest) -> str:
        digest = request.adapter_digest
        having = [r for r in replica_ids if digest in self._adapters.get(r, ())]
        if not digest or having:
            return self._of_two(having or replica_ids)
        fewest = min(len(self._adapters.get(r, ())) for r in replica_ids)
        return self._of_two([r for r in replica_ids if len(self._adapters.get(r, ())) == fewest])


class BoundedHash(_Known):
    """Consistent hashing with bounded loads: the first replica of the adapter's order whose load is
    at most 1.25 times the mean."""

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self._rendezvous = Rendezvous()
        self._ids: tuple[str, ...] = ()

    def choose(self, replica_ids: Sequence[str], request: RoutedRequest) -> str:
        if tuple(replica_ids) != self._ids:
            self._ids = tuple(replica_ids)
            self._rendezvous.set_replicas([(r, 1.0) for r in replica_ids])
        limit = 1.25 * (sum(map(self.load, replica_ids)) + 1) / len(replica_ids)
        order = self._rendezvous.order(request.adapter_digest or request.request_id)
        return next((r for r in order if self.load(r) < limit), order[0])


class RoundRobin(_Known):
    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self._next = 0

    def choose(self, replica_ids: Sequence[str], request: RoutedRequest) -> str:
        self._next += 1
        return replica_ids[self._next % len(replica_ids)]


class AtRandom(_Known):
    def choose(self, replica_ids: Sequence[str], request: RoutedRequest) -> str:
        return self._rng.choice(replica_ids)


OTHERS: dict[str, type[PowerOfTwo | Multiplexed | BoundedHash | RoundRobin | AtRandom]] = {
    "power-of-two": PowerOfTwo,
    "multiplexed": Multiplexed,
    "bounded-hash": BoundedHash,
    "round-robin": RoundRobin,
    "random": AtRandom,
}
ROUTERS = ("reef", *OTHERS)


def make_router(kind: str, max_num_seqs: int, costs: RoutingCosts, rng: Random) -> Chooser:
    """Return a router of one of the kinds ROUTERS."""
    if kind == "reef":
        return Router(costs, ReplicaFigures(max_num_seqs=max_num_seqs), str(rng.random()))
    return OTHERS[kind](rng)
