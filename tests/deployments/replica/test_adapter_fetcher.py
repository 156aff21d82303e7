"""Adapters on their way to a replica: fetched once, pinned while in use."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from adapter_store.errors import (
    AdapterInvalid,
    AdapterNotFound,
    CacheFull,
    ObjectNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.names import AdapterRef
from adapter_store.object_store import Reading
from adapter_store.store import AdapterStore
from deployments.replica import adapter_fetcher
from deployments.replica.adapter_fetcher import MAX_DOWNLOADS, AdapterFetcher
from deployments.replica.download_queue import DownloadQueue
from engine.messages import ErrorKind, RequestError, RequestOutput
from tests.adapter_store.synthetic import BASE, synthetic
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
        (SourceUnavailable("bucket b at http://minio:9000 is down: /secret"), 503),
        (CacheFull("full: /secret"), 503),
        (OSError(28, "No space left on device", "/secret"), 503),
        (StoreCorrupt("blobs/secret is damaged"), 500),
        (ObjectNotFound("no object blobs/secret"), 500),
        (ZeroDivisionError("/secret"), 500),
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
        told = str(answer.error)
        assert not any(word in told for word in ("secret", "minio", "bucket", "blobs", "Error("))
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


# ---- damaged files -------------------------------------------------------------------------


class UnreadableAdapters(FakeEngine):
    """Ends the first requests of an adapter, after two tokens, as an engine that reads damage."""

    def __init__(self, num_failures: int) -> None:
        super().__init__()
        self.num_failures = num_failures

    def _advance(self, live: Any) -> list[RequestOutput]:
        if live.request.adapter_folder is None or live.num_sent < 2 or not self.num_failures:
            return super()._advance(live)
        self.num_failures -= 1
        del self._live[live.request.request_id]
        error = RequestError(ErrorKind.ADAPTER_DAMAGED, "The files of adapter d cannot be read.")
        request_id = live.request.request_id
        return [
            RequestOutput(request_id, index, [], finish_reason="error", error=error)
            for index in live.answers
        ]


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_whose_adapter_could_not_be_read_goes_on_after_a_repair(n: int) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, model="red", prompt="abc", n=n)
        assert answer.status == 200
        assert [choice["text"] for choice in answer.json["choices"]] == ["red:ABC"] * n
        assert set(server.store.distrusted) == {"red-digest"}
        await until(lambda: server.store.pins == {"red-digest": 0})

    in_server(test, engine=UnreadableAdapters(1))


def test_an_adapter_that_stays_unreadable_is_503_without_internals() -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, model="red", prompt="abc")
        assert answer.status == 503 and "/" not in answer.error["message"]
        await until(lambda: server.store.pins == {"red-digest": 0})

    in_server(test, engine=UnreadableAdapters(10**6))


# ---- a store that hangs --------------------------------------------------------------------


def put_adapter(store: AdapterStore, seed: int, tenant: str = "public") -> AdapterRef:
    manifest, files = synthetic(seed)
    for file, content in files.items():
        store._objects.put(f"blobs/{manifest.digest}/{file}", content)
    return AdapterRef(tenant, f"a{seed}", 1, manifest.digest, BASE)


class HangingStore(AdapterStore):
    """Downloads wait until the test lets them come."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"file://{folder}/store", folder / "cache", 10**9)
        self.may_come = threading.Event()
        self.hangs = False
        get_file = self._objects.get_file

        def hang(key: str, path: Path, how: Reading) -> None:
            if self.hangs:
                assert self.may_come.wait(30)
            get_file(key, path, how)

        self._objects.get_file = hang  # type: ignore[method-assign]


def test_adapters_on_the_disk_do_not_wait_for_downloads_that_hang(tmp_path: Path) -> None:
    store = HangingStore(tmp_path)

    async def test() -> None:
        known, unread, *absent = [put_adapter(store, n) for n in range(MAX_DOWNLOADS + 10)]
        for ref in (known, unread):
            store.ensure_local(ref)
        store.distrust(unread)  # as after a restart: its files have to be hashed
        store.hangs = True
        fetcher = AdapterFetcher(store)
        hanging = [fetcher.acquire(ref, "big") for ref in absent]
        async with asyncio.timeout(5):
            for ref in (known, unread):
                assert (await asyncio.shield(fetcher.acquire(ref, "big"))).is_dir()
        assert not any(folder.done() for folder in hanging)
        store.may_come.set()
        assert all(folder.is_dir() for folder in await asyncio.gather(*hanging))
        fetcher.close()

    asyncio.run(test())


def test_downloads_of_one_tenant_that_hang_leave_threads_to_the_others() -> None:
    may_come = threading.Event()

    def hang() -> Path:
        assert may_come.wait(30)
        return Path("late")

    async def test() -> None:
        queue = DownloadQueue(8)
        hanging = [queue.run("big", hang) for _ in range(100)]
        async with asyncio.timeout(5):
            for tenant in ("small", "other"):
                arrived = [queue.run(tenant, lambda: Path("here")) for _ in range(5)]
                assert await asyncio.gather(*arrived) == [Path("here")] * 5
            also = [queue.run("middle", hang) for _ in range(100)]
            assert await queue.run("small", lambda: Path("here")) == Path("here")
        may_come.set()
        assert await asyncio.gather(*hanging, *also) == [Path("late")] * 200
        queue.close()

    asyncio.run(test())


def test_a_download_that_fails_frees_its_thread() -> None:
    def fail() -> Path:
        raise SourceUnavailable("down")

    async def test() -> None:
        queue = DownloadQueue(2)
        failed = await asyncio.gather(
            *(queue.run("t", fail) for _ in range(5)), return_exceptions=True
        )
        assert [type(error) for error in failed] == [SourceUnavailable] * 5
        assert await queue.run("t", lambda: Path("here")) == Path("here")
        queue.close()

    asyncio.run(test())


def test_a_download_that_is_late_is_given_up_by_those_who_wait_but_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_fetcher, "DOWNLOAD_TIMEOUT_S", 0.05)
    store = HangingStore(tmp_path)
    store.hangs = True

    async def test() -> None:
        ref = put_adapter(store, 0)
        fetcher = AdapterFetcher(store)
        for _ in range(3):
            with pytest.raises(SourceUnavailable, match="has not come"):
                await asyncio.shield(fetcher.acquire(ref, "t"))
            fetcher.release(ref)
        assert len(fetcher._downloads) == 1
        monkeypatch.setattr(adapter_fetcher, "DOWNLOAD_TIMEOUT_S", 10)
        store.may_come.set()
        assert (await asyncio.shield(fetcher.acquire(ref, "t"))).is_dir()
        fetcher.release(ref)
        await until(lambda: not list((tmp_path / "cache" / ".locks").iterdir()))
        fetcher.close()

    asyncio.run(test())


def test_a_download_for_which_nobody_waits_any_more_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_fetcher, "LINGER_S", 0.05)
    store = HangingStore(tmp_path)
    store.hangs = True

    async def test() -> None:
        left, wanted = put_adapter(store, 0), put_adapter(store, 1)
        fetcher = AdapterFetcher(store)
        for ref in (left, wanted, wanted):
            fetcher.acquire(ref, "t")
        await until(lambda: len(fetcher._downloads) == 2)
        fetcher.release(left)
        fetcher.release(wanted)
        await until(lambda: list(fetcher._downloads) == [wanted.digest])
        again = fetcher.acquire(left, "t")  # it begins anew, behind the one that ends
        store.may_come.set()
        assert (await asyncio.shield(again)).is_dir()
        fetcher.release(left)
        fetcher.release(wanted)
        await until(lambda: not list((tmp_path / "cache" / ".locks").iterdir()))
        assert store.is_local(wanted) and not list((tmp_path / "cache" / ".partial").iterdir())
        gone = put_adapter(store, 2)
        store.hangs = True
        store.may_come.clear()
        fetcher.acquire(gone, "t")
        await until(lambda: len(fetcher._downloads) == 1)
        fetcher.release(gone)
        await until(lambda: fetcher._downloads == {})
        store.may_come.set()
        await until(lambda: not list((tmp_path / "cache" / ".locks").iterdir()))
        assert not store.is_local(gone)
        fetcher.close()

    asyncio.run(test())


def test_a_client_that_comes_back_soon_finds_its_download_under_way(tmp_path: Path) -> None:
    store = HangingStore(tmp_path)
    store.hangs = True

    async def test() -> None:
        ref = put_adapter(store, 0)
        fetcher = AdapterFetcher(store)
        fetcher.acquire(ref, "t")
        await until(lambda: len(fetcher._downloads) == 1)
        (under_way,) = fetcher._downloads.values()
        fetcher.release(ref)
        again = fetcher.acquire(ref, "t")
        store.may_come.set()
        assert (await asyncio.shield(again)).is_dir() and under_way.arrived.done()
        fetcher.release(ref)
        fetcher.close()

    asyncio.run(test())
