"""The connection beside Ray: what goes through it, who gets in, and what happens when it breaks."""

import tests.deployments.support.quiet_ray  # noqa: F401

# isort: split
import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from deployments.fleet import direct_client, direct_server
from deployments.fleet.batch_queue import BatchQueue
from deployments.fleet.direct_client import IngressEndpoint, connect
from deployments.fleet.direct_server import DirectServer, OpenOffer, ReplicaEndpoint
from deployments.fleet.direct_socket import Offer
from deployments.fleet.engine_link import EngineLink
from deployments.fleet.protocol import Submit
from deployments.fleet.ray_connection import RayConnection
from deployments.fleet.socket_messages import TICKET_BYTES, VERSION, Submission, greeting
from deployments.fleet.timing import Timing
from deployments.policy.backlog import QueueLimits
from deployments.replica.replica import EngineReplica, ReplicaSettings
from engine.framing import FrameDecoder, encode
from engine.messages import GenerateRequest, Ping, RequestOutput
from engine.scheduler.request import SamplingParams
from tests.deployments.support.fakes import BASE, EOS, FakeEngine, FakeStore, until
from tests.deployments.support.fakes import encode as tokens

HOST = "127.0.0.1"


class Streamed:
    """A stream as Ray has it: the replica's side runs whether or not anybody reads."""

    def __init__(self, work: AsyncIterator[Any], items: list[object]) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._pump(work, items))

    async def _pump(self, work: AsyncIterator[Any], items: list[object]) -> None:
        async for item in work:
            items.append(item)
            self._queue.put_nowait(item)
        self._queue.put_nowait(None)

    def __aiter__(self) -> "Streamed":
        return self

    async def __anext__(self) -> object:
        item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        self._task.cancel()


@dataclass
class Handle:
    """A deployment's, with one replica. `calls` and `items` are what Ray had to carry."""

    replica: EngineReplica
    server: DirectServer
    calls: list[str] = field(default_factory=list)
    items: list[object] = field(default_factory=list)
    name: str = ""

    def options(self, **options: object) -> "Handle":
        return self

    def __getattr__(self, name: str) -> "Handle":
        if name.startswith("_"):
            raise AttributeError(name)
        return Handle(self.replica, self.server, self.calls, self.items, name)

    @asynccontextmanager
    async def choose_replica(self, hints: object, _reserve: bool) -> AsyncIterator[Any]:
        yield type("Selection", (), {"replica_id": "replica"})

    def remote(self, hints: object, *arguments: Any) -> Any:
        self.calls.append(self.name)
        if self.name == "attach":
            ingress_id, _ = arguments
            stream = self.replica.attach(*arguments)
            return Streamed(self.server.relay(stream, ingress_id), self.items)  # type: ignore[arg-type]
        return asyncio.ensure_future(self._answer(*arguments))

    async def _answer(self, *arguments: Any) -> object:
        await asyncio.sleep(0)
        if self.name == "submit":
            return self.replica.submit(*arguments)
        return await self.replica.control(*arguments)


@dataclass
class Setup:
    engine: FakeEngine
    replica: EngineReplica
    server: DirectServer
    handle: Handle
    connection: RayConnection
    link: EngineLink

    def open(self, request_id: str, prompt: str) -> BatchQueue[Any]:
        params = SamplingParams(max_tokens=100)
        return self.link.open([Submit(GenerateRequest(request_id, tokens(prompt), params), None)])

    @property
    def sockets(self) -> list[IngressEndpoint]:
        return list(self.connection._sockets.values())


def in_setup(test: Callable[[Setup], Awaitable[None]], host: str = HOST) -> None:
    async def run() -> None:
        engine = FakeEngine()

        def make_engine(on_frame: Callable[[list[RequestOutput]], None]) -> FakeEngine:
            engine.on_frame = on_frame
            return engine

        settings = ReplicaSettings("replica", BASE, 64, QueueLimits(100))
        replica = EngineReplica(make_engine, FakeStore(), settings)
        await replica.start()
        server = DirectServer(replica)
        await server.listen(host)
        handle = Handle(replica, server)
        connection = RayConnection(handle)  # type: ignore[arg-type]
        timing = Timing(retry_s=0.001, max_retry_s=0.01, patience_s=2.0)
        link = EngineLink(connection, "ingress", timing)
        link.start()
        try:
            await until(lambda: link.hello is not None)
            await test(Setup(engine, replica, server, handle, connection, link))
        finally:
            await link.close()
            server.close()
            await replica.close()

    asyncio.run(run())


async def answer(queue: BatchQueue[Any]) -> str:
    """All of it, each token as often as it came."""
    token_ids: list[int] = []
    while True:
        for item in await asyncio.wait_for(queue.next_batch(), 5):
            token_ids += item[2] if isinstance(item, tuple) else item.token_ids
            if not isinstance(item, tuple) and item.finish_reason is not None:
                assert item.error is None, item.error
                return bytes(i for i in token_ids if i != EOS).decode()


def test_submits_receipts_and_frames_do_not_go_through_ray() -> None:
    async def test(setup: Setup) -> None:
        queues = [setup.open(str(n), f"request {n}") for n in range(5)]
        assert [await answer(m) for m in queues] == [f"REQUEST {n}" for n in range(5)]
        assert len(setup.sockets) == 1
        assert "submit" not in setup.handle.calls
        assert len(setup.handle.items) == 1, "the greeting"

    in_setup(test)


def test_without_a_direct_connection_everything_goes_through_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct_server, "OFFER_S", 0.05)

    async def refuse(offer: Offer) -> None:
        return await connect(Offer(HOST, 1, offer.ticket))  # type: ignore[return-value]

    monkeypatch.setattr("deployments.fleet.ray_connection.connect", refuse)

    async def test(setup: Setup) -> None:
        assert await answer(setup.open("a", "abc")) == "ABC"
        assert setup.sockets == [] and "submit" in setup.handle.calls

    in_setup(test)


def test_a_replica_that_cannot_listen_makes_no_offer() -> None:
    async def test(setup: Setup) -> None:
        assert await answer(setup.open("a", "abc")) == "ABC"
        assert setup.handle.items[0][1] is None  # type: ignore[index]

    in_setup(test, host="192.0.2.1")  # nobody's address


def test_when_a_wire_breaks_the_answer_goes_on() -> None:
    async def test(setup: Setup) -> None:
        setup.engine.running.clear()
        queue = setup.open("a", "a long answer")
        await until(lambda: len(setup.engine.requests) == 1)
        for _ in range(3):
            setup.engine.step()
        first = [i for item in await queue.next_batch() for i in item.token_ids]
        setup.sockets[0]._transport.abort()  # type: ignore[union-attr]
        await until(lambda: len(setup.engine.requests) == 2)
        setup.engine.running.set()
        assert bytes(first).decode() + await answer(queue) == "A LONG ANSWER"
        assert setup.engine.requests[1].output_token_ids[: len(first)] == first

    in_setup(test)


def test_a_submit_that_waits_when_the_wire_breaks_is_not_left_waiting() -> None:
    async def test(setup: Setup) -> None:
        line = setup.sockets[0]
        line.send = lambda message: None  # type: ignore[method-assign]
        params = SamplingParams(max_tokens=1)
        waiting = asyncio.ensure_future(
            line.submit(0, Submit(GenerateRequest("a", [1], params), None))
        )
        await asyncio.sleep(0)
        line._transport.abort()  # type: ignore[union-attr]
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(ConnectionError):
            await line.submit(0, Submit(GenerateRequest("b", [1], params), None))

    in_setup(test)


def test_a_submit_that_fails_costs_the_others_nothing() -> None:
    async def test(setup: Setup) -> None:
        def fail(request: GenerateRequest) -> None:
            setup.engine.submit = submit  # type: ignore[method-assign]
            raise AssertionError("a bug")

        setup.engine.running.clear()
        before = setup.open("before", "abc")
        await until(lambda: len(setup.engine.requests) == 1)
        submit, setup.engine.submit = setup.engine.submit, fail  # type: ignore[method-assign]
        after = setup.open("after", "xyz")
        await until(lambda: setup.engine.submit != fail)
        setup.engine.running.set()
        assert await answer(before) == "ABC" and await answer(after) == "XYZ"
        assert len(setup.sockets) == 1

    in_setup(test)


def test_a_drained_replica_ends_the_stream_and_nothing_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(setup: Setup) -> None:
        setup.engine.running.clear()
        queue = setup.open("a", "abc")
        await until(lambda: len(setup.engine.requests) == 1)
        line = setup.sockets[0]
        setup.replica.drain()
        setup.engine.running.set()
        assert await answer(queue) == "ABC"
        await until(lambda: line.is_over)
        await until(lambda: line not in setup.sockets)
        assert "ConnectionError" not in caplog.text

    in_setup(test)


# ---- strangers -----------------------------------------------------------------------------


async def knock(setup: Setup, data: bytes) -> bytes:
    """All that the replica has to say to this."""
    reader, writer = await asyncio.open_connection(*setup.server._address)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def submission(request_id: str) -> bytes:
    params = SamplingParams(max_tokens=100)
    return encode(Submission(0, 0, Submit(GenerateRequest(request_id, [1], params), None)))


def test_nothing_is_decoded_from_whoever_has_no_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    decode = FrameDecoder.feed

    def feed(decoder: FrameDecoder[Any], data: bytes) -> list[Any]:
        messages = decode(decoder, data)
        decoded.extend(m for m in messages if isinstance(m, Submission))
        return messages

    async def test(setup: Setup) -> None:
        monkeypatch.setattr(FrameDecoder, "feed", feed)
        assert await answer(setup.open("known", "abc")) == "ABC"
        assert len(decoded) == 1, "what does come with a ticket is"
        stranger = submission("stranger")
        assert await knock(setup, greeting(bytes(TICKET_BYTES)) + stranger) == b""
        used = setup.handle.items[0][1].ticket  # type: ignore[index]
        assert await knock(setup, greeting(used) + stranger) == b"", (
            "a ticket is good for one connection"
        )
        assert len(decoded) == 1 and len(setup.engine.requests) == 1

    in_setup(test)


def test_a_connection_without_a_ticket_is_closed_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(setup: Setup) -> None:
        monkeypatch.setattr(direct_server, "OFFER_S", 0.05)
        assert await knock(setup, b"only a few bytes") == b""

    in_setup(test)


def test_an_unused_offer_expires() -> None:
    async def test(setup: Setup) -> None:
        taken: asyncio.Future[ReplicaEndpoint] = asyncio.get_running_loop().create_future()
        with setup.server._offer(OpenOffer("ingress", "replica", taken)) as offer:
            assert offer is not None
        assert await connect(offer) is None

    in_setup(test)


# ---- another version, garbage ----------------------------------------------------------------


def test_an_offer_of_another_version_is_refused_and_all_goes_through_ray(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(direct_server, "OFFER_S", 0.05)

    async def later(offer: Offer) -> IngressEndpoint | None:
        return await connect(replace(offer, version=VERSION + 1))

    monkeypatch.setattr("deployments.fleet.ray_connection.connect", later)

    async def test(setup: Setup) -> None:
        assert await answer(setup.open("a", "abc")) == "ABC"
        assert setup.sockets == [] and "submit" in setup.handle.calls
        assert f"speaks version {VERSION + 1} of the direct socket's" in caplog.text
        assert f"protocol, not {VERSION}, everything goes by Ray" in caplog.text

    in_setup(test)


def test_an_ingress_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(direct_server, "OFFER_S", 0.05)
    monkeypatch.setattr(direct_client, "greeting", lambda ticket: ticket + bytes([VERSION + 1, 0]))

    async def test(setup: Setup) -> None:
        assert await answer(setup.open("a", "abc")) == "ABC"
        assert setup.sockets == [] and "submit" in setup.handle.calls
        assert f"an ingress speaks version {VERSION + 1} of the direct socket's" in caplog.text

    in_setup(test)


GARBAGE = {
    "no message": b"\x05\0\0\0nasty",
    "another type": encode(Ping()),
    "too long": b"\xff\xff\xff\xff",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize("to_replica", [True, False], ids=["to the replica", "to the ingress"])
def test_garbage_closes_the_connection_and_the_answer_goes_on(
    garbage: bytes, to_replica: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(setup: Setup) -> None:
        setup.engine.running.clear()
        queue = setup.open("a", "a long answer")
        await until(lambda: len(setup.engine.requests) == 1)
        line = setup.sockets[0]
        if to_replica:
            line._transport.write(garbage)  # type: ignore[union-attr]
        else:
            line.data_received(garbage)
        await until(lambda: len(setup.engine.requests) == 2)
        assert line.is_over and line not in setup.sockets
        setup.engine.running.set()
        assert await answer(queue) == "A LONG ANSWER"
        assert "a direct socket is closed: a message of" in caplog.text

    in_setup(test)


def test_a_truncated_frame_is_waited_for_and_never_taken_for_a_whole_one() -> None:
    async def test(setup: Setup) -> None:
        line = setup.sockets[0]
        line._transport.write(submission("cut")[:-1])  # type: ignore[union-attr]
        await asyncio.sleep(0.02)
        assert setup.engine.requests == [] and not line.is_over
        line._transport.close()  # type: ignore[union-attr]
        await until(lambda: setup.sockets not in ([], [line]))
        assert setup.engine.requests == []

    in_setup(test)


# ---- slow readers --------------------------------------------------------------------------


def test_frames_wait_while_the_ingress_is_slow() -> None:
    async def run() -> None:
        end = ReplicaEndpoint(DirectServer(None))  # type: ignore[arg-type]
        end.pause_writing()
        sending = asyncio.ensure_future(end.send_frame([]))
        await asyncio.sleep(0.01)
        assert not sending.done()
        end.resume_writing()
        assert await asyncio.wait_for(sending, 1)
        end.pause_writing()
        sending = asyncio.ensure_future(end.send_frame([]))
        await asyncio.sleep(0)
        end.connection_lost(None)
        assert not await asyncio.wait_for(sending, 1), "nobody is there any more"

    asyncio.run(run())
