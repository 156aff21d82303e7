"""LateRunner: computes with a real model as late as an asynchronous device could.

A step is computed when its result is read, after the next step has been scheduled.
"""

from collections import deque
from dataclasses import dataclass, replace

from engine.backends.runner import RowOutput, TokenMasks
from engine.backends.sync_runner import SyncRunner
from engine.scheduler.batch import PENDING, ScheduledBatch, ScheduledRequest

NEVER_READ = 3  # stands for a token of a step that raised


@dataclass(slots=True)
class LateStep:
    runner: "LateRunner"
    batch: ScheduledBatch
    masks: TokenMasks | None = None

    def result(self) -> list[RowOutput]:
        return self.runner.compute(self.batch, self.masks)


class LateRunner(SyncRunner):
    pipeline_depth = 1
    refuses_launch = False
    loses_step = False
    num_in_flight = 0
    loads_are_immediate = True  # False: they arrive some polls after their step

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._at_launch = self._host_adapter
        self._weights = {}
        self._host_adapter = self._weights.__getitem__
        self._sampled: dict[tuple[str, int, int], int] = {}
        self._computed_loads: list[str] = []
        self._on_their_way: deque[list[str]] = deque([[], [], []])

    def launch(self, batch: ScheduledBatch, masks: TokenMasks | None = None) -> LateStep:
        if self.refuses_launch:
            raise RuntimeError("the launch is refused")
        self.num_in_flight += 1
        assert self.num_in_flight <= 2
        for load in batch.adapter_loads:
            self._weights[load.digest] = self._at_launch(load.digest)
        return LateStep(self, batch, masks)

    def arrived(self) -> tuple[str, ...]:
        self._on_their_way.append(self._computed_loads)
        self._computed_loads = []
        return tuple(self._on_their_way.popleft())

    def compute(self, batch: ScheduledBatch, masks: TokenMasks | None = None) -> list[RowOutput]:
        self.num_in_flight -= 1
        self._computed_loads += [load.digest for load in batch.adapter_loads]
        sampled, self._sampled = self._sampled, {}
        rows = tuple(_resolved(r, sampled) for r in batch.requests)
        if self.loses_step:
            self._move(batch)
            raise RuntimeError("the step is lost")
        outputs = self.execute(replace(batch, requests=rows), masks)
        self._sampled = {
            (r.request_id, r.choice, r.life): output.token_ids[0]
            for r, output in zip(batch.requests, outputs, strict=True)
            if output.token_ids
        }
        return outputs


def _resolved(
    request: ScheduledRequest, sampled: dict[tuple[str, int, int], int]
) -> ScheduledRequest:
    if PENDING not in request.token_ids:
        return request
    token_id = sampled.get((request.request_id, request.choice, request.life), NEVER_READ)
    history = request.history
    if history is not None:
        history = (history[0], [*history[1], token_id])
    return request._replace(token_ids=[token_id], history=history)
