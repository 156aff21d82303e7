"""Prewarm: which adapters a new replica will get, so that it loads them before they are asked for.

A replica that comes takes its own share of the adapters from all others (`rendezvous.py`), and one
that replaces a dead one the share that has moved meanwhile. Both follow from the replicas' names
and the adapters' shares of the requests, before the first request is sent there.
"""

from collections.abc import Iterable, Sequence

from deployments.policy.rendezvous import Rendezvous
from deployments.policy.routing import RoutingCosts


def adapters_to_warm(
    shares: Sequence[tuple[str, float]],
    replica_ids: Iterable[str],
    newcomer: str,
    num_requests: float,
    most: int,
    costs: RoutingCosts | None = None,
) -> list[str]:
    """Return at most so many adapters in whose replica set the newcomer will be, in their order.

    `shares` are digests and their parts of all requests, the most wanted first; `replica_ids` those
    that run, with the newcomer or without; `num_requests` what they have now, all together. All
    replicas count alike, as those of one deployment do.
    """
    costs = costs or RoutingCosts()
    names = {*replica_ids, newcomer}
    rendezvous = Rendezvous([(name, 1.0) for name in names])
    chosen: list[str] = []
    for digest, share in shares:
        if len(chosen) >= most:
            break
        size = costs.set_size(share, len(names), num_requests)
        if newcomer in rendezvous.order(digest)[:size]:
            chosen.append(digest)
    return chosen
