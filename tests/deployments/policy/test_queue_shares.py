"""How long one tenant would wait, and who gives way in a full queue."""

import pytest

from deployments.policy.backlog import Backlog, Overload, wait_s
from deployments.policy.capacity import Capacity
from deployments.policy.queue_shares import FlowLoad, flow_wait_s, too_late, who_gives_way

# 10 rows take 0.1 s: 100 tokens/s for all of them together
CAPACITY = Capacity(max_num_seqs=10, tokens_per_s=1000, step_s=0.05, row_s=0.005)
INTERACTIVE, STANDARD, BATCH = range(3)


def flow(
    tenant: str, num_open: int, queued: int = 0, weight: float = 1.0, rank: int = 1
) -> FlowLoad:
    return FlowLoad(tenant, rank, weight, num_open, queued)


def backlog_of(*flows: FlowLoad) -> Backlog:
    num_open = sum(each.num_open for each in flows)
    queued = sum(each.queued_tokens for each in flows)
    return Backlog(num_open, min(num_open, 10), queued, 0.0, mean_answer=50.0)


def wait_of(asking: FlowLoad, *others: FlowLoad) -> float:
    flows = (asking, *others)
    return flow_wait_s(CAPACITY, backlog_of(*flows), asking, flows)


def test_a_tenant_that_is_alone_waits_for_all() -> None:
    assert wait_of(flow("a", 29, 1000)) == wait_s(CAPACITY, backlog_of(flow("a", 29, 1000))) > 0


def test_beside_a_flood_one_waits_for_its_own() -> None:
    flood = flow("flood", 500, 50_000)
    assert wait_of(flow("guest", 0), flood) == 0.0
    assert wait_of(flow("guest", 2, 200), flood) == pytest.approx(0.4)  # at half the speed
    assert wait_of(flow("guest", 6, 200), flood) == pytest.approx(0.4 + 3 * 0.5)  # of 5 seats
    guest = flow("guest", 6, 200)
    assert wait_of(flood, guest) == wait_s(CAPACITY, backlog_of(flood, guest))


def test_a_weight_is_a_share_of_the_seats() -> None:
    flood = flow("flood", 500, 50_000)
    heavy = wait_of(flow("guest", 8, 100, weight=4.0), flood)
    assert heavy == pytest.approx(0.1 * 5 / 4 + 0.5)  # 8 of 10 seats are its own, and it has 8
    assert heavy < wait_of(flow("guest", 8, 100), flood)


def test_lower_classes_are_not_waited_for_and_higher_ones_are() -> None:
    batch = flow("flood", 500, 50_000, rank=BATCH)
    assert wait_of(flow("guest", 0), batch) == 0.0
    urgent = flow("flood", 500, 50_000, rank=INTERACTIVE)
    assert wait_of(flow("guest", 0), urgent) == wait_s(CAPACITY, backlog_of(urgent))


def test_nothing_measured_is_no_wait() -> None:
    flows = [flow("a", 900, 10**6)]
    assert flow_wait_s(Capacity(10), backlog_of(*flows), flows[0], flows) == 0.0


def test_what_would_be_late_says_by_how_much() -> None:
    assert too_late(2.0, 2.0) is None
    assert too_late(6.5, 2.0) == Overload(
        "The first token would come in about 6.5 s, and at most 2 s are allowed.", 5
    )


def test_who_has_most_gives_way_and_lower_classes_do_first() -> None:
    flood, some, batch = flow("flood", 60), flow("some", 20), flow("batch", 3, rank=BATCH)
    flows = [some, flood, batch]
    assert who_gives_way(flow("guest", 0), 1, flows) == [batch, flood, some]
    assert who_gives_way(flow("guest", 30), 1, flows) == [batch, flood]
    assert who_gives_way(flood, 1, flows) == [batch]
    assert who_gives_way(batch, 1, flows) == []
    assert who_gives_way(flow("guest", 30, weight=2.0), 1, flows) == [batch, flood, some]
    assert who_gives_way(flow("guest", 0, rank=INTERACTIVE), 1, flows) == [batch, flood, some]


@pytest.mark.parametrize(("most", "more", "gives"), [(3, 1, True), (2, 1, False), (9, 4, True)])
def test_no_place_goes_back_and_forth(most: int, more: int, gives: bool) -> None:
    guest, flood = flow("guest", 1), flow("flood", most)
    assert bool(who_gives_way(guest, more, [guest, flood])) == gives
    after = flow("guest", 1 + more), flow("flood", most - more)
    if gives:
        assert who_gives_way(after[1], more, after) == []
