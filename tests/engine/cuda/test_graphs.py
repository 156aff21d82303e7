"""Tests GraphRunner: its sizes, the order of captures, and the replayed graphs."""

from collections.abc import Callable

import pytest

from engine.announcer import COMPILE_PATIENCE_S, Announcer
from engine.backends.cuda.graphs import MAX_GRAPH_ROWS, GraphRunner, graph_sizes
from engine.backends.cuda.streams import DeviceMemory, HostDevice, Replay

Key = tuple[int, bool]


class Recorder(HostDevice):
    """Records captures and replays; every capture takes some memory."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[list[Key]] = []
        self.replayed: list[list[Key]] = []
        self.work: list[Key] = []
        self.free_bytes = 1000

    def capture(self, work: Callable[[], None]) -> Replay:
        self.work = []
        work()
        recorded = list(self.work)
        self.captured.append(recorded)
        self.free_bytes -= 7
        return lambda: self.replayed.append(recorded)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.free_bytes, 2000)


def make(sizes: tuple[int, ...]) -> tuple[GraphRunner, Recorder, list[tuple[str, Key]]]:
    device, calls = Recorder(), []

    def work(size: int, has_lora: bool) -> None:
        calls.append(("work", (size, has_lora)))
        device.work.append((size, has_lora))

    def prepare(size: int, has_lora: bool) -> None:
        calls.append(("prepare", (size, has_lora)))

    return GraphRunner(device, sizes, prepare, work), device, calls


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (4, (1, 2, 4)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
    ],
)
def test_sizes_end_with_the_largest_batch(max_num_seqs: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(max_num_seqs) == sizes


def test_very_large_batches_have_no_graph() -> None:
    sizes = graph_sizes(4096)
    assert sizes[-1] == MAX_GRAPH_ROWS and list(sizes) == sorted(set(sizes))
    runner, _, _ = make(sizes)
    runner.capture()
    assert runner.size_for(MAX_GRAPH_ROWS) == MAX_GRAPH_ROWS
    assert runner.size_for(MAX_GRAPH_ROWS + 1) is None


def test_graphs_are_captured_from_the_largest_on_after_a_warm_up() -> None:
    runner, device, calls = make((1, 2, 4))
    runner.capture()
    keys = [(size, lora) for size in (4, 2, 1) for lora in (True, False)]
    assert device.captured == [[key] for key in keys]
    assert calls == [(what, key) for key in keys for what in ("prepare", "work", "work")]
    assert runner.figures.num_graphs == 6 and runner.figures.nbytes == 6 * 7
    assert runner.figures.capture_s > 0


def test_each_capture_is_announced_with_patience_for_the_compiler() -> None:
    runner, _, _ = make((1, 2))
    words: list[tuple[str, float | None]] = []
    runner.capture(Announcer(lambda work, patience_s: words.append((work, patience_s))))
    texts = [f"capturing graphs, graph {number} of 4" for number in (1, 2, 3, 4)]
    assert words == [(text, COMPILE_PATIENCE_S) for text in texts]


def test_a_batch_replays_the_smallest_graph_that_holds_it() -> None:
    runner, device, calls = make(graph_sizes(20))
    assert runner.size_for(3) is None, "nothing is captured yet"
    runner.capture()
    del calls[:]
    expected = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 9: 16, 16: 16, 17: 20, 20: 20, 21: None}
    assert {rows: runner.size_for(rows) for rows in expected} == expected
    runner.replay(4, False)
    runner.replay(16, True)
    assert device.replayed == [[(4, False)], [(16, True)]] and not calls


def test_without_graph_sizes_every_step_is_eager() -> None:
    runner, device, _ = make(())
    runner.capture()
    assert runner.size_for(1) is None and not device.captured
