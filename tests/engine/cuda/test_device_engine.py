"""Tests the whole engine on a DeviceRunner: its answers equal those without pipelining.

The model is plain torch, on a device where adapters arrive some steps after their load starts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.adapter_copies import AdapterCopies, PackedAdapter, pack_adapter
from engine.backends.cuda.extent import AdapterExtent
from engine.backends.cuda.forward import StepLimits
from engine.backends.cuda.runner import DeviceRunner
from engine.backends.cuda.streams import Event, HostDevice
from engine.backends.torch.forward import TorchForward
from engine.engine import Engine
from engine.messages import ErrorKind, GenerateRequest
from engine.scheduler.batch import ScheduledBatch
from tests.engine.support.driver import greedy, make_engine, prompt_of, run, write_adapter
from tests.engine.support.plain_device import make_plain
from tests.engine.support.tiny import Tiny
from tests.engine.test_pipelined_engine import Answers, assert_same, diverse_requests

POLLS = 3  # until a copy has ended


@dataclass(eq=False)
class LateCopy:
    work: list[Callable[[], object]]
    polls: int = POLLS

    def is_done(self) -> bool:
        self.polls -= 1
        if self.polls <= 0:
            self.wait()
        return not self.work

    def wait(self) -> None:
        while self.work:
            self.work.pop(0)()


class LateCopies(HostDevice):
    """Makes copies on the side stream arrive late, unless the main stream waits for them."""

    side_work: list[Callable[[], object]] | None = None

    def copy(self, target: Tensor, source: Tensor) -> None:
        if self.side_work is None:
            super().copy(target, source)
        else:
            self.side_work.append(lambda: target.copy_(source))

    @contextmanager
    def side(self, after: Event) -> Iterator[None]:
        self.side_work = []
        yield
        self.side_work = None

    def record(self) -> Event:
        if self.side_work is None:
            return super().record()
        event, self.side_work = LateCopy(self.side_work), []
        return event


class DeviceEngine(Engine):
    """Packs adapters in the host cache's threads, as an engine on a device does."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        load = self.host._load
        self.host._load = lambda adapter: pack_adapter(load(adapter), HostDevice())  # type: ignore[arg-type]


MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Tiny]) -> Tiny:
    return tiny_model()


@pytest.fixture
def on_device(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    def make(uses_graphs: bool = True, **changes: int) -> Engine:
        seqs, tokens = changes.get("max_num_seqs", 16), changes.get("max_num_batched_tokens", 64)
        limits = StepLimits(seqs, tokens, 128, changes.get("block_size", 4))
        settings = {"memory_bytes": 2**22, "max_model_len": 128, **changes}
        with late_device(monkeypatch, limits, settings["memory_bytes"], uses_graphs):
            return make_engine(tiny.folder, **settings)

    return make


@contextmanager
def late_device(
    monkeypatch: pytest.MonkeyPatch, limits: StepLimits, arena_bytes: int, uses_graphs: bool
) -> Iterator[None]:
    """Let engines that are made in the block run on a DeviceRunner with late copies."""

    def runner(forward: TorchForward, host_adapter: Callable[[str], PackedAdapter]) -> DeviceRunner:
        return make_plain(
            forward._decoder,
            host_adapter,
            uses_graphs=uses_graphs,
            device=LateCopies(),
            limits=limits,
            arena_bytes=arena_bytes,
        )

    with monkeypatch.context() as patch:
        patch.setattr("engine.backends.torch.load.SyncRunner", runner)
        patch.setattr("tests.engine.support.driver.Engine", DeviceEngine)
        yield


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> Answers:
    return run(make_engine(tiny.folder), diverse_requests())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 16, "uses_graphs": False},
        {"max_num_seqs": 3},
        {"memory_bytes": 72 * 2 * 3 * 2 * 16 * 4, "max_model_len": 64},
    ],
    ids=["graphs", "eager", "few at a time", "with preemptions"],
)
def test_answers_equal_those_without_pipelining(
    on_device: MakeEngine, expected: Answers, changes: dict[str, int]
) -> None:
    engine = on_device(**changes)
    assert_same(run(engine, diverse_requests()), expected)
    assert (engine.stats.total_preemptions > 0) == ("memory_bytes" in changes)


def test_adapters_share_the_arena_with_blocks_and_take_turns(
    on_device: MakeEngine, tiny: Tiny, tmp_path: Path
) -> None:
    """Have room for two of five adapters, of three sizes: they are evicted, moved and reloaded."""
    ranks = [8, 3, 8, 16, 3]
    adapters = [
        write_adapter(tiny.folder, tmp_path / f"a{i}", seed=i, r=r) for i, r in enumerate(ranks)
    ]
    requests = [
        GenerateRequest(
            f"r{i}", prompt_of(6 + i, i), greedy(5 + i % 4), adapter_folder=(*adapters, None)[i % 6]
        )
        for i in range(18)
    ]
    expected = run(make_engine(tiny.folder), requests)
    engine = on_device(memory_bytes=260_000, max_num_seqs=6)
    launched = launches_of(engine)
    for _ in range(2):  # in the first round an adapter may have all its turns as it is proven
        assert_same(run(engine, requests), expected)
    assert sum(len(batch.adapter_loads) for batch in launched) > len(adapters)
    assert any(batch.adapter_evictions for batch in launched)
    assert any(batch.moves for batch in launched)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 12))]
)
def test_graphs_that_were_captured_without_adapters_are_noticed(
    on_device: MakeEngine, tiny: Tiny, tmp_path: Path, seed: int
) -> None:
    engine, adapter = on_device(), write_adapter(tiny.folder, tmp_path / "a", seed=seed)
    graphs = engine.runner._forward._graphs._graphs  # type: ignore[attr-defined]
    for size in {size for size, _ in graphs}:
        graphs[size, True] = graphs[size, False]
    requests = [GenerateRequest("r", prompt_of(9), greedy(6), adapter_folder=adapter)]
    last = run(engine, requests)["r", 0].last
    assert last is not None and last.error is not None
    assert "does not act as its weights say" in last.error.message


def launches_of(engine: Engine) -> list:  # type: ignore[type-arg]
    batches, launch = [], engine.runner.launch

    def noted(batch):  # type: ignore[no-untyped-def]
        batches.append(batch)
        return launch(batch)

    engine.runner.launch = noted  # type: ignore[method-assign]
    return batches


def test_running_out_of_memory_ends_only_requests_of_that_step(
    on_device: MakeEngine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = on_device()
    engine.add_request(GenerateRequest("lost", prompt_of(9, 1), greedy(20)))
    for _ in range(4):
        engine.step()
    model = engine.runner._forward._model  # type: ignore[attr-defined]

    def out_of_memory(hidden: Tensor, head: None) -> Tensor:
        raise torch.OutOfMemoryError("no room for logits")

    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", out_of_memory)
        outputs = engine.step()
    error = outputs[-1].error
    assert error is not None and error.kind == ErrorKind.ENGINE_ERROR and "no room" in error.message
    assert not engine.scheduler.has_unfinished
    later = GenerateRequest("later", prompt_of(9, 1), greedy(20))
    assert_same(run(engine, [later]), run(make_engine(tiny.folder), [later]))


def test_only_requests_of_an_adapter_that_no_step_can_load_end(
    on_device: MakeEngine, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the adapter, so they are in none of the failed steps."""
    adapters = [write_adapter(tiny.folder, tmp_path / name) for name in ("broken", "fine")]
    engine = on_device()
    bank = engine.runner._adapters._table  # type: ignore[attr-defined]
    place = bank.place

    def refuse(slot: int, offset_bytes: int, extent: AdapterExtent) -> None:
        if extent.digest == adapters[0].digest:
            raise ValueError("does not fit the table")
        place(slot, offset_bytes, extent)

    monkeypatch.setattr(bank, "place", refuse)
    broken, fine = (
        GenerateRequest(a.path, prompt_of(9, 1), greedy(5), adapter_folder=a) for a in adapters
    )
    last = run(engine, [broken])[broken.request_id, 0].last
    assert last is not None and last.error is not None
    assert (
        last.error.kind == ErrorKind.ENGINE_ERROR and "does not fit the table" in last.error.message
    )
    assert_same(run(engine, [fine]), run(make_engine(tiny.folder), [fine]))


def test_one_failed_step_does_not_end_requests_that_wait_for_an_adapter(
    on_device: MakeEngine, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerateRequest(
        "r", prompt_of(9, 1), greedy(5), adapter_folder=write_adapter(tiny.folder, tmp_path / "a")
    )
    engine = on_device()
    copies, apply = engine.runner._adapters, AdapterCopies.apply  # type: ignore[attr-defined]
    failures = [RuntimeError("another's fault")]

    def fail_once(batch: ScheduledBatch) -> None:
        apply(copies, batch)
        if batch.adapter_loads and failures:
            raise failures.pop()

    monkeypatch.setattr(copies, "apply", fail_once)
    assert_same(run(engine, [request]), run(make_engine(tiny.folder), [request]))
    assert not failures
