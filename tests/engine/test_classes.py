"""Classes of requests beside each other: who goes first, and what the lower ones still get."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from engine.scheduler import classes
from engine.scheduler.classes import GRAIN, LEAST_SHARE, PriorityClass
from engine.scheduler.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT
from engine.scheduler.request import CacheScope, Request, SamplingParams
from tests.engine.test_fairness import OUTPUT, PROMPT, SEQS, Server

INTERACTIVE, STANDARD, BATCH = PriorityClass


def running(server: Server) -> Counter[PriorityClass]:
    return Counter(request.priority_class for request in server.scheduler.running)


def steps(server: Server, count: int) -> None:
    for _ in range(count):
        server.step()
        server.scheduler.check_integrity()


def test_the_lowest_class_gives_up_its_seats_first() -> None:
    server = Server()
    for priority_class in (STANDARD, BATCH, STANDARD, BATCH):
        server.add("a", 4, OUTPUT, priority_class)
    steps(server, 3)
    assert running(server) == {STANDARD: 2, BATCH: 2}
    server.add("b", 4, OUTPUT, INTERACTIVE)
    steps(server, 2)
    assert running(server) == {INTERACTIVE: 1, STANDARD: 2, BATCH: 1}
    server.add("b", 4, OUTPUT, INTERACTIVE)
    server.add("c", 4, OUTPUT, INTERACTIVE)
    steps(server, 3)
    assert running(server) == {INTERACTIVE: 3, STANDARD: 1}
    while server.scheduler.has_unfinished:
        steps(server, 1)
    assert server.charged == {"a": 4 * (4 + 2 * OUTPUT), "b": 2 * (4 + 2 * OUTPUT), "c": 4 + 40}


def test_a_higher_class_begins_before_what_came_before_it() -> None:
    server = Server()
    for _ in range(3 * SEQS):
        server.add("a", 4, OUTPUT)
    steps(server, 2)
    server.add("b", 4, OUTPUT, BATCH)
    server.add("c", 4, OUTPUT, INTERACTIVE)
    while server.scheduler.has_unfinished:
        steps(server, 1)
    assert server.begun.index("c") == SEQS and server.begun[-1] == "b"


def test_a_higher_class_takes_the_blocks_of_a_lower_one() -> None:
    server = Server(num_blocks=16)  # of 4 tokens
    server.add("a", 20, 20, BATCH)
    server.add("a", 8, 8, BATCH)
    steps(server, 6)
    assert running(server) == {BATCH: 2}
    server.add("b", 40, 1, INTERACTIVE)
    for _ in range(6):
        steps(server, 1)
    assert server.begun[-1] == "b" and server.scheduler.num_preemptions
    while server.scheduler.has_unfinished:
        steps(server, 1)


def test_a_lower_class_gets_all_that_is_left() -> None:
    server = Server()
    for _ in range(2 * SEQS):
        server.add("a", 4, OUTPUT, BATCH)
    server.add("b", 4, OUTPUT, INTERACTIVE)
    steps(server, 4)
    assert running(server) == {INTERACTIVE: 1, BATCH: SEQS - 1}
    assert server.scheduler.num_preemptions == 0, "there was a seat for everybody who came in time"


def given(server: Server) -> dict[PriorityClass, float]:
    """What has been computed for each class, by the names of its tenants."""
    return {each: server.charged[each.name] for each in PriorityClass}


def serve_backlogged(server: Server, present: Sequence[PriorityClass], num_steps: int) -> float:
    """Keep these classes waiting; return the most that a lower one was ever owed."""
    rng, most = random.Random(0), 0.0
    for _ in range(num_steps):
        for each in present:
            while server.num_waiting(each.name) <= SEQS:
                server.add(each.name, rng.randint(1, PROMPT), rng.randint(1, OUTPUT), each)
        server.step()
        tokens = given(server)
        for each in present[1:]:
            above = sum(tokens[other] for other in present if other < each)
            most = max(most, LEAST_SHARE[each] * above - tokens[each])
    return most


# What is computed until one that runs has ended, and a prompt that may come before the next.
RUNNING = OUTPUT_WEIGHT * SEQS * OUTPUT + 2 * INPUT_WEIGHT * PROMPT
OWED = GRAIN + RUNNING


@pytest.mark.parametrize(
    "present",
    [(INTERACTIVE, BATCH), (STANDARD, BATCH), (INTERACTIVE, STANDARD, BATCH)],
    ids=["two", "lower two", "three"],
)
def test_a_lower_class_gets_its_least_share(present: Sequence[PriorityClass]) -> None:
    server = Server()
    assert serve_backlogged(server, present, 4000) <= OWED
    tokens = given(server)
    total = sum(tokens.values())
    assert total > 40 * OWED, "so long that a drift would be seen"
    least = sum(LEAST_SHARE[each] for each in present[1:])
    assert tokens[present[0]] >= total * (1 - least) - RUNNING, "and hardly more than that"


def test_without_a_least_share_it_would_starve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "LEAST_SHARE", dict.fromkeys(PriorityClass, 0.0))
    assert serve_backlogged(Server(), (INTERACTIVE, BATCH), 4000) > 3 * OWED


def test_what_a_class_was_owed_keeps_its_seat() -> None:
    server = Server()
    serve_backlogged(server, (INTERACTIVE, BATCH), 1000)
    kept: dict[str, int] = {}
    for _ in range(300):
        serve_backlogged(server, (INTERACTIVE, BATCH), 1)
        for request in server.scheduler.running:
            if request.keeps_seat:
                life = kept.setdefault(request.request_id, request.life)
                assert request.life == life, "it went back to the queue"
    assert len(kept) > 3


def test_random_requests_of_all_classes_all_end() -> None:
    for seed in range(6):
        rng, server = random.Random(seed), Server(num_blocks=20)
        for _ in range(150):
            if rng.random() < 0.3:
                length, output = rng.randint(1, PROMPT), rng.randint(1, OUTPUT)
                server.add(rng.choice("abc"), length, output, rng.choice(list(PriorityClass)))
            if rng.random() < 0.05 and server.num_added:
                server.scheduler.abort(f"r{rng.randint(1, server.num_added)}")
            steps(server, 1)
        for _ in range(3000):
            if not server.scheduler.has_unfinished:
                break
            steps(server, 1)
        assert not server.scheduler.has_unfinished


def test_tenants_share_within_a_class() -> None:
    server = Server(weights={"a": 1.0, "b": 3.0})
    rng = random.Random(0)
    for _ in range(3000):
        for tenant in "ab":
            while server.num_waiting(tenant) <= SEQS:
                server.add(tenant, rng.randint(1, PROMPT), rng.randint(1, OUTPUT), BATCH)
        server.step()
    assert server.charged["b"] / server.charged["a"] == pytest.approx(3.0, rel=0.03)


def test_an_adapters_load_is_charged_once_to_whom_it_is_for() -> None:
    server = Server(num_blocks=600)
    scheduler = server.scheduler
    scheduler.adapters.set_ready("digest", 10)  # as large as 10 blocks of 4 tokens
    for number in range(3):
        scope = CacheScope("a", "", "digest")
        sampling = SamplingParams(max_tokens=1)
        scheduler.add(Request(f"x{number}", [number], sampling, 0.0, scope))
    while scheduler.has_unfinished:
        server.step()
    assert server.counter("a") == 3 * (INPUT_WEIGHT + OUTPUT_WEIGHT) + 10 * 4 * INPUT_WEIGHT


def test_a_closed_loop_of_a_higher_class_leaves_a_lower_one_its_part() -> None:
    """As many clients as seats, each of which asks again once it is answered: that the queue of
    the higher class is empty nearly always takes nothing from the lower one."""
    server, rng, most = Server(), random.Random(0), 0.0
    for _ in range(4000):
        while sum(r.priority_class is INTERACTIVE for r in server.requests()) < SEQS:
            server.add("INTERACTIVE", rng.randint(1, PROMPT), rng.randint(1, OUTPUT), INTERACTIVE)
        while server.num_waiting("BATCH") <= SEQS:
            server.add("BATCH", rng.randint(1, PROMPT), rng.randint(1, OUTPUT), BATCH)
        server.step()
        tokens = given(server)
        most = max(most, LEAST_SHARE[BATCH] * tokens[INTERACTIVE] - tokens[BATCH])
    assert most <= OWED
    tokens = given(server)
    assert tokens[INTERACTIVE] > 20 * OWED, "so long that a drift would be seen"
    assert tokens[BATCH] <= LEAST_SHARE[BATCH] * tokens[INTERACTIVE] + RUNNING


def test_what_is_owed_stays_while_nothing_higher_is_there_and_goes_with_who_waits() -> None:
    shares = classes.ClassShares()
    batch, interactive = classes.Flow("b", BATCH), classes.Flow("i", INTERACTIVE)
    shares.note_waiting([batch, interactive])
    shares.charge(INTERACTIVE, 1600.0)
    shares.note_waiting([batch, interactive])
    assert shares.owed(BATCH) == 100.0
    shares.charge(BATCH, 70.0)
    shares.note_waiting([batch])
    assert shares.owed(BATCH) == 100.0, "nobody gave way to it"
    shares.begin(INTERACTIVE)
    shares.charge(INTERACTIVE, 1600.0)
    shares.note_waiting([batch])
    assert shares.owed(BATCH) == 200.0, "it waits beside one that runs"
    shares.charge(BATCH, 900.0)
    shares.note_waiting([batch])
    assert shares.owed(BATCH) == 0.0, "it got more while nobody else waited"
    shares.charge(INTERACTIVE, 1600.0)
    shares.note_waiting([])
    assert shares.owed(BATCH) == 0.0, "it did not wait"


def test_what_keeps_its_seat_keeps_its_blocks_before_others() -> None:
    server = Server(num_blocks=16)  # of 4 tokens
    server.add("a", 4, 40, BATCH)
    server.add("b", 4, 40, STANDARD)
    server.add("c", 4, 40, STANDARD)
    steps(server, 3)
    kept = next(r for r in server.scheduler.running if r.priority_class is BATCH)
    kept.keeps_seat, life = True, kept.life
    while kept.finish_reason is None:
        steps(server, 1)
        assert kept.life in (life, 0) and (kept.life or kept.finish_reason), "it was sent back"
    assert server.scheduler.num_preemptions


def test_the_load_for_a_probe_is_charged_to_whom_it_is_for() -> None:
    server = Server(num_blocks=600)
    scheduler = server.scheduler
    scheduler.adapters.set_ready("digest", 10)
    scope, sampling = CacheScope("a", "", "digest"), SamplingParams(max_tokens=1)
    waits = Request("waits", [1], sampling, 0.0, scope)
    waits.awaits_grammar = True
    scheduler.add(waits)
    scheduler.add(Request("probe", [2], sampling, 0.0, CacheScope("", "", "digest")), is_next=True)
    server.step()
    assert waits.load_bytes == 10 and server.counter("a") == 10 * 4 * INPUT_WEIGHT
