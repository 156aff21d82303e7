"""What a replica takes, and what it lets go of."""

import asyncio

import pytest

from deployments.fleet.protocol import StreamId, Submit, UnknownStream
from deployments.policy.capacity import Capacity
from deployments.replica.ingress_streams import LEASE_S
from engine.messages import EngineStats, ErrorKind, GenerateRequest, RequestOutput
from engine.scheduler.request import SamplingParams
from tests.deployments.support.fakes import Clock, Server, in_server, until


def submit(request_id: str, n: int = 1) -> Submit:
    request = GenerateRequest(request_id, [1, 2], SamplingParams(max_tokens=8), n)
    return Submit(request, None)


def test_a_replica_is_unhealthy_once_its_engine_is_given_up() -> None:
    async def test(server: Server) -> None:
        server.replica.check_health()
        server.engine.failure = "no memory"
        with pytest.raises(RuntimeError, match="no memory"):
            server.replica.check_health()

    in_server(test)


def test_a_replica_reaps_the_requests_of_an_ingress_that_fell_silent() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        server.engine.running.clear()
        server.link.open([submit("a")])
        await until(lambda: len(server.engine.requests) == 1)
        server.replica.take_care(clock.now_s + LEASE_S - 0.1)
        assert server.engine.aborted == []
        server.replica.take_care(clock.now_s + LEASE_S + 0.1)
        assert server.engine.aborted == ["a"]
        assert LEASE_S < 10

    in_server(test, clock=clock)


def test_requests_for_a_stream_that_is_never_attached_are_reaped() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        server.engine.running.clear()
        assert server.replica.submit("another ingress", {}, submit("a")).refusal is None
        server.replica.take_care(clock.now_s + LEASE_S + 0.1)
        assert server.engine.aborted == ["a"]

    in_server(test, clock=clock)


def test_outputs_wait_until_their_stream_is_attached() -> None:
    async def test(server: Server) -> None:
        server.replica.submit("another ingress", {}, submit("a"))
        await until(lambda: server.replica._requests.by_id == {})
        stream = server.replica.attach("another ingress", {})
        frames = [await anext(stream) for _ in range(2)]
        assert [item for item in frames[1] if isinstance(item, RequestOutput)][-1].finish_reason  # type: ignore[union-attr]
        await stream.aclose()

    in_server(test)


def test_a_later_epoch_ends_the_stream_before_it_and_an_earlier_one_is_refused() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        replica = server.replica
        assert replica.submit("i", {"replica": 3}, submit("a")).epoch == 3
        assert replica.submit("i", {"replica": 4}, submit("b")).refusal is None
        assert server.engine.aborted == ["a"]
        refusal = replica.submit("i", {"replica": 3}, submit("c")).refusal
        assert refusal is not None and refusal.kind == ErrorKind.STALE_STREAM
        with pytest.raises(UnknownStream):
            await replica.control(StreamId("i", 3), [], True)

    in_server(test)


def test_submitting_the_same_request_twice_runs_it_once() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        receipts = [server.replica.submit("i", {}, submit("a")) for _ in range(2)]
        assert receipts[0] == receipts[1] and receipts[0].refusal is None
        assert len(server.engine.requests) == 1

    in_server(test)


def test_a_replica_reports_what_its_steps_have_shown_and_what_comes_to_it() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        replica, engine = server.replica, server.engine
        engine.totals = EngineStats(
            tokens_per_s=800.0, step_s=0.02, row_s=0.001, adapters_used=0.5, num_blocks_used=16
        )
        replica.load()
        server.link.open([submit("a", n=2)])
        await until(lambda: len(engine.requests) == 1 and not replica._requests.by_id)
        clock.now_s += 2.0
        load, figures = replica.load(), replica.figures()
        assert (load.prompt_tokens_per_s, load.adapters_used, load.kv_used) == (1.0, 0.5, 0.25)
        answer = replica._requests.meter.mean_answer
        assert answer < 8 and load.output_tokens_per_s == answer
        assert load.capacity == Capacity(64, 800.0, 0.02, 0.001)
        assert figures.tokens_per_s == 800.0 and figures.crowding_s == 0.001 * answer
        assert replica.load().prompt_tokens_per_s == 0, "nothing has come since"

    in_server(test, clock=clock)


def test_a_full_replica_says_when_to_come_back_by_its_own_steps() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        server.engine.totals = EngineStats(step_s=0.5, row_s=0.0)
        waiting = [asyncio.create_task(server.post("/v1/completions", prompt="x")) for _ in "12"]
        await until(lambda: len(server.engine.requests) == 2)
        refused = await server.post("/v1/completions", prompt="x")
        # One answer of 64 tokens, as long as none has ended, at 64 rows every half second.
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        server.engine.totals = EngineStats(step_s=50.0, row_s=0.0)
        assert (await server.post("/v1/completions", prompt="x")).headers["retry-after"] == "50"
        server.engine.running.set()
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200, 200]

    in_server(test, max_requests=2)
