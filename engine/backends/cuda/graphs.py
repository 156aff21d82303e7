"""GraphRunner: replays decode steps as recorded graphs, one for each padded batch size.

A graph replays kernels with the arguments of its capture: everything that changes from step to
step is read from fixed device buffers. Its key is (padded batch size, has adapters), never which
adapters or how many; a batch without any has no cost for them. Larger batches run eagerly.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.announcer import COMPILE_PATIENCE_S, SILENT, Announcer
from engine.backends.cuda.streams import Device, Replay

log = logging.getLogger(__name__)

SMALL_SIZES = (1, 2, 4)
SIZE_STEP = 8  # from 8 rows on; padding wastes less than a fifth from 40 rows on
MAX_GRAPH_ROWS = 512  # larger steps take longer than launching their kernels one by one


@dataclass(frozen=True, slots=True)
class GraphFigures:
    """The cost of the capture. Bytes are the decrease of the device's free memory."""

    num_graphs: int = 0
    capture_s: float = 0.0
    nbytes: int = 0


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """List padded batch sizes, ascending; the last is max_num_seqs unless that is too large."""
    largest = min(max_num_seqs, MAX_GRAPH_ROWS)
    sizes = [*SMALL_SIZES, *range(SIZE_STEP, largest, SIZE_STEP)]
    return (*(size for size in sizes if size < largest), largest)


class GraphRunner:
    """Records `work(size, has_lora)`, which computes `size` rows from fixed buffers into fixed
    buffers; `prepare` fills them with harmless rows before."""

    def __init__(
        self,
        device: Device,
        sizes: Sequence[int],
        prepare: Callable[[int, bool], None],
        work: Callable[[int, bool], None],
    ) -> None:
        assert list(sizes) == sorted(set(sizes)), "sizes ascend"
        self._device = device
        self._sizes = tuple(sizes)
        self._prepare, self._work = prepare, work
        self._graphs: dict[tuple[int, bool], Replay] = {}
        self.figures = GraphFigures()

    def capture(self, announcer: Announcer = SILENT) -> None:
        """Record all graphs, the largest first, so that the smaller ones reuse its memory."""
        start, free_bytes = time.perf_counter(), self._device.memory().free_bytes
        keys = [(size, lora) for size in reversed(self._sizes) for lora in (True, False)]
        for size, has_lora in announcer.through(
            keys, "capturing graphs", "graph", COMPILE_PATIENCE_S
        ):
            self._graphs[size, has_lora] = self._capture_one(size, has_lora)
        self._device.synchronize()
        self.figures = GraphFigures(
            len(self._graphs),
            time.perf_counter() - start,
            max(0, free_bytes - self._device.memory().free_bytes),
        )
        log.info(
            "captured %d graphs of up to %d rows in %.1f s; they take %.2f GiB",
            self.figures.num_graphs,
            max(self._sizes, default=0),
            self.figures.capture_s,
            self.figures.nbytes / 2**30,
        )

    def size_for(self, num_rows: int) -> int | None:
        """Return the smallest captured size that holds the rows; None: run them eagerly."""
        place = bisect_left(self._sizes, num_rows)
        if not self._graphs or place == len(self._sizes):
            return None
        return self._sizes[place]

    def replay(self, size: int, has_lora: bool) -> None:
        self._graphs[size, has_lora]()

    def _capture_one(self, size: int, has_lora: bool) -> Replay:
        self._prepare(size, has_lora)
        self._work(size, has_lora)  # compiles kernels and allocates their permanent memory
        self._device.synchronize()
        return self._device.capture(lambda: self._work(size, has_lora))
