"""Measures steps over many sizes, the reading of adapters, and the start of the engine."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import AdapterFolder
from engine.profiling.adapters import write_adapter
from engine.profiling.traffic import Phase, StepSample, Traffic
from engine.profiling.turns import Turns

RANKS = (8, 64)
NUM_READS = 3  # of each adapter
PAUSE_S = 3e-3  # after which an engine's threads sleep
WARM_UP = 0.1  # of the time, at the beginning


class ReadSample(NamedTuple):
    """An adapter's bytes on the device, and the seconds from its files to host memory."""

    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    steps: list[StepSample]
    reads: list[ReadSample]
    start_s: float  # of the engine, in a process that has imported it
    engine: "EngineFacts"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What of the engine a simulation needs to know."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    block_bytes: int
    memory_bytes: int
    host_bytes: int


def measure(
    config: EngineConfig,
    folder: Path,
    *,
    seconds: float,
    num_adapters: int = 8,
    ranks: Sequence[int] = RANKS,
    seed: int = 0,
    watch: Callable[[int], object] = lambda _: None,
) -> Measured:
    """Start the engine and measure for so long; `watch` is called with 1 for each phase.

    Adapters of random numbers are written into `folder`, which must be empty. They are not proven.
    """
    began_s = time.perf_counter()
    turns = Turns(config)
    start_s, engine = time.perf_counter() - began_s, turns.engine
    try:
        adapters = [
            write_adapter(folder / f"a{i}", engine.model.lora_sites, ranks[i % len(ranks)], i)
            for i in range(num_adapters)
        ]
        series = list(make_phases(engine, adapters))
        num_phases = sum(map(len, series))
        traffic = Traffic(turns, seed)
        _warm_up(traffic, adapters, seconds * WARM_UP)
        for phases in series:
            for phase in phases:
                traffic.run(phase, seconds * (1 - WARM_UP) / num_phases)
                watch(1)
            traffic.stop()
        reads = [_read(engine, adapter) for adapter in adapters for _ in range(NUM_READS)]
        return Measured(traffic.samples, reads, start_s, facts_of(engine))
    finally:
        turns.close()


def num_phases(config: EngineConfig) -> int:
    """Return how often `measure` calls `watch`."""
    return 3 * len(_ladder(config.max_num_seqs)) + 2


def make_phases(engine: Engine, adapters: Sequence[AdapterFolder]) -> Iterator[list[Phase]]:
    """Yield phases that follow each other with ever more requests: without adapters, with one, with
    all; one of prompts alone; and one of an engine that is idle in between.

    Prompts are short and long in turn, so that the context is known apart from the rows.
    """
    longest = min(engine.settled.max_model_len, 2048)
    short, long = max(longest // 32, 2), max(longest // 2, 4)
    output = (short // 2 + 1, 2 * short)
    kinds: list[Sequence[AdapterFolder | None]] = [[None], [adapters[0]], [None, *adapters]]
    for kind in kinds:
        yield [
            Phase(count, (2, long if i % 2 else 4 * short), output, kind)
            for i, count in enumerate(_ladder(engine.config.max_num_seqs))
        ]
    yield [Phase(1, (2, long), (1, 1), [None, adapters[0]])]
    yield [Phase(2, (2, 4 * short), (1, 4), [None, *adapters], PAUSE_S)]


def _ladder(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return [*counts, most] if most > counts[-1] else counts


def _warm_up(traffic: Traffic, adapters: Sequence[AdapterFolder], seconds: float) -> None:
    traffic.run(Phase(4, (2, 16), (2, 8), [None, *adapters]), seconds)
    traffic.stop()
    traffic.samples.clear()


def _read(engine: Engine, adapter: AdapterFolder) -> ReadSample:
    began_s = time.perf_counter()
    loaded = engine.loader.load(adapter)
    return ReadSample(loaded.nbytes, time.perf_counter() - began_s)


def facts_of(engine: Engine) -> EngineFacts:
    settled, config = engine.settled, engine.config
    return EngineFacts(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=settled.max_num_batched_tokens,
        max_model_len=settled.max_model_len,
        block_size=config.block_size,
        block_bytes=settled.block_bytes,
        memory_bytes=settled.memory_bytes,
        host_bytes=config.host_adapter_bytes,
    )
