"""Ingress and replica when things go wrong between them: nobody waits for ever, nothing leaks."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable

import pytest

from adapter_store.errors import (
    AdapterInvalid,
    AdapterNotFound,
    CacheFull,
    SourceUnavailable,
)
from adapter_store.names import AdapterRef
from deployments.fleet.batch_queue import Mailbox
from deployments.fleet.protocol import Abort, StreamId, Submit, UnknownStream
from deployments.fleet.replica_stream import Pace
from deployments.replica.replica import LEASE_S
from engine.messages import ErrorKind, GenerateRequest, RequestOutput
from engine.scheduler.request import SamplingParams
from tests.deployments.fakes import Client, FakeEngine, FakeStore, Server, serving, until

COMPLETIONS = "/v1/completions"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def in_server(test: Callable[[Server], Awaitable[None]], **how: object) -> None:
    async def run() -> None:
        async with serving(**how) as server:  # type: ignore[arg-type]
            await test(server)

    asyncio.run(run())


def submit(request_id: str, n: int = 1) -> Submit:
    request = GenerateRequest(request_id, [1, 2], SamplingParams(max_tokens=8), n)
    return Submit(request, None)


async def last_outputs(mailbox: Mailbox, n: int = 1) -> list[RequestOutput]:
    """The outputs that end the choices; fails rather than wait for ever."""
    ended: list[RequestOutput] = []
    while len(ended) < n:
        items = await asyncio.wait_for(mailbox.next(), 5)
        ended += [i for i in items if isinstance(i, RequestOutput) and i.finish_reason]
    return ended


def start(server: Server, model: str = "base", stream: bool = True) -> Client:
    body = json.dumps({"model": model, "prompt": "abc", "stream": stream}).encode()
    return Client(server.api, "POST", COMPLETIONS, body)


# ---- the replica or its engine goes away ---------------------------------------------------


def test_where_no_replica_is_left_every_choice_ends_with_an_error() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        mailboxes = [server.link.open([submit(name, n=2)]) for name in ("a", "b")]
        await until(lambda: len(server.engine.requests) == 2)
        server.connection.kill("replica")
        for mailbox in mailboxes:
            outputs = await last_outputs(mailbox, 2)
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
        mailbox = server.link.open([submit("a")])
        await until(lambda: server.link.stats.num_running == 1)
        server.connection.hang = True
        outputs = await last_outputs(mailbox)
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


def test_an_engine_that_does_not_come_back_is_an_answer() -> None:
    async def test(server: Server) -> None:
        server.engine.die()
        answer = await server.post(COMPLETIONS, prompt="x")
        assert answer.status == 503 and answer.error["code"] == "unavailable"
        assert "started again" in answer.error["message"]

    in_server(test, patience_s=0.05)


def test_a_replica_is_unhealthy_once_its_engine_is_given_up() -> None:
    async def test(server: Server) -> None:
        server.replica.check_health()
        server.engine.failure = "no memory"
        with pytest.raises(RuntimeError, match="no memory"):
            server.replica.check_health()

    in_server(test)


# ---- messages that get lost ----------------------------------------------------------------


def test_a_request_that_its_replica_has_forgotten_is_submitted_again() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        server.engine.running.clear()
        server.link.open([submit("a")])
        await until(lambda: len(server.engine.requests) == 1)
        server.replica._drop("a", server.replica._routes["a"])
        await server.link.refresh_stats()
        assert len(server.engine.requests) == 1, "its last news may only be on its way"
        clock.now_s += Pace().lost_s + 0.1
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
        mailbox = server.link.open([submit("a")])
        await until(lambda: len(server.engine.requests) == 1)
        server.link.release(mailbox)
        await until(lambda: bool(lost))
        assert server.engine.aborted == []
        await server.link.refresh_stats()
        await until(lambda: server.engine.aborted == ["a"])

    in_server(test)


def test_what_is_released_before_its_receipt_comes_is_aborted() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        mailboxes: list[Mailbox] = []
        server.connection.on_accepted = lambda r, s: server.link.release(mailboxes[0])
        mailboxes.append(server.link.open([submit("a")]))
        await until(lambda: server.engine.aborted == ["a"])
        assert server.link.num_live == 0

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


def test_what_was_submitted_for_a_stream_that_never_came_is_reaped() -> None:
    clock = Clock()

    async def test(server: Server) -> None:
        server.engine.running.clear()
        assert server.replica.submit("another ingress", {}, submit("a")).refusal is None
        server.replica.take_care(clock.now_s + LEASE_S + 0.1)
        assert server.engine.aborted == ["a"]

    in_server(test, clock=clock)


def test_what_was_submitted_for_a_stream_waits_for_it() -> None:
    async def test(server: Server) -> None:
        server.replica.submit("another ingress", {}, submit("a"))
        await until(lambda: server.replica._routes == {})
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


def test_what_comes_after_an_abort_is_dropped() -> None:
    async def test(server: Server) -> None:
        server.engine.running.clear()
        mailbox = server.link.open([submit("a")])
        await until(lambda: len(server.engine.requests) == 1)
        server.link.release(mailbox)
        await until(lambda: server.engine.aborted == ["a"])
        server.engine.on_frame([RequestOutput("a", 0, [1], finish_reason="abort")])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(mailbox.next(), 0.05)

    in_server(test)


# ---- adapters on their way -----------------------------------------------------------------


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
        await until(lambda: server.replica._routes == {})
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
