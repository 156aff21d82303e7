"""Routing as a pure function: affinity, spread, optimism, avoidance."""

from collections import Counter

import pytest

from deployments.policy.routing import (
    OptimisticView,
    ReplicaFigures,
    RoutedRequest,
    RoutingCosts,
    predicted_ttft_s,
    rank,
)

COSTS = RoutingCosts()
IDS = ("a", "b", "c", "d")


def request(n: int = 0, adapter_digest: str = "", tokens: int = 100) -> RoutedRequest:
    return RoutedRequest(f"r{n}", tokens, adapter_digest)


def figures(**changes: object) -> ReplicaFigures:
    return ReplicaFigures(**{"max_num_seqs": 16, **changes})  # type: ignore[arg-type]


def view_of(**reports: ReplicaFigures) -> OptimisticView:
    view = OptimisticView(figures())
    for replica_id, report in reports.items():
        view.report(replica_id, report)
    return view


def route(view: OptimisticView, req: RoutedRequest, ids: tuple[str, ...] = IDS) -> str:
    best = rank(ids, req, view, COSTS)[0]
    view.sent(best, req)
    return best


def test_a_request_goes_where_its_adapter_is() -> None:
    view = view_of(a=figures(), b=figures(device_adapters=frozenset({"x"})), c=figures())
    assert rank("abc", request(adapter_digest="x"), view, COSTS)[0] == "b"


def test_disk_is_better_than_remote_and_worse_than_the_device() -> None:
    device = figures(device_adapters=frozenset({"x"}))
    disk = figures(disk_adapters=frozenset({"x"}))
    times = [
        predicted_ttft_s(f, request(adapter_digest="x"), COSTS) for f in (device, disk, figures())
    ]
    assert times == sorted(times) and len(set(times)) == 3


def test_affinity_ends_where_the_queue_costs_more_than_a_load() -> None:
    busy = figures(device_adapters=frozenset({"x"}), queued_tokens=int(2 * COSTS.tokens_per_s))
    assert rank("ab", request(adapter_digest="x"), view_of(a=busy, b=figures()), COSTS)[0] == "b"


def test_new_adapters_spread_over_idle_replicas() -> None:
    view = view_of(**{i: figures() for i in IDS})
    chosen = Counter(route(view, request(n, f"adapter-{n}", 1)) for n in range(400))
    assert set(chosen) == set(IDS) and max(chosen.values()) < 2 * min(chosen.values())


def test_the_same_adapter_sticks_between_reports() -> None:
    view = view_of(**{i: figures() for i in IDS})
    assert len({route(view, request(n, "x", 1)) for n in range(10)}) == 1


def test_two_routers_send_a_new_adapter_the_same_way() -> None:
    views = [view_of(**{i: figures() for i in order}) for order in (IDS, IDS[::-1])]
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
    view = view_of(**{i: figures() for i in IDS})
    chosen = Counter(route(view, request(n, tokens=1)) for n in range(40))
    assert set(chosen.values()) == {10}


def test_a_burst_between_reports_does_not_land_on_one_replica() -> None:
    view = view_of(a=figures(), b=figures(queued_tokens=1000))
    chosen = Counter(route(view, request(n, tokens=500), ("a", "b")) for n in range(10))
    assert abs(chosen["a"] - chosen["b"]) <= 2


def test_a_full_replica_comes_after_one_that_must_load() -> None:
    full = figures(device_adapters=frozenset({"x"}), num_requests=32)
    assert rank("ab", request(adapter_digest="x"), view_of(a=full, b=figures()), COSTS)[0] == "b"


def test_replicas_to_avoid_come_last_and_are_never_lost() -> None:
    view = view_of(a=figures(device_adapters=frozenset({"x"})), b=figures(queued_tokens=10**6))
    req = RoutedRequest("r", 1, "x", avoid=("a",))
    assert rank("ab", req, view, COSTS) == ["b", "a"]
    assert rank("a", req, view, COSTS) == ["a"]


def test_new_figures_replace_the_optimistic_ones_and_repeated_figures_do_not() -> None:
    view = view_of(a=figures())
    view.sent("a", request(tokens=500))
    view.report("a", figures())
    assert view.figures("a").queued_tokens == 500
    view.report("a", figures(num_received=1))
    assert view.figures("a").queued_tokens == 0


def test_a_report_from_before_does_not_hide_where_an_adapter_went() -> None:
    view = view_of(a=figures())
    view.sent("a", request(adapter_digest="x"))
    view.report("a", figures(num_received=1))  # taken before the request arrived
    assert view.figures("a").device_adapters == {"x"}
    view.report("a", figures(num_received=2))
    assert view.figures("a").device_adapters == set(), "by now it would be in the report"


def test_an_adapter_sticks_from_the_first_request_on_whatever_arrives_late() -> None:
    """Before any report, through one from before all requests, and beside the others' load."""
    view, places = OptimisticView(figures()), dict[str, set[str]]()
    for turn in range(3):
        for n, adapter in enumerate("uvwxyz"):
            places.setdefault(adapter, set()).add(route(view, request(n, adapter, 1), ("a", "b")))
            if (turn, adapter) == (1, "w"):
                view.report("a", figures())
                view.report("b", figures())
    assert {len(each) for each in places.values()} == {1}
    assert {place for each in places.values() for place in each} == {"a", "b"}


def test_a_replica_that_is_gone_is_forgotten() -> None:
    view = view_of(a=figures(queued_tokens=7), b=figures())
    view.keep(["b"])
    assert view.figures("a") == figures()


@pytest.mark.parametrize("order", [IDS, IDS[::-1]])
def test_the_ranking_does_not_depend_on_the_order_of_candidates(order: tuple[str, ...]) -> None:
    view = view_of(**{i: figures(queued_tokens=n * 900) for n, i in enumerate(IDS)})
    assert rank(order, request(adapter_digest="x"), view, COSTS)[-1] == "d"
    assert rank(order, request(), view, COSTS) == rank(IDS, request(), view, COSTS)
