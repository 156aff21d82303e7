"""Compares serving with the engine alone: the same requests with and without HTTP, interleaved.

    python -m tests.bench.serving_bench half --rounds 3 --rows rows.txt

Starts the server with its own configuration and store, publishes the adapters, and runs a closed
loop at each concurrency, in turns with an engine process that gets the same requests by message.
Reports served / own throughput, and the CPU time of each group of processes per streamed token.
"""

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from tests.bench.engine_driver import Run, ThroughProcess
from tests.bench.environment import (
    NoiseMeter,
    append_row,
    cpu_s,
    header,
    median_and_range,
)
from tests.bench.load import Summary, closed_loop
from tests.bench.models import SHAPES, make_adapters, make_model
from tests.bench.server import (
    GROUPS,
    MODEL,
    engine_settings,
    groups_of_processes,
    publish,
    serving,
    write_config,
)
from tests.bench.workload import TRAFFIC, Job, Workload, lengths


@dataclass(frozen=True, slots=True)
class Served:
    summary: Summary
    us_per_token: dict[str, float]  # CPU microseconds, by group of processes
    others: float  # cores that all other processes used


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must end too
    shape = SHAPES[options.shape]
    source, folders = make_model(shape), make_adapters(shape, options.adapters)
    engine = engine_settings(max(options.concurrency), options.memory_mib)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        config = write_config(Path(scratch), source, engine, options.replicas)
        names = [MODEL, *publish(Path(scratch), source, folders)]
        own = ThroughProcess(EngineConfig(source=str(source), **engine), folders)
        try:
            with serving(config) as (url, pid):
                rounds = measure(options, url, pid, names, own)
        finally:
            own.close()
    conditions = _conditions(options)
    for concurrency, pairs in rounds.items():
        append_row(options.rows, f"{conditions} | {_row(concurrency, pairs)}")
    return 0


def measure(
    options: argparse.Namespace, url: str, pid: int, names: Sequence[str], own: ThroughProcess
) -> dict[int, list[tuple[Served, Run]]]:
    jobs = workload_of(options).jobs()
    short = [Job(job.prompt_token_ids, 2, job.adapter) for job in jobs]
    serve(url, pid, names, short, 8)  # warm up: fetch and read the adapters, touch the memory
    own.run([short], 8)
    rounds: dict[int, list[tuple[Served, Run]]] = {c: [] for c in options.concurrency}
    for number in range(options.rounds):
        for concurrency in options.concurrency:
            # Each goes first in every other round
            if number % 2:
                alone = own.run([jobs], concurrency)
                served = serve(url, pid, names, jobs, concurrency)
            else:
                served = serve(url, pid, names, jobs, concurrency)
                alone = own.run([jobs], concurrency)
            rounds[concurrency].append((served, alone))
    return rounds


def serve(
    url: str,
    server_pid: int,
    names: Sequence[str],
    jobs: Sequence[Job],
    concurrency: int,
    also_ours: Iterable[int] = (),
    more: Mapping[str, Any] | None = None,
) -> Served:
    """Run a closed loop through HTTP. Raises if any request fails: its numbers are void."""
    groups = groups_of_processes(server_pid)
    noise = NoiseMeter([os.getpid(), *groups, *also_ours])
    before = {pid: cpu_s(pid) for pid in groups}
    summary = asyncio.run(closed_loop(url, names, jobs, concurrency, more))
    if summary.num_errors:
        raise RuntimeError(f"{summary.num_errors} requests failed, first: {summary.first_error}")
    used_s = dict.fromkeys(GROUPS, 0.0)
    for pid, group in groups.items():
        used_s[group] += max(cpu_s(pid) - before[pid], 0.0)
    per_token = {group: 1e6 * seconds / summary.num_tokens for group, seconds in used_s.items()}
    return Served(summary, per_token, noise.read().others)


# ==== rows ====


def workload_of(options: argparse.Namespace) -> Workload:
    """Return the requests that a benchmark's options ask for."""
    return Workload(
        options.traffic,
        options.requests,
        options.adapters,
        options.prompt,
        options.output,
        SHAPES[options.shape].vocab_size,
        options.seed,
    )


def _conditions(options: argparse.Namespace) -> str:
    return (
        f"{header(options.seed)} | serving | {options.shape} | {options.traffic}, "
        f"{options.requests} requests, prompt {options.prompt}, output {options.output}, "
        f"{options.adapters} adapters, {options.replicas} replicas, {options.rounds} rounds"
    )


def _row(concurrency: int, pairs: Sequence[tuple[Served, Run]]) -> str:
    served, own = [s for s, _ in pairs], [o for _, o in pairs]
    ratios = [s.summary.tokens_per_s / o.tokens_per_s for s, o in pairs]
    over = [1e3 * (s.summary.ttft_p50_s - o.ttft_p50_s) for s, o in pairs]

    def median_ms(name: str) -> str:
        return median_and_range([1e3 * getattr(s.summary, name) for s in served])

    # The kernel counts in ticks of 10 ms: a mean over all rounds is more precise than a median
    cpu = ", ".join(
        f"{g} {statistics.fmean(s.us_per_token[g] for s in served):.0f}" for g in GROUPS
    )
    return (
        f"concurrency {concurrency}"
        f" | served {median_and_range([s.summary.tokens_per_s for s in served])} tokens/s"
        f" | own {median_and_range([o.tokens_per_s for o in own])} tokens/s"
        f" | served/own {median_and_range(ratios, 2)}"
        f" | TTFT p50 {median_ms('ttft_p50_s')} ms, over the engine's own {median_and_range(over)}"
        f" ms, TPOT p50 {median_ms('tpot_p50_s')} ms, "
        f"ITL p99 {median_ms('itl_p99_s')} ms"
        f" | CPU us/token: {cpu}, "
        f"client {statistics.fmean(s.summary.client_us_per_token for s in served):.0f}"
        f" | others {median_and_range([s.others for s in served], 2)} cores"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serving throughput beside the engine's own.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--traffic", choices=TRAFFIC, default="uniform")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=1, help="of the served engine")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--memory-mib", type=int, default=2048, help="KV and adapters")
    parser.add_argument("--prompt", type=lengths, default=lengths("32-64"))
    parser.add_argument("--output", type=lengths, default=lengths("16-64"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
