"""What tenants get from a scheduler, counted again from its batches."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from engine.scheduler.adapter_slots import AdapterSlots
from engine.scheduler.block_manager import BlockManager
from engine.scheduler.classes import Flow, PriorityClass
from engine.scheduler.fairness import (
    CREDIT,
    FORGET_ABOVE,
    INPUT_WEIGHT,
    OUTPUT_WEIGHT,
    TenantService,
    bound,
)
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.memory import MemoryBudget
from engine.scheduler.request import CacheScope, Request, SamplingParams
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.waiting import WaitingQueue

SEQS, PROMPT, OUTPUT = 4, 30, 20  # most at once; most tokens of a request
Draw = Callable[[random.Random], tuple[int, int]]  # tokens of a prompt, and of its output


@dataclass
class Server:
    """Steps of a scheduler that computes nothing, and the tokens of each tenant."""

    num_blocks: int = 200
    weights: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        blocks = BlockManager(self.num_blocks, 4, prefix_caching=True)
        memory = MemoryBudget(self.num_blocks, 1, blocks, AdapterSlots(loads_are_immediate=True))
        self.scheduler = Scheduler(SchedulerLimits(SEQS, 16, self.num_blocks * 4), memory)
        self.charged: defaultdict[str, float] = defaultdict(float)  # not divided by weights
        self.num_added = 0
        self.begun: list[str] = []  # tenants, in the order in which their requests began

    def add(
        self,
        tenant: str,
        num_prompt: int = 1,
        num_output: int = 1,
        priority_class: PriorityClass = PriorityClass.STANDARD,
    ) -> None:
        self.num_added += 1
        prompt = [self.num_added] * num_prompt
        sampling = SamplingParams(max_tokens=num_output, ignore_eos=True)
        request = Request(
            f"r{self.num_added}",
            prompt,
            sampling,
            0.0,
            CacheScope(tenant),
            weight=self.weights.get(tenant, 1.0),
            priority_class=priority_class,
        )
        self.scheduler.add(request)

    def step(self) -> None:
        tenants = {r.request_id: r.scope.tenant for r in self.requests()}
        new = {r.request_id: r for r in self.requests() if r.num_charged_tokens is None}
        batch = self.scheduler.schedule(0.0)
        if batch is None:
            return
        for request in new.values():
            if request.life:
                self.begun.append(request.scope.tenant)
                num_computed = request.num_prompt_tokens - (request.num_cached_tokens or 0)
                self.charged[request.scope.tenant] += INPUT_WEIGHT * num_computed
        sampled = [[0] if row.samples else [] for row in batch.requests]
        for progress in self.scheduler.update(batch, sampled):
            tenant = tenants[progress.request.request_id]
            self.charged[tenant] += OUTPUT_WEIGHT * len(progress.token_ids)

    def requests(self) -> Iterator[Request]:
        yield from self.scheduler.running
        yield from self.scheduler.waiting

    def num_waiting(self, tenant: str) -> int:
        return sum(r.scope.tenant == tenant for r in self.scheduler.waiting)

    def counter(self, tenant: str) -> float:
        self.scheduler.service.settle(self.scheduler.running)
        return self.scheduler.service[Flow(tenant)]


def identical(rng: random.Random) -> tuple[int, int]:
    return PROMPT // 2, OUTPUT // 2


def uniform(rng: random.Random) -> tuple[int, int]:
    return rng.randint(1, PROMPT), rng.randint(1, OUTPUT)


def long_prompts(rng: random.Random) -> tuple[int, int]:
    return PROMPT, 1


def long_outputs(rng: random.Random) -> tuple[int, int]:
    return 1, OUTPUT


def serve_backlogged(server: Server, draws: dict[str, Draw], num_steps: int) -> float:
    """Keep every tenant waiting; return the largest distance of two tenants' charges."""
    rng, widest = random.Random(0), 0.0
    for _ in range(num_steps):
        for tenant, draw in draws.items():
            while server.num_waiting(tenant) <= SEQS:
                server.add(tenant, *draw(rng))
        server.step()
        shares = [server.charged[t] / server.weights.get(t, 1.0) for t in draws]
        widest = max(widest, max(shares) - min(shares))
    return widest


MIXES: list[dict[str, Draw]] = [
    {"a": identical, "b": identical},
    {"a": uniform, "b": uniform, "c": uniform},
    {"a": long_prompts, "b": long_outputs},
    {"a": uniform, "b": long_outputs, "c": long_prompts, "d": identical},
]
MIX_NAMES = ["identical", "uniform", "opposite", "mixed"]
BOUND = bound(PROMPT, SEQS * OUTPUT)
EQUAL = BOUND - CREDIT  # of tenants that begin together, none with credit


@pytest.mark.parametrize("draws", MIXES, ids=MIX_NAMES)
@pytest.mark.parametrize("num_blocks", [200, 20], ids=["roomy", "preempting"])
def test_tenants_that_wait_stay_within_the_bound(draws: dict[str, Draw], num_blocks: int) -> None:
    server = Server(num_blocks)
    assert serve_backlogged(server, draws, 1500) <= EQUAL
    assert min(server.charged.values()) > 5 * EQUAL, "so long that a drift would be seen"
    for tenant in draws:
        assert server.counter(tenant) == server.charged[tenant]


def test_first_come_first_served_leaves_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_arrival(queue: WaitingQueue, _: object) -> list[Request]:
        return sorted(queue, key=lambda request: int(request.request_id[1:]))

    monkeypatch.setattr(WaitingQueue, "in_order", by_arrival)
    assert serve_backlogged(Server(), MIXES[2], 1500) > 2 * EQUAL


def test_service_is_by_weight() -> None:
    server = Server(weights={"one": 1.0, "two": 2.0, "four": 4.0})
    draws: dict[str, Draw] = {"one": uniform, "two": long_outputs, "four": long_prompts}
    serve_backlogged(server, draws, 6_000)
    total = sum(server.charged.values())
    for tenant, weight in server.weights.items():
        assert server.charged[tenant] / total == pytest.approx(weight / 7, rel=0.02)


def test_a_tenant_that_comes_goes_before_another_ones_queue() -> None:
    server = Server()
    for _ in range(20):
        server.add("flood", 10, 5)
    for _ in range(30):
        server.step()
    before = len(server.begun)
    server.add("guest", 10, 5)
    for _ in range(30):
        server.step()
    assert "guest" in server.begun[before : before + 2]


def test_no_more_than_the_credit_is_saved_up_or_owed_for_what_nobody_wanted() -> None:
    server = Server()
    for _ in range(150):
        server.add("steady", 10, 5)
        server.step()
    while server.scheduler.has_unfinished:
        server.step()
    used = server.counter("steady")
    assert used > 1.2 * BOUND
    draws: dict[str, Draw] = {"steady": uniform, "new": uniform}
    server.charged.clear()
    assert serve_backlogged(server, draws, 600) <= BOUND
    assert abs(server.counter("new") - server.counter("steady")) <= BOUND


def test_preempted_and_resumed_requests_are_charged_once() -> None:
    server = Server(num_blocks=14)
    for _ in range(12):
        server.add("a", 10, 20)
    while server.scheduler.has_unfinished:
        server.step()
        server.scheduler.check_integrity()
    assert server.scheduler.num_preemptions
    assert server.counter("a") == 12 * (10 * INPUT_WEIGHT + 20 * OUTPUT_WEIGHT)


def test_the_prefix_cache_is_not_charged() -> None:
    server = Server()
    sampling = SamplingParams(max_tokens=1)
    for name in ("first", "second"):
        server.scheduler.add(Request(name, list(range(9)), sampling, 0.0, CacheScope("a")))
        while server.scheduler.has_unfinished:
            server.step()
    assert server.counter("a") == (9 + 1) * INPUT_WEIGHT + 2 * OUTPUT_WEIGHT


def test_tenants_that_owe_nothing_are_forgotten() -> None:
    service = TenantService()
    for number in range(3 * FORGET_ABOVE):
        request = Request(f"{number}", [1], SamplingParams(), 0.0, CacheScope(f"t{number}"))
        service.enter(request.flow, set())
        service.begin(request)
        service.forget_idle([request])
    assert len(service) <= FORGET_ABOVE + 1
    rich = Request("rich", [1] * 10**6, SamplingParams(), 0.0, CacheScope("rich"))
    poor = Request("poor", [1], SamplingParams(), 0.0, CacheScope("poor"))
    for request in (rich, poor):
        service.enter(request.flow, {rich.flow, poor.flow})
        service.begin(request)
    for number in range(3 * FORGET_ABOVE):
        service.enter(Flow(f"u{number}"), {poor.flow})
        service.forget_idle([poor])
    assert service[rich.flow] > service[poor.flow] + 10**6 - 2, "else it would be served as if new"


# ---- seats ----


def seats_of(server: Server) -> dict[str, int]:
    seats: dict[str, int] = {}
    for request in server.scheduler.running:
        seats[request.scope.tenant] = seats.get(request.scope.tenant, 0) + 1
    return seats


@pytest.mark.parametrize(
    ("weight", "guests", "seats"),
    [
        (1.0, 1, {"flood": 3, "guest": 1}),
        (1.0, 9, {"flood": 2, "guest": 2}),
        (3.0, 9, {"flood": 1, "guest": 3}),
        (0.25, 9, {"flood": 4}),
    ],
)
def test_a_guest_gets_its_part_of_the_seats_at_once(
    weight: float, guests: int, seats: dict[str, int]
) -> None:
    server = Server(weights={"guest": weight})
    for _ in range(9):
        server.add("flood", 4, OUTPUT)
    for _ in range(4):
        server.step()
    for _ in range(guests):
        server.add("guest", 4, OUTPUT)
    for _ in range(SEQS):
        server.step()
    assert seats_of(server) == seats
    num_preemptions = server.scheduler.num_preemptions
    assert num_preemptions == SEQS - seats["flood"]
    for _ in range(4):
        server.step()
    assert server.scheduler.num_preemptions == num_preemptions, "no seat goes back and forth"
    while server.scheduler.has_unfinished:
        server.step()
        server.scheduler.check_integrity()
    assert server.charged["flood"] + server.charged["guest"] == (9 + guests) * (4 + 2 * OUTPUT)


def test_a_guest_whose_adapter_is_on_its_way_takes_no_seat() -> None:
    server = Server()
    for _ in range(9):
        server.add("flood", 4, OUTPUT)
    server.step()
    server.step()
    scope = CacheScope("guest", "", "not there yet")
    server.scheduler.add(Request("guest", [1], SamplingParams(), 0.0, scope))
    for _ in range(4):
        server.step()
    assert seats_of(server) == {"flood": SEQS} and not server.scheduler.num_preemptions
