"""Traffic: keeps an engine busy with requests of some sizes, and notes what each turn took."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.messages import AdapterFolder, GenerateRequest
from engine.profiling.turns import Turns
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.request import SamplingParams
from engine.scheduler.step_time import StepShape, shape_of


class StepSample(NamedTuple):
    """What a step computed, and the seconds of the loop's whole turn around it."""

    shape: StepShape
    adapter_rows: int
    adapter_row_bytes: int
    distinct_adapters: int
    distinct_bytes: int
    new_requests: int
    after_idle: int  # 1 if nothing was to do before, else 0
    seconds: float


@dataclass(frozen=True, slots=True)
class Phase:
    """So many requests at a time, with tokens drawn up to these numbers.

    Requests use `adapters` in turn; None is the base model. With a pause, the engine is idle for so
    long before the next ones come.
    """

    num_requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    adapters: Sequence[AdapterFolder | None]
    pause_s: float = 0.0


class Traffic:
    """Runs phases on one engine. Nothing else may use it meanwhile."""

    def __init__(self, turns: Turns, seed: int) -> None:
        self._turns, self._engine = turns, turns.engine
        self._rng = random.Random(seed)
        self._num_made = 0
        self._digests: dict[str, str] = {}  # by request
        self._unseen: set[str] = set()  # requests that no step has computed anything of
        self.samples: list[StepSample] = []

    def run(self, phase: Phase, seconds: float) -> None:
        """Run a phase for so long; requests that have not ended go on in the next one."""
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            is_after_idle = phase.pause_s > 0 and not self._digests
            if is_after_idle:
                if not self._engine.is_idle:
                    self._turn()  # finds nothing to do
                time.sleep(phase.pause_s)
            if is_after_idle or not phase.pause_s:
                while len(self._digests) < phase.num_requests:
                    self._add(phase)
            self._turn(is_after_idle)

    def stop(self) -> None:
        """End all requests."""
        for request_id in self._digests:
            self._turns.abort(request_id)
        while self._digests:
            self._turn()

    def _add(self, phase: Phase) -> None:
        folder = phase.adapters[self._num_made % len(phase.adapters)]
        self._num_made += 1
        request_id = f"profile-{self._num_made}"
        self._digests[request_id] = folder.digest if folder else ""
        self._unseen.add(request_id)
        vocab_size, rng = self._engine.settled.spec.vocab_size, self._rng
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(*phase.prompt))]
        sampling = SamplingParams(
            max_tokens=rng.randint(*phase.output), temperature=0.0, ignore_eos=True
        )
        self._turns.add(GenerateRequest(request_id, prompt, sampling, adapter_folder=folder))

    def _turn(self, is_after_idle: bool = False) -> None:
        waits = self._engine.is_idle and not is_after_idle  # for an adapter that is read
        news, took_s = self._turns.turn()
        batch = self._engine.last_batch
        if batch is not None:
            sample = self._sample(batch, took_s)._replace(after_idle=int(is_after_idle))
            if not (waits or batch.adapter_loads or batch.moves):
                self.samples.append(sample)
        for request_id, _, has_ended in news:
            if has_ended:
                del self._digests[request_id]
                self._unseen.discard(request_id)

    def _sample(self, batch: ScheduledBatch, took_s: float) -> StepSample:
        rows = row_bytes = new = 0
        sizes: dict[int, int] = {}
        for request in batch.requests:
            if request.request_id in self._unseen:
                self._unseen.remove(request.request_id)
                new += 1
            if request.adapter_slot:
                digest = self._digests[request.request_id]
                size = sizes[request.adapter_slot] = self._nbytes(digest)
                rows += len(request.token_ids)
                row_bytes += len(request.token_ids) * size
        shape, nbytes = shape_of(batch), sum(sizes.values())
        return StepSample(shape, rows, row_bytes, len(sizes), nbytes, new, 0, took_s)

    def _nbytes(self, digest: str) -> int:
        return self._engine.scheduler.adapters.nbytes(digest) or 0
