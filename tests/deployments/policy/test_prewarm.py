"""Which adapters a new replica loads ahead: those that the router will send there."""

from random import Random

import pytest

from deployments.policy.demand import Demand
from deployments.policy.prewarm import adapters_to_warm
from deployments.policy.replica_view import ReplicaFigures
from deployments.policy.routing import RoutedRequest, Router, RoutingCosts


@pytest.mark.parametrize("num_replicas", [1, 3, 8])
def test_a_new_replica_is_told_what_the_router_will_send_it(num_replicas: int) -> None:
    """Requests by zipf; then one replica more. What it gets is what it was told."""
    rng, names = Random(num_replicas), [f"adapter-{n}" for n in range(60)]
    router, demand = Router(RoutingCosts(), ReplicaFigures(max_num_seqs=64)), Demand()
    ids = [f"replica-{n}" for n in range(num_replicas)]
    for number in range(2000):
        digest = rng.choices(names, [1 / (1 + n) for n in range(len(names))])[0]
        request = RoutedRequest(str(number), 10, digest)
        chosen = router.choose(ids, request)
        router.sent(chosen, request, number / 100)
        router.ended(chosen, 10)
        demand.add(digest, number / 100)
    told = adapters_to_warm(demand.shares(1000), ids, "newcomer", 0, 1000)
    router.choose([*ids, "newcomer"], RoutedRequest("x", 10))
    wanted = [n for n, _ in demand.shares(1000) if "newcomer" in router.replica_set(n)]
    assert told == wanted
    assert len(names) / (4 * num_replicas + 4) < len(told) < len(names), "about its part"


def test_the_only_replica_gets_the_most_wanted_and_no_more_than_there_is_room_for() -> None:
    shares = [("hot", 0.7), ("warm", 0.2), ("cold", 0.1)]
    assert adapters_to_warm(shares, (), "only", 10, 2) == ["hot", "warm"]
    assert adapters_to_warm(shares, ("only",), "only", 10, 2) == ["hot", "warm"]
    assert adapters_to_warm([], ("other",), "only", 10, 2) == []


def test_an_adapter_that_everybody_wants_is_told_to_every_newcomer() -> None:
    for number in range(5):
        assert adapters_to_warm([("hot", 1.0)], ("a", "b"), f"new-{number}", 100, 9) == ["hot"]
