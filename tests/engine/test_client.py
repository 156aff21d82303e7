"""Tests the engine in its own process: frames, aborts, crashes, hangs, restarts."""

import asyncio
import gc
import os
import signal
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from engine import process
from engine.backends.runner import DeviceLost
from engine.client import EngineClient, EngineUnavailable
from engine.config import EngineConfig
from engine.framing import FrameDecoder, encode
from engine.messages import (
    AbortRequest,
    AdapterFolder,
    ErrorKind,
    FlowTokens,
    GenerateRequest,
    Item,
    Ping,
    RequestOutput,
    StartEngine,
    StepOutputs,
)
from engine.process_handle import EngineStartError
from engine.scheduler.classes import PriorityClass
from tests.engine.support.driver import greedy, make_engine, prompt_of, run
from tests.engine.support.tiny import Tiny, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("base"), "qwen2")


def config_of(folder: Path) -> EngineConfig:
    return EngineConfig(
        str(folder), memory_bytes=2**24, max_num_batched_tokens=64, device="cpu", num_threads=1
    )


class Inbox:
    """Collects what the client reports, and waits for conditions on it."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self.served: defaultdict[tuple[str, PriorityClass], float] = defaultdict(float)
        self._changed = asyncio.Event()

    def on_frame(self, items: list[Item]) -> None:
        self.outputs += [RequestOutput(*i) if isinstance(i, tuple) else i for i in items]
        self._changed.set()

    def on_served(self, served: Sequence[FlowTokens]) -> None:
        for tenant, priority_class, tokens in served:
            self.served[tenant, priority_class] += tokens
        self._changed.set()

    def tokens(self, request_id: str) -> list[int]:
        return [t for o in self.outputs if o.request_id == request_id for t in o.token_ids]

    def last(self, request_id: str) -> RequestOutput:
        return next(o for o in reversed(self.outputs) if o.request_id == request_id)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def ended(self, *request_ids: str) -> None:
        wanted = set(request_ids)
        await self.until(lambda: wanted <= {o.request_id for o in self.outputs if o.finish_reason})


def with_client(
    folder: Path, test: Callable[[EngineClient, Inbox], Awaitable[None]], hang_timeout_s: float = 60
) -> None:
    async def scenario() -> None:
        inbox = Inbox()
        client = EngineClient(
            config_of(folder),
            inbox.on_frame,
            on_served=inbox.on_served,
            hang_timeout_s=hang_timeout_s,
        )
        await client.start()
        try:
            await test(client, inbox)
        finally:
            pid = client.pid
            await client.close()
            assert pid is None or not Path(f"/proc/{pid}").exists()

    asyncio.run(scenario())


async def is_restarted(client: EngineClient) -> None:
    async with asyncio.timeout(60):
        while not (client.num_restarts and client.is_ready):
            await asyncio.sleep(0.02)


BATCH = PriorityClass.BATCH


def test_tokens_and_charges_are_those_of_the_engine_in_this_process(tiny: Tiny) -> None:
    requests = [GenerateRequest(f"r{n}", prompt_of(n), greedy(12)) for n in (3, 20, 40)]
    expected = run(make_engine(tiny.folder), requests)

    async def test(client: EngineClient, inbox: Inbox) -> None:
        for request in requests:
            client.submit(request)
        await inbox.ended("r3", "r20", "r40")
        for request in requests:
            tokens = inbox.tokens(request.request_id)
            assert tokens == expected[request.request_id, 0].token_ids
        await inbox_stats(client)
        assert client.stats.total_output_tokens == 36 and client.stats.num_running == 0
        client.count_elsewhere([("x", BATCH, 1000.0)])  # no charge of this engine's
        request = GenerateRequest("c", prompt_of(20), greedy(4), tenant="x")
        client.submit(replace(request, priority_class=BATCH))
        await inbox.ended("c")
        charged = {("", PriorityClass.STANDARD): 3 + 20 + 40 + 2 * 36, ("x", BATCH): 20 + 2 * 4}
        await inbox.until(lambda: inbox.served == charged)

    async def inbox_stats(client: EngineClient) -> None:
        async with asyncio.timeout(60):
            while client.stats.total_output_tokens < 36 or client.stats.num_running:
                await asyncio.sleep(0.02)

    with_client(tiny.folder, test)


def test_bad_requests_and_bad_adapters_end_with_their_own_error(tiny: Tiny) -> None:
    async def test(client: EngineClient, inbox: Inbox) -> None:
        nowhere = AdapterFolder("d" * 64, "/nonexistent")
        client.submit(GenerateRequest("empty", [], greedy(3)))
        client.submit(GenerateRequest("adapter", [5], greedy(3), adapter_folder=nowhere))
        client.submit(GenerateRequest("fine", [5], greedy(3)))
        await inbox.ended("empty", "adapter", "fine")
        kinds = [inbox.last(name).error for name in ("empty", "adapter", "fine")]
        assert [e and e.kind for e in kinds] == [
            ErrorKind.INVALID_REQUEST,
            ErrorKind.ADAPTER_DAMAGED,
            None,
        ]

    with_client(tiny.folder, test)


def test_abort_ends_a_request_and_an_unknown_id_is_no_error(tiny: Tiny) -> None:
    async def test(client: EngineClient, inbox: Inbox) -> None:
        client.submit(GenerateRequest("long", prompt_of(5), greedy(200)))
        await inbox.until(lambda: len(inbox.tokens("long")) > 2)
        client.abort("long")
        client.abort("unknown")
        await inbox.ended("long")
        assert inbox.last("long").finish_reason == "abort"
        assert len(inbox.tokens("long")) < 200

    with_client(tiny.folder, test)


def test_a_killed_process_ends_its_requests_and_is_started_again(tiny: Tiny) -> None:
    async def test(client: EngineClient, inbox: Inbox) -> None:
        client.submit(GenerateRequest("lost", prompt_of(5), greedy(200), n=2))
        await inbox.until(lambda: bool(inbox.tokens("lost")))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await inbox.until(lambda: sum(o.error is not None for o in inbox.outputs) == 2)
        error = inbox.last("lost").error
        assert error is not None and error.kind == ErrorKind.ENGINE_DIED and "-9" in error.message
        with pytest.raises(EngineUnavailable):
            client.submit(GenerateRequest("early", [5], greedy(1)))
        await is_restarted(client)
        client.submit(GenerateRequest("again", [5], greedy(3)))
        await inbox.ended("again")
        assert inbox.last("again").error is None

    with_client(tiny.folder, test)


def test_a_hanging_process_is_killed_and_started_again(tiny: Tiny) -> None:
    async def test(client: EngineClient, inbox: Inbox) -> None:
        client.submit(GenerateRequest("stuck", prompt_of(5), greedy(200)))
        await inbox.until(lambda: bool(inbox.tokens("stuck")))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await inbox.until(lambda: inbox.last("stuck").error is not None)
        error = inbox.last("stuck").error
        assert error is not None and "silent" in error.message
        await is_restarted(client)

    with_client(tiny.folder, test, hang_timeout_s=1.0)


def test_a_fatal_error_of_the_engine_ends_its_process_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []

    def lose(_: object) -> None:
        raise DeviceLost("cuda:0 is lost to this process")

    monkeypatch.setattr(process, "serve", lose)
    monkeypatch.setattr(process.os, "_exit", codes.append)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process.serve_or_exit(process.Connection(theirs))
    assert codes == [1]
    assert "the engine's process ends: DeviceLost: cuda:0 is lost" in caplog.text


def test_the_heap_is_frozen_once_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen: list[int] = []

    class Nothing:
        info = None

        def __init__(self, *args: object, **options: object) -> None: ...

        def run(self) -> None:
            frozen.append(gc.get_freeze_count())

        def close(self) -> None: ...

    monkeypatch.setattr("engine.engine.Engine", Nothing)
    monkeypatch.setattr(process, "Loop", Nothing)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode(StartEngine(EngineConfig("model"))))
        process.serve(process.Connection(theirs))
    gc.unfreeze()
    assert frozen[0] > 10_000, "all that was imported, to begin with"


def test_a_process_that_is_sent_garbage_says_so_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = process.Connection(theirs)
        ours.sendall(encode(AbortRequest("a")) + b"\x03\0\0\0abc")
        assert connection.receive(None) == [] and connection.closed
    assert "the engine's process ends: a message of 3 bytes cannot be decoded" in caplog.text


def test_a_process_that_sends_garbage_is_killed_and_started_again(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(client: EngineClient, inbox: Inbox) -> None:
        client.submit(GenerateRequest("lost", prompt_of(5), greedy(200)))
        await inbox.until(lambda: bool(inbox.tokens("lost")))
        assert client._process is not None
        client._process.data_received(b"\xff\xff\xff\xff")
        await inbox.until(lambda: inbox.last("lost").error is not None)
        error = inbox.last("lost").error
        assert error is not None and error.kind == ErrorKind.ENGINE_DIED
        assert "not understood: a message of 4294967295 bytes is longer than" in error.message
        await is_restarted(client)

    with_client(tiny.folder, test)


def test_a_model_that_cannot_be_loaded_gives_its_reason_at_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        client = EngineClient(config_of(tmp_path), lambda outputs: None)
        with pytest.raises(EngineStartError, match=r"config\.json"):
            await client.start()
        await client.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("portion", [1, 3, 1000])
def test_frames_may_arrive_in_any_pieces(portion: int) -> None:
    messages = [AbortRequest("a"), StepOutputs([("b", 0, [2] * 50)]), Ping()]
    stream = b"".join(encode(m) for m in messages)
    decoder = FrameDecoder(msgspec.msgpack.Decoder(AbortRequest | StepOutputs | Ping))
    found = [
        m for i in range(0, len(stream), portion) for m in decoder.feed(stream[i : i + portion])
    ]
    assert found == messages
