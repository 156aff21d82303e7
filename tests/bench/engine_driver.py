"""Runs workloads on an engine without HTTP, in this process or in the engine's own."""

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest, Item, RequestOutput
from engine.scheduler.request import SamplingParams
from tests.bench.environment import NoiseMeter, cpu_s
from tests.bench.workload import Job


@dataclass(frozen=True, slots=True)
class Run:
    """Result of one pass over a workload."""

    num_tokens: int
    wall_s: float
    cpu_s: float  # of the engine's process
    num_steps: int
    step_s: float  # all steps together
    others: float  # cores that other processes used
    ttft_p50_s: float = float("nan")  # through messages

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s

    @property
    def mean_step_ms(self) -> float:
        return 1e3 * self.step_s / self.num_steps


class Driver(Protocol):
    def run(self, groups: Sequence[Sequence[Job]], concurrency: int) -> Run:
        """Run one group after the other; of each, up to `concurrency` requests at a time."""
        ...

    def close(self) -> None: ...


class InProcess:
    """Runs the engine's step loop in this thread: no messages, no second process."""

    def __init__(self, config: EngineConfig, adapters: Sequence[Path]) -> None:
        self._engine = Engine(config)
        self._adapters = adapters
        self._num_requests = 0

    def run(self, groups: Sequence[Sequence[Job]], concurrency: int) -> Run:
        before = self._engine.stats
        noise = NoiseMeter([os.getpid()])
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        num_tokens = sum(self._run_group(group, concurrency) for group in groups)
        wall_s, used_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        after = self._engine.stats
        return Run(
            num_tokens,
            wall_s,
            used_s,
            after.total_steps - before.total_steps,
            after.total_step_s - before.total_step_s,
            noise.read().others,
        )

    def close(self) -> None:
        self._engine.close()

    def _run_group(self, group: Sequence[Job], concurrency: int) -> int:
        queue, num_alive, num_tokens = list(reversed(group)), 0, 0
        while queue or num_alive:
            while queue and num_alive < concurrency:
                self._num_requests += 1
                request = as_request(queue.pop(), str(self._num_requests), self._adapters)
                self._engine.add_request(request)
                num_alive += 1
            outputs = self._engine.step()
            num_alive -= num_ended(outputs)
            num_tokens += sum(len(output.token_ids) for output in outputs)
            if self._engine.is_idle and num_alive:
                time.sleep(0.0005)  # an adapter is being read
        check_count(num_tokens, group)
        return num_tokens


class ThroughProcess:
    """Runs the engine in its own process, like a replica: frames over a socket, asyncio here."""

    def __init__(self, config: EngineConfig, adapters: Sequence[Path]) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = EngineClient(config, self._on_frame)
        self._loop.run_until_complete(self._client.start())
        self._adapters = adapters
        self._num_requests = self._num_alive = self._num_tokens = 0
        self._queue: list[Job] = []
        self._sent_s: dict[str, float] = {}  # of requests without a token yet
        self._ttft_s: list[float] = []
        self._failure: RuntimeError | None = None
        self._ended = asyncio.Event()

    def run(self, groups: Sequence[Sequence[Job]], concurrency: int) -> Run:
        return self._loop.run_until_complete(self._run(groups, concurrency))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()

    async def _run(self, groups: Sequence[Sequence[Job]], concurrency: int) -> Run:
        before, pid = self._client.stats, self._client.pid
        assert pid is not None
        noise = NoiseMeter([os.getpid(), pid])
        start_s, start_cpu_s, self._num_tokens = time.perf_counter(), cpu_s(pid), 0
        self._ttft_s.clear()
        for group in groups:
            await self._run_group(group, concurrency)
        wall_s, used_s = time.perf_counter() - start_s, cpu_s(pid) - start_cpu_s
        others = noise.read().others
        num_expected = before.total_output_tokens + self._num_tokens
        while self._client.stats.total_output_tokens < num_expected:
            await asyncio.sleep(0.01)  # wait for the last statistics to arrive
        after = self._client.stats
        return Run(
            self._num_tokens,
            wall_s,
            used_s,
            after.total_steps - before.total_steps,
            after.total_step_s - before.total_step_s,
            others,
            statistics.median(self._ttft_s),
        )

    async def _run_group(self, group: Sequence[Job], concurrency: int) -> None:
        num_before, self._queue = self._num_tokens, list(reversed(group))
        self._ended.clear()
        for _ in range(min(concurrency, len(group))):
            self._submit_next()
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure
        check_count(self._num_tokens - num_before, group)

    def _submit_next(self) -> None:
        self._num_requests += 1
        self._num_alive += 1
        request = as_request(self._queue.pop(), str(self._num_requests), self._adapters)
        self._sent_s[request.request_id] = time.perf_counter()
        self._client.submit(request)

    def _on_frame(self, items: list[Item]) -> None:
        for item in items:
            request_id = item[0] if isinstance(item, tuple) else item.request_id
            if request_id in self._sent_s:
                self._ttft_s.append(time.perf_counter() - self._sent_s.pop(request_id))
        ended = [item for item in items if not isinstance(item, tuple)]
        self._num_tokens += sum(len(item[2]) for item in items if isinstance(item, tuple))
        self._num_tokens += sum(len(output.token_ids) for output in ended)
        try:
            num = num_ended(ended)
        except RuntimeError as error:  # raised again outside of the event loop's callback
            self._failure = error
            self._ended.set()
            return
        self._num_alive -= num
        for _ in range(min(num, len(self._queue))):
            self._submit_next()
        if not self._num_alive:
            self._ended.set()


DRIVERS: dict[str, type[InProcess] | type[ThroughProcess]] = {
    "call": InProcess,
    "process": ThroughProcess,
}


def as_request(job: Job, request_id: str, adapters: Sequence[Path]) -> GenerateRequest:
    adapter = None
    if job.adapter is not None:
        folder = adapters[job.adapter]
        adapter = AdapterFolder(folder.name, str(folder))
    sampling = SamplingParams(max_tokens=job.num_output_tokens, temperature=0, ignore_eos=True)
    return GenerateRequest(request_id, job.prompt_token_ids, sampling, adapter_folder=adapter)


def num_ended(outputs: Sequence[RequestOutput]) -> int:
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id} failed: {output.error.message}")
    return sum(output.finish_reason is not None for output in outputs)


def check_count(num_tokens: int, group: Sequence[Job]) -> None:
    expected = sum(job.num_output_tokens for job in group)
    if num_tokens != expected:
        raise RuntimeError(f"the engine gave {num_tokens} tokens, not {expected}")
