"""The simulator beside the real engine: the same arrivals give the same batches."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from deployments.simulator.clock import Clock
from deployments.simulator.profile import LoadTimes, Profile
from deployments.simulator.records import Stretch
from deployments.simulator.replica import ReplicaSize, SimulatedReplica
from deployments.simulator.work import work_of
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.profiling.adapters import write_adapter
from engine.scheduler.batch import ScheduledBatch
from engine.scheduler.request import CacheScope, Request, SamplingParams
from engine.scheduler.scheduler import Progress
from tests.engine.support.tiny import VOCAB_SIZE, write_tiny

PROFILE = Profile(load=LoadTimes(0.0, 0.0, 0.0, 0.0))


class Job(NamedTuple):
    name: str
    time_s: float
    prompt: list[int]
    num_outputs: int
    adapter: AdapterFolder | None


class VirtualTime:
    """The engine's clock: each batch takes what the profile says."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.engine: Engine | None = None
        self._charged: ScheduledBatch | None = None
        self._digests: dict[int, str] = {}
        self.sizes: dict[str, int] = {}

    def __call__(self) -> float:
        batch = None if self.engine is None else self.engine.last_batch
        if batch is not None and batch is not self._charged:
            self._charged = batch
            self._digests |= {load.slot: load.digest for load in batch.adapter_loads}
            self.now_s += PROFILE.step_s(work_of(batch, self._digests, self.sizes))
        return self.now_s


class Nobody:
    def on_progress(self, progress: list[Progress]) -> None: ...
    def on_run(self, requests: Sequence[Request], stretch: Stretch) -> None: ...
    def on_end(self, request: Request) -> None: ...


def shown(now_s: float, batch: ScheduledBatch) -> tuple[Any, ...]:
    rows = [
        (r.request_id, len(r.token_ids), r.start, r.block_table, r.adapter_slot, r.samples)
        for r in batch.requests
    ]
    return (now_s, rows, batch.adapter_evictions, batch.moves, batch.adapter_loads)


def make_jobs(adapters: list[AdapterFolder]) -> list[Job]:
    rng, time_s, jobs = Random(5), 0.0, list[Job]()
    shared = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
    for i in range(60):
        time_s += rng.expovariate(40.0)
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))]
        prompt = shared[: rng.randint(1, 40)] + prompt if i % 3 == 0 else prompt
        adapter = rng.choice([None, *adapters])
        jobs.append(Job(f"r{i}", time_s, prompt, rng.randint(1, 40), adapter))
    return jobs


def test_the_same_arrivals_give_the_same_batches(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model").folder
    config = EngineConfig(
        str(model),
        device="cpu",
        max_num_seqs=8,
        max_num_batched_tokens=48,
        block_size=4,
        memory_bytes=3 * 2**17,
        adapter_proof="off",
    )
    time = VirtualTime()
    engine = Engine(config, clock=time)
    time.engine = engine
    sites = engine.model.lora_sites
    adapters = [write_adapter(tmp_path / f"a{i}", sites, 4 + 4 * i, i) for i in range(5)]
    jobs = make_jobs(adapters)
    sizes = time.sizes = {a.digest: engine.loader.load(a).nbytes for a in adapters}
    try:
        real = run_engine(engine, time, jobs, adapters)
    finally:
        engine.close()
    simulated = run_simulator(engine, jobs, sizes)
    assert len(real) > 200 and engine.scheduler.num_preemptions > 0
    assert any(batch[2] for batch in real), "adapters are evicted"
    for a, b in zip(real, simulated, strict=True):
        assert a == b


def run_engine(
    engine: Engine, time: VirtualTime, jobs: list[Job], adapters: list[AdapterFolder]
) -> list[tuple[Any, ...]]:
    for adapter in adapters:
        engine.host.want(adapter)
    while not all(engine.scheduler.adapters.is_ready(a.digest) for a in adapters):
        engine.step()
    waiting, batches = list(reversed(jobs)), list[tuple[Any, ...]]()
    while waiting or engine.scheduler.has_unfinished:
        if not engine.scheduler.has_unfinished:
            time.now_s = max(time.now_s, waiting[-1].time_s)
        while waiting and waiting[-1].time_s <= time.now_s:
            name, _, prompt, num_outputs, adapter = waiting.pop()
            sampling = SamplingParams(max_tokens=num_outputs, temperature=0, ignore_eos=True)
            engine.add_request(GenerateRequest(name, prompt, sampling, adapter_folder=adapter))
        began_s = time.now_s
        engine.step()
        assert engine.last_batch is not None
        batches.append(shown(began_s, engine.last_batch))
    return batches


def run_simulator(engine: Engine, jobs: list[Job], sizes: dict[str, int]) -> list[tuple[Any, ...]]:
    settled, config = engine.settled, engine.config
    size = ReplicaSize(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=settled.max_num_batched_tokens,
        max_model_len=settled.max_model_len,
        block_size=config.block_size,
        block_bytes=settled.block_bytes,
        memory_bytes=settled.memory_bytes,
    )
    clock, batches = Clock(), list[tuple[Any, ...]]()
    replica = SimulatedReplica("r", size, PROFILE, clock, Nobody(), runs_together=False)
    schedule = replica.scheduler.schedule

    def watched(now: float) -> ScheduledBatch | None:
        batch = schedule(now)
        if batch is not None:
            batches.append(shown(now, batch))
        return batch

    replica.scheduler.schedule = watched
    for job in jobs:
        digest = job.adapter.digest if job.adapter else ""
        request = Request(
            job.name,
            job.prompt,
            SamplingParams(max_tokens=job.num_outputs, ignore_eos=True),
            job.time_s,
            scope=CacheScope("", "", digest),
        )
        clock.at(job.time_s, lambda r=request, d=digest: replica.submit(r, sizes.get(d, 0)))
    clock.run(lambda: False)
    return batches
