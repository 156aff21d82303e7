"""Tests what an engine announces before it may take long: weights, compilers, first large steps."""

import asyncio
from pathlib import Path

import pytest

from engine.announcer import COMPILE_PATIENCE_S, Announcer
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.engine import Engine
from engine.liveness import Liveness
from engine.messages import GenerateRequest
from engine.scheduler.batch import AdapterLoad, ScheduledBatch, ScheduledRequest
from engine.scheduler.request import SamplingParams
from engine.step_sizes import StepSizes
from tests.engine.support.driver import finish, greedy, prompt_of
from tests.engine.support.tiny import Tiny, write_tiny

Words = list[tuple[str, float | None]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("base"), "qwen2")


def config_of(folder: Path) -> EngineConfig:
    return EngineConfig(str(folder), memory_bytes=2**24, device="cpu", num_threads=1)


def announcing_engine(folder: Path, words: Words) -> Engine:
    return Engine(
        config_of(folder),
        announcer=Announcer(lambda work, patience_s: words.append((work, patience_s))),
    )


def test_each_item_is_announced_before_it_and_bars_are_shown_only_when_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words: Words = []
    announcer = Announcer(lambda work, patience_s: words.append((work, patience_s)))
    seen = [(item, len(words)) for item in announcer.through("ab", "spelling", "letter", 9.0)]
    assert seen == [("a", 1), ("b", 2)]
    assert words == [("spelling, letter 1 of 2", 9.0), ("spelling, letter 2 of 2", 9.0)]
    assert capsys.readouterr().err == ""
    assert list(Announcer(shows_bars=True).through("ab", "spelling", "letter")) == ["a", "b"]
    assert "2/2" in capsys.readouterr().err


def test_a_load_announces_compilers_with_patience_and_each_weight(tiny: Tiny) -> None:
    words: Words = []
    announcing_engine(tiny.folder, words)
    num_tensors = len(list(tiny.reference.named_parameters()))
    assert words[0] == ("compiling kernels", COMPILE_PATIENCE_S)
    weights = [(f"reading weights, tensor {n} of {num_tensors}", None) for n in (1, num_tensors)]
    assert [word for word in words if word in weights] == weights


def test_only_steps_larger_than_any_before_are_announced(tiny: Tiny) -> None:
    words: Words = []
    engine = announcing_engine(tiny.folder, words)
    words.clear()
    for number, length in enumerate((5, 3, 5, 20)):
        engine.add_request(GenerateRequest(f"r{number}", prompt_of(length), greedy(4)))
        finish(engine)
    announced = [work for work, _ in words if "attend" not in work]
    assert announced == [f"computing {length} tokens for the first time" for length in (5, 20)]


def test_a_step_may_be_large_in_other_ways_than_its_tokens() -> None:
    def step(*rows: tuple[int, int], echo: bool = False, moved: int = 0) -> ScheduledBatch:
        """Rows are the first position and the number of tokens."""
        sampling = SamplingParams()
        requests = tuple(
            ScheduledRequest(
                *("r", 0, [1] * num, start, (), 0, sampling, True),
                prompt_targets=[1] * num if echo else None,
            )
            for start, num in rows
        )
        return ScheduledBatch(requests, adapter_loads=(AdapterLoad(1, "d", 0, moved),))

    sizes = StepSizes()
    news = [
        sizes.describe_news(batch)
        for batch in (
            step((0, 10)),
            step((0, 10)),
            step((15, 5)),  # 100 pairs, as before
            step((20, 10)),  # 300
            step((50, 10)),  # 600, no more than twice as many
            step((55, 10), (0, 1)),  # one token more
            step((0, 9), echo=True),
            step((0, 9), moved=1000),
            step((0, 9), echo=True, moved=2000),
            step((0, 9), moved=2001),
        )
    ]
    assert news == [
        "computing 10 tokens for the first time",
        None,
        None,
        "computing 10 tokens that attend to 300 positions in all for the first time",
        None,
        "computing 11 tokens for the first time",
        "computing the log probabilities of 9 tokens for the first time",
        "computing 9 tokens and moving 1000 bytes of adapters for the first time",
        None,
        "computing 9 tokens and moving 2001 bytes of adapters for the first time",
    ]


def test_a_client_hears_what_the_process_announces(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    hear = Liveness.hear_busy

    def note(liveness: Liveness, work: str, patience_s: float | None) -> None:
        heard.append(work)
        hear(liveness, work, patience_s)

    monkeypatch.setattr(Liveness, "hear_busy", note)

    async def scenario() -> None:
        client = EngineClient(config_of(tiny.folder), lambda items: None)
        info = await client.start()
        assert info.load_s > 0.1
        client.submit(GenerateRequest("a", [5] * 7, greedy(1)))
        async with asyncio.timeout(60):
            while heard[-1] != "computing 7 tokens for the first time":
                await asyncio.sleep(0.01)
        await client.close()

    asyncio.run(scenario())
    assert heard[:3] == ["starting", "importing", "compiling kernels"]
    assert heard[-2].startswith("reading weights, tensor")
