"""Restarts: one process at a time, whatever dies when; a hang is noticed, and work that takes long
is not taken for one. Most processes here are real ones without a model, so that they start at once.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from engine import client as client_module
from engine import process_handle
from engine.client import EngineClient, EngineUnavailable
from engine.config import EngineConfig
from engine.liveness import Liveness
from engine.messages import ErrorKind, GenerateRequest, Item, RequestOutput
from engine.process_handle import EngineStartError
from tests.engine.support import scripted_process as scripted
from tests.engine.support.driver import greedy
from tests.engine.support.tiny import write_tiny

Test = Callable[[EngineClient, "Scene"], Awaitable[None]]


class Scene:
    """A folder with the script, and what the client reports."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        self.outputs: list[RequestOutput] = []
        (folder / "script.json").write_text(json.dumps(words))

    def on_frame(self, items: list[Item]) -> None:
        self.outputs += [RequestOutput(*i) if isinstance(i, tuple) else i for i in items]

    @property
    def pids(self) -> list[int]:
        """Of all processes that there have been."""
        path = self.folder / "starts.txt"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def errors(self, request_id: str) -> list[str]:
        found = [o.error for o in self.outputs if o.request_id == request_id]
        return [error.message for error in found if error is not None]

    def num_tokens(self, request_id: str) -> int:
        return sum(len(o.token_ids) for o in self.outputs if o.request_id == request_id)


@pytest.fixture(autouse=True)
def scripted_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (process_handle.PROGRAM[0], "-m", "tests.engine.support.scripted_process")
    monkeypatch.setattr(process_handle, "PROGRAM", program)
    monkeypatch.setattr(client_module, "RESTART_BACKOFF_S", 0.01)


@pytest.fixture
def most_alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """For each start, how many processes of this test were there with it."""
    started: list[subprocess.Popen[bytes]] = []
    counts: list[int] = []
    popen = process_handle._popen

    def counted(*args: object) -> "subprocess.Popen[bytes]":
        process = popen(*args)  # type: ignore[arg-type]
        started.append(process)
        counts.append(sum(is_there(each.pid) for each in started))
        return process

    monkeypatch.setattr(process_handle, "_popen", counted)
    yield counts
    assert not any(is_there(process.pid) for process in started), "a process was left behind"


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def config_of(folder: Path, max_silence_s: float = 60.0) -> EngineConfig:
    return EngineConfig(str(folder), device="cpu", num_threads=1, max_silence_s=max_silence_s)


def with_client(scene: Scene, test: Test, max_silence_s: float = 60.0) -> None:
    async def scenario() -> None:
        client = EngineClient(config_of(scene.folder, max_silence_s), scene.on_frame)
        await client.start()
        try:
            await test(client, scene)
        finally:
            await client.close()

    asyncio.run(scenario())


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def is_flowing(client: EngineClient, scene: Scene, request_id: str) -> None:
    client.submit(request(request_id))
    await until(lambda: scene.num_tokens(request_id) > 1)


def request(request_id: str, what: int = scripted.FLOW, n: int = 1) -> GenerateRequest:
    return GenerateRequest(request_id, [what], greedy(200), n)


# ---- one process at a time -----------------------------------------------------------------


@pytest.mark.parametrize("word", ["exit:7", "fail:no such model", "fail-and-stay:no such model"])
def test_a_process_that_dies_while_starting_is_replaced_by_one_other(
    word: str, tmp_path: Path, most_alive: list[int]
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        await is_flowing(client, scene, "lost")
        os.kill(scene.pids[0], signal.SIGKILL)
        await until(lambda: client.num_restarts == 1)
        await is_flowing(client, scene, "next")
        await asyncio.sleep(0.2)
        assert len(scene.pids) == 3 and client.is_ready and client.failure is None
        assert len(scene.errors("lost")) == 1 and scene.errors("next") == []

    with_client(Scene(tmp_path, "serve", word, "serve"), test)
    assert most_alive == [1, 1, 1]


def test_a_process_that_is_killed_in_its_start_is_replaced_by_one_other(
    tmp_path: Path, most_alive: list[int]
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        for number in (1, 2):
            os.kill(scene.pids[-1], signal.SIGKILL)
            await until(lambda number=number: len(scene.pids) == number + 1)
        await until(lambda: client.is_ready)
        await is_flowing(client, scene, "next")
        assert len(scene.pids) == 3 and client.num_restarts == 1

    with_client(Scene(tmp_path, "serve", "hang", "serve"), test)
    assert most_alive == [1, 1, 1]


def test_a_process_that_dies_again_and_again_is_started_each_time(
    tmp_path: Path, most_alive: list[int]
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        for number in range(1, 6):
            client.submit(request(f"r{number}", scripted.DIE))
            await until(lambda number=number: client.num_restarts == number)
        assert [len(scene.errors(f"r{number}")) for number in range(1, 6)] == [1] * 5

    with_client(Scene(tmp_path, "serve"), test)
    assert most_alive == [1] * 6


def test_a_process_that_dies_soon_after_each_start_is_started_ever_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RESTART_BACKOFF_S", 0.3)

    async def test(client: EngineClient, scene: Scene) -> None:
        pauses_s: list[float] = []
        for number in range(1, 4):
            last = client._process
            client.submit(request(f"r{number}", scripted.DIE))
            await until(lambda number=number: len(scene.pids) == number + 1)
            await until(lambda number=number: number == 3 or client.is_ready)
            assert last is not None and last.ending_since_s and client._process is not None
            pauses_s.append(client._process._spawned_s - last.ending_since_s)
        assert pauses_s[1] >= 0.3 and pauses_s[2] >= 0.6
        wanted = r"since \d+ s; it had ended 3 times soon after its start, at last: .* with code 3"
        assert re.search(wanted, str(client.trouble))

    with_client(Scene(tmp_path, "serve", "serve", "serve", "hang"), test)


def test_the_pause_before_a_restart_is_bounded() -> None:
    delay_s = client_module.restart_delay_s
    assert [delay_s(number) for number in range(5)] == [0.0, 0.0, 0.01, 0.02, 0.04]
    assert delay_s(40) == delay_s(10**6) == client_module.MAX_BACKOFF_S


def test_a_process_that_lasted_makes_no_restart_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RESTART_BACKOFF_S", 1000.0)
    monkeypatch.setattr(client_module, "LASTING_S", 0.0)

    async def test(client: EngineClient, scene: Scene) -> None:
        for number in (1, 2, 3):
            os.kill(scene.pids[-1], signal.SIGKILL)
            await until(lambda number=number: client.num_restarts == number)

    with_client(Scene(tmp_path, "serve"), test)


def test_close_does_not_wait_for_a_restart_that_is_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RESTART_BACKOFF_S", 1000.0)

    async def test(client: EngineClient, scene: Scene) -> None:
        os.kill(scene.pids[-1], signal.SIGKILL)
        await until(lambda: client.num_restarts == 1)
        os.kill(scene.pids[-1], signal.SIGKILL)
        await until(lambda: client.outage)
        await client.close()
        assert len(scene.pids) == 2

    with_client(Scene(tmp_path, "serve"), test)


def test_starts_that_fail_again_and_again_are_given_up(
    tmp_path: Path, most_alive: list[int]
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        os.kill(scene.pids[0], signal.SIGKILL)
        await until(lambda: client.failure)
        assert client.failure == "the engine could not be started again: /models/a is gone"
        assert client.outage == "the engine cannot be started again"
        assert not client.is_ready and len(scene.pids) == 1 + client_module.MAX_FAILED_STARTS

    with_client(Scene(tmp_path, "serve", "fail:/models/a is gone"), test)
    assert set(most_alive) == {1}


def test_a_start_without_a_process_counts_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        def refuse(*args: object) -> None:
            raise OSError("no memory for a process")

        monkeypatch.setattr(process_handle, "_popen", refuse)
        os.kill(scene.pids[0], signal.SIGKILL)
        await until(lambda: client.failure)
        assert client.failure is not None and "no memory for a process" in client.failure

    with_client(Scene(tmp_path, "serve"), test)


def test_a_process_that_cannot_be_ended_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for its driver: no signal ends it."""
    monkeypatch.setattr(process_handle, "CLOSE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(process_handle, "KILL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(client_module, "GONE_TIMEOUT_S", 0.05)

    async def test(client: EngineClient, scene: Scene) -> None:
        client.submit(request("lost", scripted.SLEEP))
        process = client._process
        assert process is not None
        monkeypatch.setattr(process._process, "kill", lambda: None)
        process.kill("it was silent")
        await until(lambda: client.failure)
        assert scene.errors("lost") == ["it was silent"]
        assert len(scene.pids) == 1 and is_there(scene.pids[0])
        os.kill(scene.pids[0], signal.SIGKILL)
        assert await process.gone(60)

    with_client(Scene(tmp_path, "serve"), test)


def test_requests_end_only_with_the_process_that_they_were_sent_to(
    tmp_path: Path, most_alive: list[int]
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        client.submit(request("two choices", n=2))
        await is_flowing(client, scene, "one")
        os.kill(scene.pids[0], signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="started again, since"):
            for _ in range(1000):
                client.submit(request(f"early{_}"))
                await asyncio.sleep(0.01)
        await until(lambda: client.num_restarts == 1)
        await is_flowing(client, scene, "next")
        assert len(scene.errors("two choices")) == 2 and len(scene.errors("one")) == 1
        kinds = {o.error.kind for o in scene.outputs if o.error is not None}
        assert kinds == {ErrorKind.ENGINE_DIED} and scene.errors("next") == []

    with_client(Scene(tmp_path, "serve"), test)
    assert most_alive == [1, 1]


def test_an_outage_counts_from_the_end_of_the_last_process(tmp_path: Path) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        await asyncio.sleep(1.2)
        assert client.outage is None and client._process is not None
        client._process.kill("it was silent")
        assert client.outage == "the engine is being started again, since 0 s"
        await until(lambda: client.outage == "the engine is being started again, since 1 s")
        await until(lambda: client.outage is None)

    with_client(Scene(tmp_path, "serve", "slow:1.5"), test)


# ---- closing -------------------------------------------------------------------------------


def test_a_death_during_close_starts_nothing(tmp_path: Path, most_alive: list[int]) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        await is_flowing(client, scene, "last")
        os.kill(scene.pids[0], signal.SIGKILL)
        await client.close()
        await asyncio.sleep(0.1)
        assert len(scene.errors("last")) == 1 and client.outage == "the engine is being stopped"

    with_client(Scene(tmp_path, "serve"), test)
    assert most_alive == [1]


def test_close_ends_a_process_that_is_starting_again(tmp_path: Path, most_alive: list[int]) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        os.kill(scene.pids[0], signal.SIGKILL)
        await until(lambda: len(scene.pids) == 2)
        await client.close()
        assert not is_there(scene.pids[1])

    with_client(Scene(tmp_path, "serve", "hang"), test)
    assert most_alive == [1, 1]


def test_close_ends_a_process_that_is_stopped(tmp_path: Path, most_alive: list[int]) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        await is_flowing(client, scene, "last")
        os.kill(scene.pids[0], signal.SIGSTOP)
        for number in range(2000):  # more than the socket takes
            client.submit(GenerateRequest(f"r{number}", [0] * 1000, greedy(1)))
        await client.close()
        assert len(scene.errors("last")) == 1

    with_client(Scene(tmp_path, "serve"), test)
    assert most_alive == [1]


def test_close_lets_a_process_end_by_itself(tmp_path: Path, most_alive: list[int]) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        await client.close()
        assert (scene.folder / "ends.txt").read_text().split() == [str(scene.pids[0])]

    with_client(Scene(tmp_path, "serve"), test)


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_first_start_that_is_broken_off_leaves_no_process(
    how: str, tmp_path: Path, most_alive: list[int]
) -> None:
    async def scenario() -> None:
        scene = Scene(tmp_path, "hang")
        client = EngineClient(config_of(tmp_path), scene.on_frame)
        starting = asyncio.create_task(client.start())
        await until(lambda: scene.pids)
        if how == "cancel":
            starting.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError if how == "cancel" else EngineStartError):
            await starting

    asyncio.run(scenario())
    assert most_alive == [1]


def test_a_first_start_that_failed_may_be_tried_again(
    tmp_path: Path, most_alive: list[int]
) -> None:
    async def scenario() -> None:
        scene = Scene(tmp_path, "fail:no such model", "slow:0.3")
        client = EngineClient(config_of(tmp_path), scene.on_frame)
        assert client.outage is not None and client.outage.startswith(
            "the engine is being started,"
        )
        with pytest.raises(EngineStartError, match="no such model"):
            await client.start()
        info = await client.start()
        assert client.is_ready and client.outage is None and info.load_s > 0.2
        await client.close()

    asyncio.run(scenario())
    assert most_alive == [1, 1]


# ---- hangs ---------------------------------------------------------------------------------


def test_a_start_that_hangs_is_killed_and_tried_again(
    tmp_path: Path, most_alive: list[int]
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        os.kill(scene.pids[0], signal.SIGKILL)
        await until(lambda: client.num_restarts == 1)
        assert len(scene.pids) == 3

    with_client(Scene(tmp_path, "serve", "hang", "serve"), test, max_silence_s=3.0)
    assert most_alive == [1, 1, 1]


def test_a_first_start_that_hangs_fails(tmp_path: Path, most_alive: list[int]) -> None:
    async def scenario() -> None:
        client = EngineClient(config_of(tmp_path, 1.5), Scene(tmp_path, "hang").on_frame)
        with pytest.raises(EngineStartError, match="was silent for 2 s while starting"):
            await client.start()
        await client.close()

    asyncio.run(scenario())
    assert most_alive == [1]


@pytest.mark.parametrize("word", ["slow:4", "announce:4"])
def test_a_start_may_take_long_as_long_as_it_gives_news_or_has_announced_it(
    word: str, tmp_path: Path, most_alive: list[int]
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        assert len(scene.pids) == 1

    with_client(Scene(tmp_path, word), test, max_silence_s=2.0)
    assert most_alive == [1]


@pytest.mark.parametrize("what", [scripted.SLEEP, scripted.SPIN])
def test_a_step_that_hangs_is_noticed_within_seconds(
    what: int, tmp_path: Path, most_alive: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        await is_flowing(client, scene, "neighbour")
        client.submit(request("hung", what))
        began_s = time.monotonic()
        await until(lambda: scene.errors("hung") and scene.errors("neighbour"))
        assert time.monotonic() - began_s >= 2.2
        await until(lambda: client.num_restarts == 1)
        await is_flowing(client, scene, "next")

    monkeypatch.setattr("engine.liveness.MIN_HANG_S", 2.5)
    with_client(Scene(tmp_path, "serve"), test)
    assert most_alive == [1, 1]


def test_an_idle_process_and_one_with_a_long_step_are_not_taken_for_hanging(
    tmp_path: Path, most_alive: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(client: EngineClient, scene: Scene) -> None:
        await asyncio.sleep(3.0)
        client.submit(request("long", scripted.PAUSE))
        await until(lambda: scene.num_tokens("long"))
        assert client._liveness.longest_step_s > scripted.PAUSE_S / 2
        assert len(scene.pids) == 1

    monkeypatch.setattr("engine.liveness.MIN_HANG_S", 2.5)
    with_client(Scene(tmp_path, "serve"), test)
    assert most_alive == [1]


def test_a_real_engine_that_is_stopped_is_noticed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (process_handle.PROGRAM[0], "-m", "engine.process")
    monkeypatch.setattr(process_handle, "PROGRAM", program)
    scene = Scene(tmp_path, "serve")
    folder = write_tiny(tmp_path, "qwen2").folder
    config = EngineConfig(
        str(folder), memory_bytes=2**24, device="cpu", num_threads=1, max_num_seqs=1
    )

    async def scenario() -> None:
        client = EngineClient(config, scene.on_frame)
        await client.start()
        for name in [*(f"before {i}" for i in range(400)), "stuck"]:  # far more than is waited
            client.submit(GenerateRequest(name, [5], greedy(250)))
        await until(lambda: scene.num_tokens("before 0") > 2)
        assert client.pid is not None
        first = client.pid
        os.kill(first, signal.SIGSTOP)
        stopped_s = time.monotonic()
        await until(lambda: scene.errors("stuck"))
        assert time.monotonic() - stopped_s < 30, "on a busy machine; the limit is five seconds"
        await until(lambda: client.is_ready)
        client.submit(GenerateRequest("next", [5], greedy(3)))
        await until(lambda: scene.num_tokens("next") == 3)
        assert not is_there(first)
        await client.close()

    asyncio.run(scenario())


def test_an_idle_process_is_asked_less_often_than_one_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ping = Liveness.ping

    def counted(self: Liveness) -> None:
        asked.append(1)
        ping(self)

    monkeypatch.setattr(Liveness, "ping", counted)

    async def test(client: EngineClient, scene: Scene) -> None:
        del client, scene
        await asyncio.sleep(process_handle.WATCH_PERIOD_S * 6.5)

    with_client(Scene(tmp_path, "serve"), test)
    assert 1 <= len(asked) <= 3
