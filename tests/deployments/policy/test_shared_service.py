"""What tenants get from several engines that tell each other what they gave."""

import random
from collections.abc import Callable, Sequence

import pytest

from deployments.policy.shared_service import (
    MAX_KNOWN,
    MAX_REPORTED,
    OthersService,
    OwnService,
    ServiceReport,
)
from engine.scheduler.classes import Flow, PriorityClass
from engine.scheduler.fairness import CREDIT, OUTPUT_WEIGHT, bound
from tests.engine.test_fairness import OUTPUT, PROMPT, SEQS, Server

DELAY, PERIOD = 12, 6  # rounds: until a report is there at the latest, and between two of them
Deliver = Callable[[random.Random, list[ServiceReport]], list[ServiceReport]]


class Node:
    """An engine, and the reports on the way to it."""

    def __init__(self, name: str, steps_per_round: int) -> None:
        self.server, self.own, self.others = Server(), OwnService(name), OthersService()
        self.steps_per_round = steps_per_round
        self.arriving: list[tuple[int, ServiceReport]] = []

    def step(self) -> None:
        for _ in range(self.steps_per_round):
            self.server.step()

    def report(self) -> ServiceReport | None:
        service = self.server.scheduler.service
        service.settle(self.server.scheduler.running)
        news = service.take_news().items()
        self.own.add((flow.tenant, flow.priority_class, tokens) for flow, tokens in news)
        return self.own.take_report()

    def hear(self, now: int) -> None:
        due = [report for at, report in self.arriving if at <= now]
        self.arriving = [(at, report) for at, report in self.arriving if at > now]
        scheduler = self.server.scheduler
        news = [
            (Flow(tenant, PriorityClass(rank)), tokens)
            for tenant, rank, tokens in self.others.take(due, now)
        ]
        if news:
            scheduler.service.settle(scheduler.running)
            scheduler.service.count_elsewhere(news, scheduler.waiting.flows)


def serve(
    nodes: Sequence[Node],
    present: dict[str, Sequence[int]],
    rounds: int,
    *,
    tells: bool = True,
    check: Callable[[Node, int], None] = lambda node, begun: None,
) -> dict[str, float]:
    """Keep each tenant waiting at its nodes; reports come late, twice and out of order."""
    rng = random.Random(0)
    for now in range(rounds):
        for tenant, places in present.items():
            for at in places:
                while nodes[at].server.num_waiting(tenant) <= SEQS:
                    nodes[at].server.add(tenant, rng.randint(1, PROMPT), rng.randint(1, OUTPUT))
        for node in nodes:
            begun = len(node.server.begun)
            node.step()
            check(node, begun)
        if tells and now % PERIOD == 0:
            for node in nodes:
                report = node.report()
                for other in nodes:
                    if report is not None and other is not node:
                        for _ in range(rng.choice([1, 1, 2])):
                            delay = rng.randint(0, DELAY - PERIOD)
                            other.arriving.append((now + delay, report))
        for node in nodes:
            node.hear(now)
    return totals(nodes)


def totals(nodes: Sequence[Node]) -> dict[str, float]:
    tenants = {tenant for node in nodes for tenant in node.server.charged}
    return {t: sum(node.server.charged[t] for node in nodes) for t in sorted(tenants)}


LOCAL = bound(PROMPT, SEQS * OUTPUT)
MOST_A_STEP = 16 + OUTPUT_WEIGHT * SEQS  # tokens: a step's budget, and an answer's token for each


@pytest.mark.parametrize("speeds", [(1, 1), (2, 1), (1, 2)], ids=["equal", "faster", "slower"])
def test_a_tenant_on_many_engines_gets_no_more_where_another_waits(
    speeds: tuple[int, int],
) -> None:
    """`wide` is on both engines, `narrow` on the first alone: whenever wide gets anything there,
    it has not had more in all, but for what was on its way to be known."""
    nodes = [Node(f"n{at}", speed) for at, speed in enumerate(speeds)]
    late = DELAY * sum(speeds) * MOST_A_STEP

    def check(node: Node, begun: int) -> None:
        if node is nodes[0] and "wide" in node.server.begun[begun:]:
            total = totals(nodes)
            assert total["wide"] <= total.get("narrow", 0.0) + LOCAL + late

    present = {"wide": (0, 1), "narrow": (0,)}
    total = serve(nodes, present, 1500, check=check)
    second = sum(nodes[1].server.charged.values())
    assert total["wide"] - max(second, sum(total.values()) / 2) <= LOCAL + late
    assert sum(total.values()) > 10 * (LOCAL + late), "so long that a drift would be seen"


def test_without_telling_it_gets_more() -> None:
    nodes = [Node("a", 1), Node("b", 1)]
    total = serve(nodes, {"wide": (0, 1), "narrow": (0,)}, 1500, tells=False)
    assert total["wide"] > 2.5 * total["narrow"]


def test_tenants_on_the_same_engines_share_them() -> None:
    nodes = [Node(f"n{at}", 1) for at in range(3)]
    total = serve(nodes, {"a": (0, 1, 2), "b": (0, 1, 2), "c": (0, 1, 2)}, 600)
    late = DELAY * len(nodes) * MOST_A_STEP
    assert max(total.values()) - min(total.values()) <= len(nodes) * (LOCAL - CREDIT) + late


def test_what_nobody_went_without_is_not_owed_for_long() -> None:
    nodes = [Node("a", 1), Node("b", 8)]
    serve(nodes, {"wide": (0, 1), "narrow": (0,)}, 400)
    before = dict(nodes[0].server.charged)
    serve(nodes, {"wide": (0,), "narrow": (0,)}, 1000)  # the second engine has no more requests
    after = nodes[0].server.charged
    assert after["wide"] - before["wide"] > 0.2 * (after["narrow"] - before["narrow"])


# ---- reports ----


def test_reports_count_once_however_often_they_come() -> None:
    rng = random.Random(1)
    own, others = OwnService("a"), OthersService()
    sent: list[ServiceReport] = []
    known: dict[tuple[str, int], float] = {}
    true: dict[tuple[str, int], float] = {}
    for now in range(300):
        for _ in range(rng.randint(0, 3)):
            flow = (rng.choice("xyz"), rng.randint(0, 2))
            true[flow] = true.get(flow, 0.0) + 2.0
            own.add([(*flow, 2.0)])
        report = own.take_report()
        if report is not None:
            sent.append(report)
        is_lost = len(known) == 9 and now < 290 and rng.random() < 0.3  # totals make up for it
        arriving = [*([] if is_lost else sent[-1:]), *(rng.choices(sent, k=2) if sent else ())]
        for tenant, rank, tokens in others.take(arriving, now):
            known[tenant, rank] = known.get((tenant, rank), 0.0) + tokens
        assert all(known[flow] <= true[flow] for flow in known)
    own.add([(*flow, 2.0) for flow in true])
    last = own.take_report()
    assert last is not None
    for tenant, rank, tokens in others.take([last], 300):
        known[tenant, rank] += tokens
    assert known == {flow: tokens + 2.0 for flow, tokens in true.items()}


def test_a_report_is_bounded_and_nothing_is_lost() -> None:
    own, others = OwnService("a"), OthersService()
    own.add((f"t{at}", 1, 1.0 + at) for at in range(3 * MAX_REPORTED))
    news: dict[str, float] = {}
    while (report := own.take_report()) is not None:
        assert len(report.flows) <= MAX_REPORTED
        news |= {tenant: tokens for tenant, _, tokens in others.take([report], 0.0)}
    assert news == {f"t{at}": 1.0 + at for at in range(3 * MAX_REPORTED)}


def test_flows_long_unused_are_forgotten_and_begin_anew() -> None:
    own, others = OwnService("a"), OthersService()

    def tell() -> dict[str, float]:
        found: dict[str, float] = {}
        while (report := own.take_report()) is not None:
            found |= {tenant: tokens for tenant, _, tokens in others.take([report], 0.0)}
        return found

    own.add([("old", 1, 100.0)])
    assert tell() == {"old": 100.0}
    own.add((f"t{at}", 1, 1.0) for at in range(MAX_KNOWN))
    assert len(tell()) == MAX_KNOWN
    own.add([("old", 1, 7.0)])
    assert tell() == {"old": 7.0}


def test_one_that_hears_late_counts_what_is_new_alone() -> None:
    own, late = OwnService("a"), OthersService()
    own.add([("x", 1, 1000.0)])
    own.take_report()
    own.add([("x", 1, 5.0)])
    report = own.take_report()
    assert report is not None and late.take([report], 0.0) == [("x", 1, 5.0)]
