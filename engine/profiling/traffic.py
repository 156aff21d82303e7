"""Traffic: keeps an engine busy with requests of some sizes, and notes what each step took."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.request import SamplingParams
from engine.scheduler.step_time import StepShape, shape_of


class StepSample(NamedTuple):
    """What a step computed, and what it took from its beginning to the next one's."""

    shape: StepShape
    adapter_rows: int
    adapter_row_bytes: int
    distinct_adapters: int
    distinct_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Phase:
    """So many requests at a time, with tokens drawn up to these numbers.

    Requests use `adapters` in turn; None is the base model.
    """

    num_requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    adapters: Sequence[AdapterFolder | None]


class Traffic:
    """Runs phases on one engine. Nothing else may use it meanwhile."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._rng = random.Random(seed)
        self._num_made = self._num_alive = 0
        self._digests: dict[str, str] = {}  # by request
        self.samples: list[StepSample] = []

    def run(self, phase: Phase, seconds: float) -> None:
        """Run a phase for so long, then until its requests have ended."""
        end_s = time.perf_counter() + seconds
        while True:
            is_over = time.perf_counter() >= end_s
            while not is_over and self._num_alive < phase.num_requests:
                self._add(phase)
            if not self._num_alive:
                return
            self._step()

    def _add(self, phase: Phase) -> None:
        folder = phase.adapters[self._num_made % len(phase.adapters)]
        self._num_made += 1
        self._num_alive += 1
        request_id = f"profile-{self._num_made}"
        self._digests[request_id] = folder.digest if folder else ""
        vocab_size, rng = self._engine.settled.spec.vocab_size, self._rng
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(*phase.prompt))]
        sampling = SamplingParams(
            max_tokens=rng.randint(*phase.output), temperature=0.0, ignore_eos=True
        )
        self._engine.add_request(
            GenerateRequest(request_id, prompt, sampling, adapter_folder=folder)
        )

    def _step(self) -> None:
        began_s = time.perf_counter()
        outputs = self._engine.step()
        took_s = time.perf_counter() - began_s
        batch = self._engine.last_batch
        if batch is None:
            time.sleep(0.0005)  # an adapter is being read
        elif not batch.adapter_loads and not batch.moves:
            self.samples.append(self._sample(batch, took_s))
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"a request to measure with failed: {output.error.message}")
            if output.finish_reason is not None:
                self._num_alive -= 1
                del self._digests[output.request_id]

    def _sample(self, batch: ScheduledBatch, took_s: float) -> StepSample:
        rows = row_bytes = 0
        sizes: dict[int, int] = {}
        for request in batch.requests:
            if request.adapter_slot:
                digest = self._digests[request.request_id]
                size = sizes[request.adapter_slot] = self._nbytes(digest)
                rows += len(request.token_ids)
                row_bytes += len(request.token_ids) * size
        return StepSample(shape_of(batch), rows, row_bytes, len(sizes), sum(sizes.values()), took_s)

    def _nbytes(self, digest: str) -> int:
        return self._engine.scheduler.adapters.nbytes(digest) or 0
