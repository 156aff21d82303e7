"""A model without a replica: who waits for the first one, for how long, and what they hear."""

import asyncio

import pytest

from deployments.fleet.held_requests import HeldRequests, ModelNotReady
from tests.deployments.support.fakes import Clock, Server, in_server, until

COMPLETIONS = "/v1/completions"


def held(server: Server) -> HeldRequests:
    assert server.link.held is not None
    return server.link.held


def test_a_request_to_a_model_without_a_replica_waits_for_its_first_one() -> None:
    async def test(server: Server) -> None:
        replica = server.connection.replicas.pop("replica")
        await asyncio.sleep(0.05)
        assert server.link.is_asleep and not held(server).is_waking, "nobody asks for one"
        health = await server.call("GET", "/health")
        assert (health.status, health.json["models"]["base"]) == (200, {"status": "asleep"})
        answers = [
            asyncio.create_task(server.post(COMPLETIONS, model=model, prompt="x"))
            for model in ("base", "red", "base:red", "red:0.5+blue:0.5")
        ]
        await until(lambda: held(server).num == len(answers))
        await asyncio.sleep(0.1)
        server.connection.replicas["replica"] = replica
        assert [answer.status for answer in await asyncio.gather(*answers)] == [200] * 4
        figures = (await server.call("GET", "/metrics")).body.decode()
        assert 'reef_cold_starts_total{model="base"} 1.0' in figures
        assert 'reef_requests_waking{model="base"} 0.0' in figures
        first = [f for f in figures.splitlines() if "time_to_first_token_seconds_sum" in f]
        assert min(float(line.split()[-1]) for line in first) > 0.1, "the wait counts"
        assert (await server.call("GET", "/health")).json["models"]["base"] == {"status": "ok"}

    in_server(test, max_held=10)


def test_no_more_wait_than_may_and_the_others_are_told_when_to_come_back() -> None:
    async def test(server: Server) -> None:
        replica = server.connection.replicas.pop("replica")
        first = [asyncio.create_task(server.post(COMPLETIONS, prompt="x")) for _ in range(2)]
        await until(lambda: held(server).num == 2)
        refused = await server.post(COMPLETIONS, prompt="x")
        assert (refused.status, refused.headers["retry-after"]) == (503, "10")
        assert "2 requests wait for it" in refused.error["message"]
        server.connection.replicas["replica"] = replica
        assert [answer.status for answer in await asyncio.gather(*first)] == [200] * 2

    in_server(test, max_held=2)


def test_none_waits_longer_than_may_be_and_the_model_comes_back_by_itself() -> None:
    async def test(server: Server) -> None:
        replica = server.connection.replicas.pop("replica")
        refused = await server.post(COMPLETIONS, prompt="x")
        assert (refused.status, refused.headers["retry-after"]) == (503, "10")
        assert "longer than 0.05 s" in refused.error["message"]
        assert held(server).num == 0
        assert (await server.call("GET", "/health")).status == 503
        server.connection.replicas["replica"] = replica
        await until(lambda: server.link.hello is not None)
        assert (await server.post(COMPLETIONS, prompt="x")).status == 200

    in_server(test, max_held=2, hold_s=0.05)


def test_a_model_goes_to_sleep_with_its_last_replica_and_wakes_for_a_request() -> None:
    async def test(server: Server) -> None:
        assert (await server.post(COMPLETIONS, prompt="x")).status == 200
        server.connection.leaving.add("replica")
        await until(lambda: not server.link._streams.greeted())
        replica = server.connection.replicas.pop("replica")
        await asyncio.sleep(0.05)
        assert not held(server).is_waking
        answer = asyncio.create_task(server.post(COMPLETIONS, prompt="y"))
        await until(lambda: held(server).num == 1)
        server.connection.leaving.clear()
        replica._draining_since_s = None  # another one, started anew
        server.connection.replicas["another"] = replica
        assert (await answer).status == 200
        assert held(server).num_starts == 2

    in_server(test, max_held=2, renew_s=0.01)


def test_a_client_that_leaves_while_it_waits_leaves_nothing() -> None:
    async def test(server: Server) -> None:
        server.connection.replicas.clear()
        answer = asyncio.create_task(server.post(COMPLETIONS, prompt="x"))
        await until(lambda: held(server).num == 1)
        answer.cancel()
        await until(lambda: held(server).num == 0)
        assert server.link.num_live == 0 == len(server.engine.requests)

    in_server(test, max_held=2)


def test_when_to_retry_follows_from_what_starts_have_taken() -> None:
    async def test() -> None:
        clock = Clock()
        requests = HeldRequests(0.01, 1, clock)

        async def start(seconds: float) -> int:
            with pytest.raises(ModelNotReady) as refusal:
                await requests.wait()
            clock.now_s += seconds
            requests.note_replica()
            return refusal.value.retry_after_s

        assert [await start(40.0), await start(40.0), await start(80.0)] == [10, 40, 40]
        assert await start(1.0) == 50
        assert (requests.num_starts, requests.total_start_s) == (4, 161.0)

    asyncio.run(test())
