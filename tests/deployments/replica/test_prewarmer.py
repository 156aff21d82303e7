"""What a new replica has loaded before its first request."""

import asyncio
import time
from collections.abc import Callable, Sequence

from adapter_store.errors import SourceUnavailable
from adapter_store.names import AdapterRef
from deployments.policy.backlog import QueueLimits
from deployments.replica.replica import EngineReplica, ReplicaSettings
from tests.deployments.support.fakes import BASE, FakeEngine, FakeStore, Server, in_server, until


def start(
    test_replica: Callable[[EngineReplica, FakeEngine, FakeStore], None],
    ask: Callable[[FakeStore], Sequence[AdapterRef]],
    store: FakeStore | None = None,
    prewarm_s: float = 5.0,
    is_answered: bool = True,
) -> None:
    """Start a replica that asks, and look at it as soon as it is ready."""

    async def run() -> None:
        engine, files = FakeEngine(), store or FakeStore("red", "blue")
        settings = ReplicaSettings("new", BASE, 64, QueueLimits(100), prewarm_s=prewarm_s)

        def make(on_frame: Callable[..., None]) -> FakeEngine:
            engine.on_frame = on_frame
            return engine

        async def answer() -> Sequence[AdapterRef]:
            if not is_answered:
                await asyncio.Event().wait()
            return ask(files)

        replica = EngineReplica(make, files, settings)
        try:
            await replica.start(answer)
            test_replica(replica, engine, files)
        finally:
            await replica.close()

    asyncio.run(run())


def both(store: FakeStore) -> list[AdapterRef]:
    return [store.refs["blue"], store.refs["red"]]


def test_what_will_be_asked_for_is_loaded_before_the_replica_is_ready() -> None:
    def look(replica: EngineReplica, engine: FakeEngine, store: FakeStore) -> None:
        folders = [request.adapter_folder for request in engine.requests]
        assert [f.digest for f in folders if f is not None] == ["blue-digest", "red-digest"]
        assert sorted(store.fetched) == ["blue", "red"]
        assert set(store.pins.values()) == {0}, "nothing stays pinned"
        assert replica.figures().num_requests == 0 == replica.figures().num_received
        assert replica._requests.meter.mean_answer == 64, "no part of the traffic"

    start(look, both)


def test_a_slow_store_delays_a_new_replica_by_no_more_than_the_bound() -> None:
    slow = FakeStore("red", "blue")
    slow.fetch = lambda ref: time.sleep(0.6)
    began_s = time.monotonic()

    def look(replica: EngineReplica, engine: FakeEngine, store: FakeStore) -> None:
        assert 0.1 < time.monotonic() - began_s < 0.5
        assert engine.requests == []

    start(look, both, slow, prewarm_s=0.1)


def test_an_adapter_that_cannot_be_fetched_is_left_to_its_requests() -> None:
    broken = FakeStore("red", "blue")

    def fetch(ref: AdapterRef) -> None:
        if ref.name == "blue":
            raise SourceUnavailable("no bucket")

    broken.fetch = fetch

    def look(replica: EngineReplica, engine: FakeEngine, store: FakeStore) -> None:
        assert len(engine.requests) == 1
        assert replica._requests.by_id == {}

    start(look, both, broken)


def test_without_anybody_to_ask_a_replica_is_ready_soon() -> None:
    began_s = time.monotonic()
    start(lambda *_: None, both, is_answered=False)
    assert time.monotonic() - began_s < 2

    def fails(store: FakeStore) -> list[AdapterRef]:
        raise RuntimeError("there is no ingress")

    start(lambda *_: None, fails)


def test_an_ingress_tells_a_newcomer_what_its_requests_have_asked_for() -> None:
    async def test(server: Server) -> None:
        for model in ("red", "red", "blue", "base"):
            answer = await server.post("/v1/completions", model=model, prompt="x")
            assert answer.status == 200
        await until(lambda: server.link.num_live == 0)
        told = [server.link.adapters_for(f"newcomer-{n}") for n in range(20)]
        assert {ref for refs in told for ref in refs} == set(server.store.refs.values())
        assert any(len(refs) < 2 for refs in told), "the replica that runs keeps some"

    in_server(test)
