"""GraphRunner: decode steps as recorded graphs, one for each padded batch size.

A graph replays kernels with the arguments of its capture: everything that changes from step to
step is read from fixed device buffers. Its key is (padded batch size, has adapters), never which
adapters or how many; a batch without any pays nothing for them. What fits no graph runs eagerly.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from engine.backends.cuda.streams import Device, Replay

log = logging.getLogger(__name__)

SMALL_SIZES = (1, 2, 4)
SIZE_STEP = 8  # from 8 rows on; padding then wastes less than a fifth of 40 rows and more
MAX_GRAPH_ROWS = 512  # beyond, a step takes longer than launching its kernels one by one


@dataclass(frozen=True, slots=True)
class GraphFigures:
    """The cost of the capture. Bytes are how much less memory the device had afterwards."""

    num_graphs: int = 0
    capture_s: float = 0.0
    nbytes: int = 0


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Padded batch sizes, ascending; the last one is max_num_seqs unless that is too large."""
    largest = min(max_num_seqs, MAX_GRAPH_ROWS)
    sizes = [*SMALL_SIZES, *range(SIZE_STEP, largest, SIZE_STEP)]
    return (*(size for size in sizes if size < largest), largest)


class GraphRunner:
    """`work(size, has_lora)` computes `size` rows from fixed buffers into fixed buffers, which
    `prepare` fills with rows that do no harm."""

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

    def capture(self, *, progress: bool = False) -> None:
        """Records all graphs, the largest first, so that the smaller ones fit in its memory."""
        start, free_bytes = time.perf_counter(), self._device.memory().free_bytes
        keys = [(size, lora) for size in reversed(self._sizes) for lora in (True, False)]
        for size, has_lora in tqdm(keys, "capturing graphs", disable=not progress):
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
        self._work(size, has_lora)  # compiles kernels and allocates what they keep
        self._device.synchronize()
        return self._device.capture(lambda: self._work(size, has_lora))
