"""Answers that outlive the replicas that began them: the same tokens, each of them once.

Faults are injected at every point between an ingress and two or three replicas; what the client
gets is compared with what it gets when nothing happens.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from deployments.fleet.batch_queue import BatchQueue
from deployments.fleet.engine_link import MAX_FRUITLESS, MAX_LOSSES, EngineLink
from deployments.fleet.failover import ResumableRequest
from deployments.fleet.protocol import Submit
from deployments.fleet.timing import Timing
from deployments.policy.backlog import QueueLimits
from deployments.replica.replica import EngineReplica, ReplicaSettings
from engine.messages import (
    EngineInfo,
    ErrorKind,
    GenerateRequest,
    Item,
    RequestError,
    RequestOutput,
)
from engine.scheduler.request import SamplingParams
from tests.deployments.support.fakes import BASE, INFO, FakeEngine, FakeStore, until
from tests.deployments.support.fleet import LocalFleet

NUM_TOKENS = 12
IDS = ("one", "two", "three")


def seeded(request: GenerateRequest) -> list[int]:
    """A token depends on seed and position alone, as with the real sampler."""
    return [(7 * request.sampling.seed + 31 * at) % 251 for at in range(NUM_TOKENS)]


def submit(request_id: str = "r", n: int = 1, **sampling: object) -> Submit:
    params = SamplingParams(max_tokens=NUM_TOKENS, seed=5, ignore_eos=True)
    changed = replace(params, **sampling)  # type: ignore[arg-type]
    return Submit(GenerateRequest(request_id, [1, 2, 3], changed, n), None)


@dataclass
class Fleet:
    engines: dict[str, FakeEngine]
    connection: LocalFleet
    link: EngineLink

    def step(self) -> None:
        for engine in self.engines.values():
            engine.step()

    def where(self, request_id: str) -> str:
        """The replica that runs it."""
        found = [name for name, e in self.engines.items() if request_id in e._live]
        assert len(found) == 1, found
        return found[0]

    def running(self) -> Counter[str]:
        return Counter({name: len(e._live) for name, e in self.engines.items() if e._live})

    async def until_running(self, num: int = 1) -> None:
        await until(lambda: sum(self.running().values()) == num)


@asynccontextmanager
async def fleet(
    *names: str, drain_s: float = 30.0, info: EngineInfo = INFO, **timing: float
) -> AsyncIterator[Fleet]:
    """Engines stand still until the test says `step`."""
    engines = {name: FakeEngine(seeded) for name in names}
    replicas: dict[str, EngineReplica] = {}
    for name, engine in engines.items():
        engine.running.clear()
        engine.info = info
        replicas[name] = replica_of(name, engine, drain_s)
        await replicas[name].start()
    connection = LocalFleet(replicas)
    quick = {"retry_s": 0.001, "max_retry_s": 0.01, "patience_s": 1.0, **timing}
    link = EngineLink(connection, "ingress", Timing(**quick))  # type: ignore[arg-type]
    link.start()
    try:
        await until(lambda: link.hello is not None)
        yield Fleet(engines, connection, link)
    finally:
        await link.close()
        for replica in replicas.values():
            await replica.close()


def replica_of(name: str, engine: FakeEngine, drain_s: float) -> EngineReplica:
    def make_engine(on_frame: Callable[[list[Item]], None]) -> FakeEngine:
        engine.on_frame = on_frame  # type: ignore[assignment]
        return engine

    settings = ReplicaSettings(name, BASE, 8, QueueLimits(100), drain_s)
    return EngineReplica(make_engine, FakeStore(), settings)  # type: ignore[arg-type]


def in_fleet(
    test: Callable[[Fleet], Awaitable[None]],
    *names: str,
    drain_s: float = 30.0,
    info: EngineInfo = INFO,
    **timing: float,
) -> None:
    async def run() -> None:
        async with fleet(*(names or IDS[:2]), drain_s=drain_s, info=info, **timing) as running:
            await test(running)

    asyncio.run(run())


class Reader:
    """What came out of a queue, by choice."""

    def __init__(self, queue: BatchQueue, n: int = 1) -> None:
        self.token_ids: dict[int, list[int]] = {index: [] for index in range(n)}
        self.outputs: list[RequestOutput] = []
        self._queue = queue

    @property
    def ended(self) -> dict[int, str]:
        return {o.index: o.finish_reason for o in self.outputs if o.finish_reason}

    async def read(self) -> None:
        for item in await asyncio.wait_for(self._queue.next_batch(), 5):
            if isinstance(item, tuple):
                request_id, index, token_ids = item
            else:
                request_id, index, token_ids = item.request_id, item.index, item.token_ids
                self.outputs.append(item)
            assert request_id == "r" and index not in list(self.ended)[:-1]
            self.token_ids[index] += token_ids

    async def read_all(self) -> None:
        while len(self.ended) < len(self.token_ids):
            await self.read()

    def assert_whole(self, seed: int = 5) -> None:
        for index, token_ids in self.token_ids.items():
            params = replace(submit().request.sampling, seed=seed + index)
            assert token_ids == seeded(replace(submit().request, sampling=params))
        assert set(self.ended.values()) == {"length"}


async def finish(running: Fleet, reader: Reader) -> None:
    for engine in running.engines.values():
        engine.running.set()
    await reader.read_all()


# ---- before and while it is accepted -------------------------------------------------------


def test_a_replica_that_dies_before_it_accepts_costs_nothing() -> None:
    async def test(running: Fleet) -> None:
        def die_once(replica_id: str, submitted: Submit) -> None:
            if len(running.connection.submitted) == 1:
                running.connection.kill(replica_id)
                raise ConnectionError("gone")

        running.connection.on_submit = die_once
        reader = Reader(running.link.open([submit()]))
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


def test_a_request_whose_receipt_was_lost_is_delivered_once() -> None:
    """It lives and works on it, but its word got lost: the ingress asks another one too."""

    async def test(running: Fleet) -> None:
        def lose_receipt(replica_id: str, submitted: Submit) -> None:
            if len(running.connection.submitted) == 1:
                raise ConnectionError("the answer got lost")

        running.connection.on_accepted = lose_receipt
        reader = Reader(running.link.open([submit()]))
        await running.until_running(2)
        running.step()
        await running.link.refresh_stats()
        await running.until_running(1)
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


def test_outputs_that_arrive_before_the_receipt_are_kept() -> None:
    async def test(running: Fleet) -> None:
        running.connection.on_accepted = lambda replica_id, submitted: running.step()
        reader = Reader(running.link.open([submit()]))
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


def test_a_receipt_for_an_abandoned_stream_is_ignored() -> None:
    async def test(running: Fleet) -> None:
        (linked,) = running.link._streams._streams

        def break_stream(replica_id: str, submitted: Submit) -> None:
            if len(running.connection.submitted) == 1:
                running.connection.break_streams(linked)

        running.connection.on_accepted = break_stream
        reader = Reader(running.link.open([submit()]))
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


# ---- in the middle -------------------------------------------------------------------------


@pytest.mark.parametrize("num_before", [0, 1, 5, NUM_TOKENS - 1])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("fault", ["replica", "engine", "stream"])
def test_an_answer_goes_on_with_the_next_token(num_before: int, n: int, fault: str) -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit(n=n)]), n)
        await running.until_running()
        victim = running.where("r")
        for _ in range(num_before):
            running.step()
            await reader.read()
        if fault == "replica":
            running.connection.kill(victim)
            running.engines.pop(victim)
        elif fault == "engine":
            running.engines[victim].die()
        else:
            running.connection.break_streams(victim)
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


def test_outputs_sent_but_not_read_yet_are_not_requested_again() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit()]))
        await running.until_running()
        for _ in range(4):
            running.step()
            await asyncio.sleep(0.01)
        running.connection.kill(running.where("r"))
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


def test_choices_that_have_ended_stay_ended() -> None:
    async def test(running: Fleet) -> None:
        lengths = {5: NUM_TOKENS, 6: 4}  # by seed: the second choice stops early

        def answer(request: GenerateRequest) -> list[int]:
            return seeded(request)[: lengths[request.sampling.seed] - 1] + [256] * 9

        for engine in running.engines.values():
            engine.answer = answer
        reader = Reader(running.link.open([submit(n=2, ignore_eos=False)]), 2)
        await running.until_running()
        for _ in range(5):
            running.step()
            await reader.read()
        assert reader.ended == {1: "stop"}
        running.connection.kill(running.where("r"))
        await finish(running, reader)
        assert {i: len(ids) for i, ids in reader.token_ids.items()} == {0: NUM_TOKENS, 1: 4}
        resumed = running.connection.submitted[-1][1].request
        assert resumed.n == 1 and resumed.sampling.seed == 5

    in_fleet(test)


def test_two_replicas_may_die_one_after_the_other() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit()]))
        request_id = "r"
        for _ in range(2):
            await running.until_running()
            ((victim, _),) = running.running().items()
            running.engines[victim].step()
            await reader.read()
            running.connection.kill(victim)
            del running.engines[victim]
        await finish(running, reader)
        reader.assert_whole()
        assert [r for r, _ in running.connection.submitted] == list(IDS), request_id

    in_fleet(test, *IDS)


def test_a_request_that_kills_every_replica_it_reaches_fails() -> None:
    async def test(running: Fleet) -> None:
        num_killed = 0
        reader = Reader(running.link.open([submit()]))
        while not reader.ended:
            await until(lambda: bool(running.running()) or running.link.num_live == 0)
            for name in running.running():
                running.engines[name].die()
                running.engines[name].is_up = True
                num_killed += 1
            if running.link.num_live == 0:
                await reader.read()
        assert reader.ended == {0: "error"} and num_killed == MAX_FRUITLESS

    in_fleet(test)


@pytest.mark.parametrize("num_deaths", [MAX_LOSSES - 1, MAX_LOSSES])
def test_a_request_that_goes_on_between_deaths_is_not_blamed_for_them(num_deaths: int) -> None:
    """One token a replica: far more deaths than a request without any is forgiven."""

    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit()]))
        for _ in range(num_deaths):
            await running.until_running()
            ((name, _),) = running.running().items()
            running.engines[name].step()
            await reader.read()
            running.engines[name].die()
            running.engines[name].is_up = True
        await finish(running, reader)
        assert reader.ended == {0: "error" if num_deaths == MAX_LOSSES else "length"}

    in_fleet(test)


def test_prompt_logprobs_come_once() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit(n=2, prompt_logprobs=0, logprobs=0)]), 2)
        await running.until_running()
        running.connection.kill(running.where("r"))
        await until(lambda: len(running.connection.submitted) == 2)
        victim = running.connection.submitted[1][0]
        await until(lambda: bool(running.engines[victim]._live))
        running.engines[victim].step()
        await reader.read()
        running.connection.kill(victim)
        await finish(running, reader)
        reader.assert_whole()
        assert sum(output.prompt_logprobs is not None for output in reader.outputs) == 1
        assert sum(len(o.logprobs or ()) for o in reader.outputs) == 2 * NUM_TOKENS

    in_fleet(test, *IDS)


# ---- nobody there, too much, the way out ---------------------------------------------------


def test_while_there_is_no_replica_a_stream_waits_for_one() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit()]))
        await running.until_running()
        running.step()
        await reader.read()
        replica = running.connection.kill("one")
        await asyncio.sleep(0.03)
        assert not reader.ended and running.link.num_live == 1
        running.connection.replicas["one"] = replica
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test, "one")


def test_without_a_replica_the_stream_ends_with_an_error_after_the_patience() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit(n=2)]), 2)
        await running.until_running()
        running.connection.kill("one")
        await reader.read_all()
        assert reader.ended == {0: "error", 1: "error"}
        assert running.link.num_live == 0

    in_fleet(test, "one", patience_s=0.05)


def test_a_stream_waits_for_a_model_that_takes_long_to_load_and_a_new_request_does_not() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit()]))
        await running.until_running()
        running.step()
        await reader.read()
        replica = running.connection.kill("one")
        (output,) = await asyncio.wait_for(running.link.open([submit("new")]).next_batch(), 5)
        assert isinstance(output, RequestOutput) and output.finish_reason == "error"
        await asyncio.sleep(0.1)
        assert not reader.ended
        running.connection.replicas["one"] = replica
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test, "one", info=replace(INFO, load_s=20.0), patience_s=0.05)


def test_a_full_replica_sends_new_requests_to_the_others_before_anybody_is_refused() -> None:
    async def test(running: Fleet) -> None:
        for replica in running.connection.replicas.values():
            replica._settings = replace(replica._settings, limits=QueueLimits(1))
        for name in ("a", "b"):
            running.link.open([submit(name)])
        await running.until_running(2)
        assert set(running.running().values()) == {1}
        queue = running.link.open([submit("c")])
        (output,) = await asyncio.wait_for(queue.next_batch(), 5)
        assert output.error is not None and output.error.kind == "overloaded"  # type: ignore[union-attr]

    in_fleet(test)


def test_a_draining_replica_finishes_what_it_has_and_takes_nothing_new() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit()]))
        await running.until_running()
        leaving = running.where("r")
        running.connection.replicas[leaving].drain()
        running.link.open([submit("new")])
        await running.until_running(2)
        assert running.where("r") == leaving and set(running.running().values()) == {1}
        await finish(running, reader)
        reader.assert_whole()
        assert len(running.connection.submitted) == 3, "one of them was refused"
        await until(lambda: leaving not in running.link._streams._streams)

    in_fleet(test)


def test_the_router_tells_a_replica_that_it_is_leaving() -> None:
    async def test(running: Fleet) -> None:
        running.link.open([submit()])
        await running.until_running()
        leaving = running.where("r")
        running.connection.leaving.add(leaving)
        await running.link.refresh_stats()
        assert running.connection.replicas[leaving].is_draining

    in_fleet(test)


@pytest.mark.parametrize("n", [1, 2])
def test_requests_that_a_draining_replica_cannot_finish_go_on_elsewhere(n: int) -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit(n=n)]), n)
        await running.until_running()
        leaving = running.where("r")
        running.step()
        await reader.read()
        running.connection.leaving.add(leaving)
        replica = running.connection.replicas[leaving]
        replica.drain()
        replica.take_care(asyncio.get_running_loop().time() + 31)
        await until(lambda: running.engines[leaving]._live == {})
        await running.until_running(n)
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


def test_what_a_replica_hands_back_is_not_refused_by_full_ones() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit()]))
        await running.until_running()
        leaving = running.connection.replicas[running.where("r")]
        running.step()
        await reader.read()
        replicas = running.connection.replicas.values()
        for replica in replicas:
            replica._settings = replace(replica._settings, limits=QueueLimits(0))
        leaving._requests.fail_all(RequestError(ErrorKind.HANDED_BACK, "The replica was stopped."))
        await until(lambda: len(running.connection.submitted) > 4 or not running.link.num_live)
        assert running.link.num_live == 1, "it was refused, and has begun"
        for replica in replicas:
            replica._settings = replace(replica._settings, limits=QueueLimits(100))
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


def test_the_time_for_the_first_token_goes_on_from_try_to_try() -> None:
    async def test(running: Fleet) -> None:
        now_s = 100.0
        running.link._placement._timing = replace(running.link._timing, clock=lambda: now_s)
        running.link._timing = running.link._placement._timing
        reader = Reader(running.link.open([replace(submit(), timeout_s=40.0)]))
        await running.until_running()
        now_s += 15.0
        running.connection.kill(running.where("r"))
        await until(lambda: len(running.connection.submitted) == 2)
        await finish(running, reader)
        reader.assert_whole()
        assert [s.timeout_s for _, s in running.connection.submitted] == [40.0, 25.0]

    in_fleet(test)


def test_a_choice_without_a_token_has_no_timeout_where_another_has_begun() -> None:
    heard: list[Item] = []
    resumable = ResumableRequest(replace(submit(n=2), timeout_s=1.0), heard.append)
    attempt = resumable.first_attempt()
    assert resumable.submit_at(attempt, 0.25).timeout_s == 0.75
    resumable.take_tokens(attempt, ("r", 1, [9]))
    rests = resumable.next_attempts(attempt, True, ())
    assert [resumable.submit_at(rest, 5.0).timeout_s for rest in rests] == [None, None]


def test_a_begun_request_goes_on_where_a_choice_of_it_gives_way_in_a_queue() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit(n=2)]), 2)
        await running.until_running()
        running.step()
        await reader.read()
        where = running.where("r")
        requests = running.connection.replicas[where]._requests
        requests.fail("r", RequestError(ErrorKind.OVERLOADED, "others have less"))
        await finish(running, reader)
        reader.assert_whole()

    in_fleet(test)


def test_a_stream_to_a_replica_that_is_gone_is_not_answered_by_another() -> None:
    async def test(running: Fleet) -> None:
        running.connection.on_accepted = lambda replica_id, s: None
        (linked,) = running.link._streams._streams
        other = next(name for name in running.engines if name != linked)

        def only_other_then_none(replica_id: str, submitted: Submit) -> None:
            if replica_id == other:
                running.connection.kill(other)

        running.connection.on_accepted = only_other_then_none
        running.link._streams._suspects[linked] = running.link._timing.clock() + 60
        reader = Reader(running.link.open([submit()]))
        await finish(running, reader)
        reader.assert_whole()
        assert [r for r, _ in running.connection.submitted] == [other, linked]

    in_fleet(test)


# ---- bookkeeping ---------------------------------------------------------------------------


def test_the_largest_seed_has_choices_after_it() -> None:
    heard: list[Item] = []
    resumable = ResumableRequest(submit(n=2, seed=2**63 - 1), heard.append)
    attempt = resumable.first_attempt()
    resumable.take_tokens(attempt, ("r", 1, [9]))
    rests = resumable.next_attempts(attempt, 1, ())
    seeds = [rest.submit.request.sampling.seed for rest in rests]
    assert seeds == [2**63 - 1, -(2**63)], "as the sampler counts: modulo 2**64"


def test_a_request_with_a_grammar_takes_it_along_with_the_tokens_so_far() -> None:
    """Elsewhere its matcher is told these tokens before it allows the next one."""
    resumable = ResumableRequest(submit(n=2, ignore_eos=False, grammar="g"), lambda item: None)
    attempt = resumable.first_attempt()
    resumable.take_tokens(attempt, ("r", 1, [9, 8]))
    rests = [rest.submit.request for rest in resumable.next_attempts(attempt, 1, ())]
    assert [rest.sampling.grammar for rest in rests] == ["g", "g"]
    assert [rest.output_token_ids for rest in rests] == [[], [9, 8]]


def test_nothing_is_delivered_after_a_choice_has_ended() -> None:
    heard: list[Item] = []
    resumable = ResumableRequest(submit(), heard.append)
    attempt = resumable.first_attempt()
    resumable.take_output(attempt, RequestOutput("r", 0, [1], finish_reason="stop"))
    resumable.take_tokens(attempt, ("r", 0, [2]))
    resumable.take_output(attempt, RequestOutput("r", 0, [3], finish_reason="stop"))
    assert len(heard) == 1 and resumable.attempts == {}


# ---- books and choices that end early ------------------------------------------------------


def test_what_the_second_replica_has_cached_is_not_billed_as_cached() -> None:
    async def test(running: Fleet) -> None:
        reader = Reader(running.link.open([submit(n=2)]), n=2)
        await running.until_running()
        where = running.where("r")
        running.step()
        await reader.read()
        for engine in running.engines.values():
            engine.num_cached = 3
        running.connection.kill(where)
        await finish(running, reader)
        reader.assert_whole()
        booked = [o.metrics.num_cached_tokens for o in reader.outputs if o.metrics is not None]
        assert len(booked) >= 3 and set(booked) == {2}

    in_fleet(test)


def test_a_choice_that_its_reader_ended_is_aborted_and_never_resumed() -> None:
    async def test(running: Fleet) -> None:
        queue = running.link.open([submit(n=3)])
        reader = Reader(queue, n=3)
        await running.until_running()
        where = running.where("r")
        running.step()
        await reader.read()
        running.link.end_choice(queue, 0, 1)
        running.link.end_choice(queue, 0, 1)
        await until(lambda: running.engines[where].aborted_choices == [("r", 1)])
        running.connection.kill(where)
        for engine in running.engines.values():
            engine.running.set()
        while set(reader.ended) != {0, 2}:
            await reader.read()
        assert len(reader.token_ids[1]) == 1
        del reader.token_ids[1]
        reader.assert_whole()
        resumed = [r for name, e in running.engines.items() if name != where for r in e.requests]
        assert sorted(r.sampling.seed for r in resumed) == [5, 7]

    in_fleet(test)


def test_the_last_choice_that_its_reader_ends_ends_the_request() -> None:
    async def test(running: Fleet) -> None:
        queue = running.link.open([submit(n=2)])
        reader = Reader(queue, n=2)
        await running.until_running()
        where = running.where("r")
        running.step()
        await reader.read()
        running.link.end_choice(queue, 0, 0)
        running.link.end_choice(queue, 0, 1)
        await until(lambda: running.engines[where].aborted == ["r"])
        assert running.link.num_live == 0
        running.link.release(queue)

    in_fleet(test)


# ---- what is known of all replicas ---------------------------------------------------------


async def until_known(fleet: Fleet, num: int, outage: bool) -> None:
    """Wait until the ingress has heard of so many replicas; until then there is no outage."""
    async with asyncio.timeout(60):
        while len(fleet.link._streams.greeted()) < num or (fleet.link.outage is None) is outage:
            assert outage or fleet.link.outage is None
            await fleet.link.refresh_stats()
            await asyncio.sleep(0.001)


def test_it_is_no_outage_where_a_replica_takes_requests_of_which_nothing_was_heard() -> None:
    async def test(fleet: Fleet) -> None:
        for engine in (fleet.engines["one"], fleet.engines["two"]):
            engine.die()
        await until_known(fleet, 3, outage=False)
        for _ in range(20):
            await fleet.link.refresh_stats()
            assert fleet.link.outage is None

    in_fleet(test, *IDS)


def test_it_is_an_outage_once_all_engines_are_down_and_ends_with_the_first() -> None:
    async def test(fleet: Fleet) -> None:
        for engine in fleet.engines.values():
            engine.die()
        await until_known(fleet, 3, outage=True)
        assert "killed" in str(fleet.link.outage)
        fleet.engines["two"].is_up = True
        await fleet.link.refresh_stats()
        assert fleet.link.outage is None

    in_fleet(test, *IDS)


# ---- adapters that are loaded ahead --------------------------------------------------------


def test_an_adapter_is_loaded_at_the_replica_that_is_meant() -> None:
    ref = FakeStore("red").refs["red"]

    async def test(there: Fleet) -> None:
        for name in ("two", "one"):
            engine = there.engines[name]
            done = asyncio.ensure_future(there.link.warm(ref, name))
            await until(lambda engine=engine: len(engine.requests) == 1)
            there.step()
            assert await done is None
            engine.totals = replace(engine.totals, adapters_in_memory=(ref.digest,))
        await until(lambda: sorted(there.link.holders([ref.digest])) == ["one", "two"])
        assert there.link.holders(["another"]) == []

    in_fleet(test, renew_s=0.01)
