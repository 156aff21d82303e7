"""Measures how the size of a step affects throughput and the gaps between a stream's tokens.

    python -m tests.bench.chunk_bench small --tokens 64 128 256 512 --clients 8
    python -m tests.bench.chunk_bench small --tokens 128 --targets off auto 50 --clients 16

Clients in a closed loop send prompts to one engine in this process: each sends its next request as
soon as its last one has ended. The same requests run with every `max_num_batched_tokens` and every
`target_step_ms` in turn, and rows show medians over the rounds. Times are in ms.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import RequestOutput
from engine.scheduler.step_budget import StepBudget
from tests.bench.engine_driver import as_request
from tests.bench.environment import append_row, header
from tests.bench.load import percentile
from tests.bench.models import SHAPES, make_adapters, make_model
from tests.bench.workload import TRAFFIC, Job, Workload, lengths

MIB = 2**20
OFF_S = 3600.0  # no step takes that long
COLUMNS = ("tokens/s", "TTFT p50", "p99", "TPOT p50", "ITL p50", "p95", "p99", "max")


@dataclass(slots=True)
class Clock:
    """Records when requests were sent and tokens arrived, and derives latencies; in seconds."""

    sent: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)
    ttft: dict[str, float] = field(default_factory=dict)
    tpot: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)

    def take(self, output: RequestOutput, num_tokens: int) -> None:
        """Record an output of a request whose whole answer has `num_tokens` tokens."""
        key, now = output.request_id, time.perf_counter()
        if key in self.latest:
            self.itl.append(now - self.latest[key])
        else:
            self.ttft[key] = now - self.sent[key]
        self.latest[key] = now
        if output.finish_reason is not None:
            spent = now - self.sent[key] - self.ttft[key]
            self.tpot.append(spent / (num_tokens - 1))


def main() -> None:
    options = _parse()
    shape = SHAPES[options.shape]
    torch.set_num_threads(options.threads)
    engine = Engine(_config(options, make_model(shape)))
    adapters = make_adapters(shape, options.adapters)
    jobs = Workload(
        options.traffic,
        options.requests or 3 * options.clients,
        options.adapters,
        options.prompt,
        options.output,
        shape.vocab_size,
        options.seed,
    ).jobs()
    kinds = [(size, target) for size in options.tokens for target in options.targets]
    runs: dict[tuple[int, str], list[list[float]]] = {kind: [] for kind in kinds}
    run(engine, adapters, jobs, options.clients)  # warm up: read the adapters, touch the memory
    for _ in range(options.rounds):
        for kind, rows in runs.items():
            _set_step(engine, *kind)
            rows.append(run(engine, adapters, jobs, options.clients))
    append_row(
        options.rows,
        f"{header(options.seed)} | chunks | {shape.name} {options.quantization} | {options.traffic}"
        f" | {options.clients} clients, {len(jobs)} requests, prompt {options.prompt}, "
        f"output {options.output}, {options.rounds} rounds",
    )
    for (size, target), rows in runs.items():
        medians = map(statistics.median, zip(*rows, strict=True))
        figures = ", ".join(f"{n} {m:.1f}" for n, m in zip(COLUMNS, medians, strict=True))
        append_row(options.rows, f"steps of {size} tokens, target {target} | {figures}")


def run(engine: Engine, adapters: list[Path], jobs: list[Job], clients: int) -> list[float]:
    """Run all jobs once; return the figures named in COLUMNS."""
    clock, queue, num_alive = Clock(), list(enumerate(jobs)), 0
    start = time.perf_counter()
    while queue or num_alive:
        while queue and num_alive < clients:
            index, job = queue.pop(0)
            clock.sent[str(index)] = time.perf_counter()
            engine.add_request(as_request(job, str(index), adapters))
            num_alive += 1
        outputs = engine.step()
        for output in outputs:
            clock.take(output, jobs[int(output.request_id)].num_output_tokens)
            num_alive -= output.finish_reason is not None
        if engine.is_idle and not outputs:
            time.sleep(0.0005)  # an adapter is being read
    wall_s = time.perf_counter() - start
    num_tokens = sum(job.num_output_tokens for job in jobs)
    ttft = list(clock.ttft.values())
    milliseconds = [
        *(percentile(ttft, percent) for percent in (50, 99)),
        percentile(clock.tpot, 50),
        *(percentile(clock.itl, percent) for percent in (50, 95, 99, 100)),
    ]
    return [num_tokens / wall_s, *(1e3 * s for s in milliseconds)]


def _set_step(engine: Engine, max_num_batched_tokens: int, target: str) -> None:
    """Set the token limit of a step, for the largest of which the engine was made, and its target
    in ms. What is known of steps' times stays."""
    scheduler = engine.scheduler
    scheduler.limits = replace(scheduler.limits, max_num_batched_tokens=max_num_batched_tokens)
    target_s = {"auto": None, "off": OFF_S}.get(target) if target.isalpha() else float(target) / 1e3
    known, scheduler.step_budget = scheduler.step_budget.times, StepBudget(target_s)
    scheduler.step_budget.times = known


def _config(options: argparse.Namespace, source: Path) -> EngineConfig:
    return EngineConfig(
        source=str(source),
        device="cpu",
        dtype="bfloat16",
        quantization=options.quantization,
        max_num_seqs=options.clients,
        max_num_batched_tokens=max(options.tokens),
        max_model_len=4096,
        memory_bytes=3072 * MIB,
        enable_prefix_caching=False,
        num_threads=options.threads,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput and gaps by the size of a step.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--targets", nargs="+", default=["auto"], help="ms, auto or off")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, help="(default: three for each client)")
    parser.add_argument("--traffic", choices=TRAFFIC, default="base")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--prompt", type=lengths, default=lengths("128"))
    parser.add_argument("--output", type=lengths, default=lengths("64"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
