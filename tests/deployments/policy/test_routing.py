"""Routing as a pure function: affinity, spread, optimism, avoidance."""

import math
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from deployments.policy.demand import Demand
from deployments.policy.holders import Holders
from deployments.policy.prefix_memory import PREFIX_CHUNK, PrefixMemory, prefix_keys
from deployments.policy.rendezvous import Rendezvous
from deployments.policy.replica_view import ReplicaFigures, ReplicaView
from deployments.policy.routing import RoutedRequest, Router, RoutingCosts
from deployments.policy.traffic import Traffic

COSTS = RoutingCosts()
IDS = ("a", "b", "c", "d")


def request(n: int = 0, adapter_digest: str = "", tokens: int = 100) -> RoutedRequest:
    return RoutedRequest(f"r{n}", tokens, adapter_digest)


def figures(**changes: object) -> ReplicaFigures:
    return ReplicaFigures(**{"max_num_seqs": 16, **changes})  # type: ignore[arg-type]


def router_of(**reports: ReplicaFigures) -> Router:
    router = Router(COSTS, figures())
    for replica_id, report in reports.items():
        router.report(replica_id, report)
    return router


def route(router: Router, req: RoutedRequest, ids: tuple[str, ...] = IDS) -> str:
    best = router.choose(ids, req)
    router.sent(best, req, 0.0)
    return best


def test_a_request_goes_where_its_adapter_is() -> None:
    router = router_of(a=figures(), b=figures(device_adapters=frozenset({"x"})), c=figures())
    assert router.choose("abc", request(adapter_digest="x")) == "b"


def test_disk_is_better_than_remote_and_worse_than_the_device() -> None:
    device = figures(device_adapters=frozenset({"x"}))
    disk = figures(disk_adapters=frozenset({"x"}))
    reports = {"a": figures(), "b": disk, "c": device}
    router = router_of(**reports)
    while reports:
        best = router.choose(list(reports), request(adapter_digest="x"))
        assert best == max(reports)
        del reports[best]


def test_affinity_ends_where_the_queue_costs_more_than_a_load() -> None:
    busy = figures(
        device_adapters=frozenset({"x"}), queued_tokens=int(3 * COSTS.priors.tokens_per_s)
    )
    assert router_of(a=busy, b=figures()).choose("ab", request(adapter_digest="x")) == "b"


def test_new_adapters_spread_over_idle_replicas() -> None:
    router = router_of(**{i: figures() for i in IDS})
    chosen = Counter(route(router, request(n, f"adapter-{n}", 1)) for n in range(400))
    assert set(chosen) == set(IDS) and max(chosen.values()) < 2 * min(chosen.values())


def test_the_same_adapter_sticks_between_reports() -> None:
    router = router_of(**{i: figures() for i in IDS})
    assert len({route(router, request(n, "x", 1)) for n in range(COSTS.min_load)}) == 1


def test_two_routers_send_a_new_adapter_the_same_way() -> None:
    views = [router_of(**{i: figures() for i in order}) for order in (IDS, IDS[::-1])]
    assert (
        len(
            {
                route(v, request(5, "new"), ids)
                for v, ids in zip(views, (IDS, IDS[::-1]), strict=True)
            }
        )
        == 1
    )


def test_base_requests_go_to_the_replica_with_the_least_to_do() -> None:
    router = router_of(**{i: figures() for i in IDS})
    chosen = Counter(route(router, request(n, tokens=1)) for n in range(40))
    assert set(chosen.values()) == {10}


def test_a_burst_between_reports_does_not_land_on_one_replica() -> None:
    router = router_of(a=figures(), b=figures(queued_tokens=1000))
    chosen = Counter(route(router, request(n, tokens=500), ("a", "b")) for n in range(10))
    assert abs(chosen["a"] - chosen["b"]) <= 2


def test_a_full_replica_comes_after_one_that_must_load() -> None:
    full = figures(device_adapters=frozenset({"x"}), num_requests=32)
    assert router_of(a=full, b=figures()).choose("ab", request(adapter_digest="x")) == "b"


def test_replicas_to_avoid_come_last_and_are_never_lost() -> None:
    router = router_of(a=figures(device_adapters=frozenset({"x"})), b=figures(queued_tokens=10**6))
    req = RoutedRequest("r", 1, "x", avoid=("a",))
    assert router.choose("ab", req) == "b"
    assert router.choose("a", req) == "a"


def test_new_figures_replace_the_optimistic_ones_and_repeated_figures_do_not() -> None:
    router = router_of(a=figures())
    router.sent("a", request(tokens=500), 0.0)
    router.report("a", figures())
    assert router.figures("a").queued_tokens == 500
    router.report("a", figures(num_received=1))
    assert router.figures("a").queued_tokens == 0


def test_requests_that_have_ended_are_no_load() -> None:
    """An adapter stays where it is though more requests are sent than run at once."""
    router, places = router_of(**{i: figures() for i in IDS}), set[str]()
    for n in range(50):
        places.add(route(router, request(n, "x", 500)))
        router.ended(*places, 500)
    assert len(places) == 1 and router.figures(*places).num_requests == 0


def test_a_report_from_before_does_not_hide_where_an_adapter_went() -> None:
    router = router_of(a=figures())
    router.sent("a", request(adapter_digest="x"), 0.0)
    router.report("a", figures(num_received=1))  # taken before the request arrived
    assert router.figures("a").device_adapters == {"x"}
    router.report("a", figures(num_received=2))
    assert router.figures("a").device_adapters == set(), "by now it would be in the report"


def test_an_adapter_sticks_from_the_first_request_on_whatever_arrives_late() -> None:
    """Before any report, and through one from before all requests, far below the bound."""
    costs, places = replace(COSTS, min_load=100), dict[str, set[str]]()
    router = Router(costs, figures(max_num_seqs=400))
    for turn in range(3):
        for n, adapter in enumerate("uvwxyz"):
            places.setdefault(adapter, set()).add(route(router, request(n, adapter, 1), ("a", "b")))
            if (turn, adapter) == (1, "w"):
                router.report("a", figures(max_num_seqs=400))
                router.report("b", figures(max_num_seqs=400))
    assert {len(each) for each in places.values()} == {1}
    assert {place for each in places.values() for place in each} == {"a", "b"}


def test_a_replica_that_is_gone_is_forgotten() -> None:
    router = router_of(a=figures(queued_tokens=7), b=figures())
    router.keep(["b"])
    assert router.figures("a") == figures()


@pytest.mark.parametrize("order", [IDS, IDS[::-1]])
def test_the_choice_does_not_depend_on_the_order_of_candidates(order: tuple[str, ...]) -> None:
    router = router_of(**{i: figures(queued_tokens=n * 900) for n, i in enumerate(IDS)})
    warm = replace(request(adapter_digest="x"), avoid=("a",))
    assert router.choose(order, warm) == router.choose(IDS, warm)
    assert router.choose(order, request()) == router.choose(IDS, request()) == "a"


# ==== the bound, and what moves ====

TRAFFIC = ("identical", "distinct", "uniform", "zipf", "base")


def adapter_of(traffic: str, rng: Random, n: int) -> str:
    return {
        "identical": "one",
        "distinct": f"adapter-{n}",
        "uniform": f"adapter-{rng.randrange(50)}",
        "zipf": f"adapter-{int(1000 ** rng.random())}",
        "base": "",
    }[traffic]


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("sizes", [(16,) * 8, (4, 8, 64)], ids=["equal", "mixed"])
def test_no_replica_is_above_the_bound_while_another_has_room(
    traffic: str, sizes: tuple[int, ...]
) -> None:
    """Requests come and go at random; the figures are always true."""
    rng, loads = Random(f"{traffic}/{sizes}"), [0] * len(sizes)
    router, names = Router(COSTS, figures()), [f"r{i}" for i in range(len(sizes))]
    num_full = 0
    for n in range(3000):
        for i in range(len(sizes)):
            loads[i] -= sum(rng.random() < 0.03 for _ in range(loads[i]))
            state = figures(num_requests=loads[i], max_num_seqs=sizes[i], num_received=n)
            router.report(names[i], state)
        sent = request(n, adapter_of(traffic, rng, n), rng.randrange(1, 400))
        chosen = names.index(router.choose(names, sent))
        router.sent(names[chosen], sent, n * 0.01)
        loads[chosen] += 1
        if loads[chosen] > sizes[chosen]:
            assert all(load >= size for load, size in zip(loads, sizes, strict=True))
            num_full += 1
            continue
        share = sum(loads) * sizes[chosen] / sum(sizes)
        assert loads[chosen] <= max((1 + COSTS.epsilon) * share, COSTS.min_load) + 1e-9
    assert num_full < 2000


@pytest.mark.parametrize("count", [2, 8, 33])
def test_a_replica_that_joins_takes_its_share_of_the_adapters_and_moves_no_other(
    count: int,
) -> None:
    names = [f"r{i}" for i in range(count)]
    small, large = Rendezvous([(r, 1.0) for r in names]), Rendezvous()
    large.set_replicas([*((r, 1.0) for r in reversed(names)), ("new", 1.0)])
    keys = [f"adapter-{n}" for n in range(4000)]
    moved = [key for key in keys if large.order(key)[0] != small.order(key)[0]]
    assert {large.order(key)[0] for key in moved} == {"new"}
    expected = len(keys) / (count + 1)
    assert abs(len(moved) - expected) < 5 * math.sqrt(expected)


def test_a_replica_of_twice_the_size_is_home_to_twice_as_many_adapters() -> None:
    rendezvous = Rendezvous([("a", 1.0), ("b", 2.0)])
    homes = Counter(rendezvous.order(f"adapter-{n}")[0] for n in range(6000))
    assert abs(homes["b"] - 4000) < 5 * math.sqrt(4000)


def test_a_hot_adapter_gets_more_replicas_and_loses_them_when_it_cools() -> None:
    router = router_of(**{i: figures(num_requests=12) for i in IDS})
    for n in range(200):
        router.sent("a", request(n, "hot" if n % 2 else f"cold-{n}"), n * 0.1)
        router.report("a", figures(num_requests=12, num_received=n))
    assert len(router.replica_set("hot")) == len(IDS)
    assert len(router.replica_set("cold-100")) == 1
    for n in range(3000):
        router.sent("a", request(n, "other"), 20 + n * 0.1)
        router.report("a", figures(num_requests=12, num_received=n))
    assert len(router.replica_set("hot")) == 1


# ==== prefixes and sessions ====


def test_a_prompt_goes_where_its_beginning_was() -> None:
    router, prompt = router_of(**{i: figures() for i in IDS}), list(range(1000))
    first = RoutedRequest("r", 1000, prefix_keys=prefix_keys(prompt, "tenant"))
    router.sent("c", first, 0.0)
    for i in IDS:  # nothing is left to do
        router.report(i, figures(num_received=1))
    longer = replace(first, request_id="s", prefix_keys=prefix_keys([*prompt, *prompt], "tenant"))
    stranger = replace(longer, prefix_keys=prefix_keys(prompt, "stranger"))
    assert router.choose(IDS, longer) == "c"
    homes = {router.choose(IDS, replace(stranger, request_id=f"r{n}")) for n in range(20)}
    assert len(homes) == 1, "those of one beginning go together, wherever that is"
    assert not set(stranger.prefix_keys) & set(longer.prefix_keys)
    router.report("c", figures(num_received=2, queued_tokens=5000))
    assert router.choose(IDS, longer) != "c", "a queue costs more than the prompt"


def test_equal_beginnings_have_equal_keys_up_to_where_they_differ() -> None:
    prompt = list(range(5 * PREFIX_CHUNK + 3))
    other = [*prompt[: 3 * PREFIX_CHUNK], *prompt[: 2 * PREFIX_CHUNK]]
    keys, others = prefix_keys(prompt, "t"), prefix_keys(other, "t")
    assert len(keys) == len(others) == 5
    assert [a == b for a, b in zip(keys, others, strict=True)] == [True] * 3 + [False] * 2
    assert prefix_keys(prompt[: PREFIX_CHUNK - 1], "t") == ()


def test_a_session_stays_at_one_replica_until_that_is_busy() -> None:
    router = router_of(**{i: figures() for i in IDS})
    turns = [replace(request(n), session="s") for n in range(12)]
    home = router.choose(IDS, turns[0])
    assert {router.choose(IDS, turn) for turn in turns} == {home}
    router.report(home, figures(queued_tokens=3000))
    assert router.choose(IDS, turns[0]) != home


def test_memory_of_prefixes_is_bounded_and_forgets_the_oldest() -> None:
    memory = PrefixMemory(max_keys=10)
    for n in range(30):
        memory.sent("a", (n,))
    assert memory.find((29,)) == {"a": PREFIX_CHUNK} and memory.find((19,)) == {}
    memory.forget("a")
    assert memory.find((29,)) == {}


def test_demand_halves_and_is_bounded() -> None:
    demand = Demand(half_life_s=10.0, max_keys=100)
    for _ in range(1000):
        demand.add("old", 0.0)
    for _ in range(1000):
        demand.add("new", 10.0)
    assert demand.share("old") == pytest.approx(1 / 3)
    for n in range(100_000):
        demand.add(f"k{n % 5000}", 10.0 + n)
    assert demand.share("old") < 1e-9 and len(demand._weights) <= 200
    assert sum(map(demand.share, demand._weights)) == pytest.approx(1.0, rel=1e-3)


# ==== several routers ====


def test_a_router_counts_its_requests_as_often_as_others_send_like_it() -> None:
    router, received = router_of(a=figures(), b=figures()), 0
    for n in range(200):
        router.sent("ab"[n % 2], request(n), n * 0.1)
        received += 4
        router.report("ab"[n % 2], figures(num_received=received // 2, num_requests=4))
    router.sent("a", request(tokens=100), 100.0)
    assert router.figures("a").num_requests == 8 and router.figures("a").queued_tokens == 400
    router.ended("a", 100)
    assert router.figures("a").num_requests == 4
    traffic = Traffic()
    traffic.heard(-5, 3)
    traffic.heard(100, 90)
    assert traffic.times == 1.0, "one that sends all, but for what is on its way"


def test_holders_are_those_of_the_latest_sets_through_any_sequence() -> None:
    rng, holders = Random(3), Holders()
    views = [ReplicaView(name, figures(), COSTS.priors) for name in IDS]
    has: dict[ReplicaView, set[str]] = {view: set() for view in views}
    for _ in range(2000):
        view, digest = rng.choice(views), rng.choice("uvwxyz")
        match rng.randrange(8):
            case 0:
                holders.forget(view)
                has[view] = set()
            case 1 | 2 | 3:
                has[view] = set(rng.sample("uvwxyz", rng.randrange(4)))
                holders.set(view, has[view].copy())
            case _:
                holders.add(view, digest)
                has[view].add(digest)
        assert set(holders.of(digest)) == {v for v in views if digest in has[v]}


def test_a_load_is_weighed_against_a_longer_step() -> None:
    """A load, and that of the adapter that goes, cost as much as some requests more."""
    busy, idle = {"device_adapters": frozenset({"x"})}, figures()
    worth = (COSTS.load_s + 2 * COSTS.priors.remote_load_s) / (2 * COSTS.priors.crowding_s)
    for num_requests in (5, int(0.9 * worth), int(1.2 * worth)):
        home = ReplicaFigures(max_num_seqs=256, num_requests=num_requests, **busy)  # type: ignore[arg-type]
        # far apart in size, so that the bound is not reached
        router = Router(replace(COSTS, epsilon=20.0), idle)
        router.report("a", home)
        router.report("b", replace(idle, max_num_seqs=256))
        chosen = router.choose("ab", request(adapter_digest="x"))
        assert chosen == ("a" if num_requests < worth else "b")


def test_where_all_batches_are_full_requests_still_go_where_their_adapter_is() -> None:
    full = figures(num_requests=16)
    warm = replace(full, num_requests=17, device_adapters=frozenset({"x"}))
    router = router_of(a=full, b=full, c=warm, d=full)
    assert router.choose(IDS, request(adapter_digest="x")) == "c"
    assert router.choose(IDS, request()) != "c"
