"""Faults between an ingress and a replica: no request waits for ever, nothing leaks."""

import asyncio
import json

import pytest

from deployments.fleet.batch_queue import BatchQueue
from deployments.fleet.engine_link import EngineLink
from deployments.fleet.protocol import Abort, Submit
from deployments.fleet.timing import Timing
from engine.messages import GenerateRequest, RequestOutput
from engine.scheduler.request import SamplingParams
from tests.deployments.support.fakes import (
    Answered,
    Client,
    Clock,
    Server,
    in_server,
    until,
)
from tests.deployments.support.fleet import LocalFleet

COMPLETIONS = "/v1/completions"


def submit(request_id: str, n: int = 1) -> Submit:
    request = GenerateRequest(request_id, [1, 2], SamplingParams(max_tokens=8), n)
    return Submit(request, None)


async def last_outputs(queue: BatchQueue, n: int = 1) -> list[RequestOutput]:
    """The outputs that end the choices; fails rather than wait for ever."""
    ended: list[RequestOutput] = []
    while len(ended) < n:
        items = await asyncio.wait_for(queue.next_batch(), 5)
        ended += [i for i in items if isinstance(i, RequestOutput) and i.finish_reason]
    return ended


def start(server: Server, model: str = "base", stream: bool = True) -> Client:
    body = json.dumps({"model": model, "prompt": "abc", "stream": stream}).encode()
    return Client(server.api, "POST", COMPLETIONS, body)


# ---- the replica or its engine goes away ---------------------------------------------------


def test_where_no_replica_is_left_every_choice_ends_with_an_error() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        queues = [server.link.open([submit(name, n=2)]) for name in ("a", "b")]
        await until(lambda: len(server.engine.requests) == 2)
        server.connection.kill("replica")
        for queue in queues:
            outputs = await last_outputs(queue, 2)
            assert [(o.index, o.finish_reason) for o in outputs] == [(0, "error"), (1, "error")]
        assert sorted(server.engine.aborted) == ["a", "b"], "the replica lets go of them too"
        assert server.link.num_live == 0

    in_server(test, patience_s=0.05)


def test_when_a_stream_breaks_the_same_replica_may_go_on_in_a_new_one() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = start(server)
        await until(lambda: len(server.engine.requests) == 1)
        server.engine.step()
        server.connection.break_streams("replica")
        await until(lambda: len(server.engine.requests) == 2)
        server.engine.running.set()
        await client.done
        assert client.answered.text() == "ABC"

    in_server(test)


def test_a_replica_that_falls_silent_is_given_up() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        queue = server.link.open([submit("a")])
        await until(lambda: server.link.stats.num_running == 1)
        server.connection.hang = True
        outputs = await last_outputs(queue)
        assert outputs[0].error is not None
        assert server.link.hello is None
        server.connection.hang = False
        await until(lambda: server.link.hello is not None)

    in_server(test, renew_s=0.01, silence_s=0.05, patience_s=0.05, hello_s=0.0)


def test_a_stream_goes_on_once_the_engine_is_started_again() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = start(server)
        await until(lambda: len(server.engine.requests) == 1)
        server.engine.step()
        await until(lambda: client.answered.body != b"")
        server.engine.die()
        later = start(server)
        await asyncio.sleep(0.02)
        assert not client.done.done() and not later.done.done()
        server.engine.is_up = True
        server.engine.running.set()
        for waiting in (client, later):
            await waiting.done
            assert waiting.answered.text() == "ABC"

    in_server(test)


def test_health_says_that_the_only_engine_is_down_and_why() -> None:
    async def test(server: Server) -> None:
        async def health() -> Answered:
            await server.link.refresh_stats()
            return await server.call("GET", "/health")

        assert (await health()).status == 200
        server.engine.die()
        async with asyncio.timeout(60):
            while (answer := await health()).status == 200:
                await asyncio.sleep(0.001)
        assert answer.status == 503
        assert "started again" in answer.json["models"]["base"]["reason"]
        assert "killed" in answer.json["models"]["base"]["reason"]
        server.engine.is_up = True
        assert (await health()).status == 200

    in_server(test)


def test_an_engine_that_does_not_come_back_is_an_answer() -> None:
    async def test(server: Server) -> None:
        server.engine.die()
        answer = await server.post(COMPLETIONS, prompt="x")
        assert answer.status == 503 and answer.error["code"] == "unavailable"
        assert "started again" in answer.error["message"]

    in_server(test, patience_s=0.05)


# ---- messages that get lost ----------------------------------------------------------------


def test_a_request_that_its_replica_has_forgotten_is_submitted_again() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        server.engine.running.clear()
        server.link.open([submit("a")])
        await until(lambda: len(server.engine.requests) == 1)
        server.replica._requests.drop(["a"])
        await server.link.refresh_stats()
        assert len(server.engine.requests) == 1, "its last output may only be on its way"
        clock.now_s += Timing().lost_s + 0.1
        await server.link.refresh_stats()
        await until(lambda: len(server.engine.requests) == 2)

    in_server(test, clock=clock)


def test_an_abort_that_got_lost_is_sent_again() -> None:
    lost: list[Abort] = []

    def lose_first(abort: Abort) -> bool:
        lost.append(abort)
        return len(lost) == 1

    async def test(server: Server) -> None:
        server.engine.running.clear()
        server.connection.lose = lose_first
        queue = server.link.open([submit("a")])
        await until(lambda: len(server.engine.requests) == 1)
        server.link.release(queue)
        await until(lambda: bool(lost))
        assert server.engine.aborted == []
        await server.link.refresh_stats()
        await until(lambda: server.engine.aborted == ["a"])

    in_server(test)


def test_a_request_released_before_its_receipt_is_aborted() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        queues: list[BatchQueue] = []
        server.connection.on_accepted = lambda r, s: server.link.release(queues[0])
        queues.append(server.link.open([submit("a")]))
        await until(lambda: server.engine.aborted == ["a"])
        assert server.link.num_live == 0

    in_server(test)


def test_outputs_after_an_abort_are_dropped() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        queue = server.link.open([submit("a")])
        await until(lambda: len(server.engine.requests) == 1)
        server.link.release(queue)
        await until(lambda: server.engine.aborted == ["a"])
        server.engine.on_frame([RequestOutput("a", 0, [1], finish_reason="abort")])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.next_batch(), 0.05)

    in_server(test)


@pytest.mark.parametrize("num_turns", range(12))
def test_a_link_closes_at_any_moment_of_a_stream_that_fails(num_turns: int) -> None:
    async def run() -> None:
        link = EngineLink(LocalFleet({}), "ingress")
        link.start()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await asyncio.wait_for(link.close(), 2)

    asyncio.run(run())
