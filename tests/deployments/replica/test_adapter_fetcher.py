"""Adapters on their way to a replica: fetched once, pinned while in use."""

import json
import threading

import pytest

from adapter_store.errors import (
    AdapterInvalid,
    AdapterNotFound,
    CacheFull,
    SourceUnavailable,
)
from adapter_store.names import AdapterRef
from tests.deployments.support.fakes import Client, FakeEngine, FakeStore, Server, in_server, until

COMPLETIONS = "/v1/completions"


def start(server: Server, model: str = "base", stream: bool = True) -> Client:
    body = json.dumps({"model": model, "prompt": "abc", "stream": stream}).encode()
    return Client(server.api, "POST", COMPLETIONS, body)


class SlowStore(FakeStore):
    """`red` arrives when the test says so."""

    def __init__(self) -> None:
        super().__init__("red", "blue")
        self.may_arrive = threading.Event()
        self.num_asked = 0
        self.fetch = self._wait

    def _wait(self, ref: AdapterRef) -> None:
        if ref.name == "red":
            self.num_asked += 1
            assert self.may_arrive.wait(10)


def test_a_slow_download_delays_nobody_else_and_happens_once() -> None:
    store = SlowStore()

    async def test(server: Server) -> None:
        slow = [start(server, "red"), start(server, "red")]
        await until(lambda: store.num_asked == 1)
        for model in ("base", "blue"):
            answer = await server.post(COMPLETIONS, model=model, prompt="x")
            assert answer.status == 200
        assert not any(client.done.done() for client in slow)
        store.may_arrive.set()
        for client in slow:
            await client.done
            assert client.answered.text() == "red:ABC"
        assert store.num_asked == 1
        await until(lambda: set(store.pins.values()) == {0})

    in_server(test, store=store)


def test_a_client_that_leaves_during_the_download_leaves_no_pin() -> None:
    store = SlowStore()

    async def test(server: Server) -> None:
        client = start(server, "red")
        await until(lambda: store.num_asked == 1)
        client.hang_up()
        await client.done
        await until(lambda: server.replica._requests.by_id == {})
        store.may_arrive.set()
        await until(lambda: store.pins == {"red-digest": 0})
        assert server.engine.requests == []

    in_server(test, store=store)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AdapterInvalid("rank 0"), 400),
        (AdapterNotFound("gone"), 404),
        (SourceUnavailable("down"), 503),
        (CacheFull("full"), 503),
        (ZeroDivisionError(), 500),
    ],
)
def test_an_adapter_that_cannot_be_fetched_is_an_answer(error: Exception, status: int) -> None:
    store = FakeStore("red")

    def fail(ref: AdapterRef) -> None:
        raise error

    store.fetch = fail

    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, model="red", prompt="x", n=2)
        assert answer.status == status
        assert store.pins == {"red-digest": 0}
        store.fetch = lambda ref: None
        assert (await server.post(COMPLETIONS, model="red", prompt="x")).status == 200

    in_server(test, store=store)


def test_an_adapter_stays_pinned_until_the_last_choice_has_ended() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        client = start(server, "red")
        await until(lambda: len(server.engine.requests) == 1)
        assert server.store.pins == {"red-digest": 1}
        server.engine.running.set()
        await client.done
        await until(lambda: server.store.pins == {"red-digest": 0})

    in_server(test, engine=FakeEngine())
