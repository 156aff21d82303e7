"""Measures the engine without HTTP: three ways of batching and several traffics, interleaved.

    python -m tests.bench.engine_bench half --modes continuous --traffic base distinct --rounds 5

    batch1       one request at a time
    static       batches of --batch that wait for their slowest request
    continuous   a new request starts as soon as one has ended

Every round runs each combination once, so that other load on the machine affects all equally; the
rows show medians over the rounds.
"""

import argparse
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from engine.config import EngineConfig
from tests.bench.engine_driver import DRIVERS, Driver, Run
from tests.bench.environment import append_row, header, median_and_range
from tests.bench.models import SHAPES, make_adapters, make_model
from tests.bench.workload import TRAFFIC, Job, Workload, lengths

MODES = ("batch1", "static", "continuous")
MIB = 2**20
Case = tuple[str, str]  # (mode, traffic)


def main() -> None:
    options = _parse()
    shape = SHAPES[options.shape]
    adapters = make_adapters(shape, options.adapters)
    config = engine_config(make_model(shape), options.batch, options.adapter_mib * MIB)
    driver = DRIVERS[options.through](config, adapters)
    try:
        runs = measure(driver, options)
    finally:
        driver.close()
    conditions = _conditions(options)
    for text in [*(_row(case, runs[case]) for case in runs), *_ratios(runs)]:
        append_row(options.rows, f"{conditions} | {text}")


def engine_config(source: Path, max_num_seqs: int, adapter_bytes: int) -> EngineConfig:
    """Make a config without prefix cache: rounds repeat their prompts and must compute them all."""
    return EngineConfig(
        source=str(source),
        max_num_seqs=max_num_seqs,
        max_model_len=2048,
        memory_bytes=adapter_bytes + 1024 * MIB,
        adapter_memory_bytes=adapter_bytes,
        enable_prefix_caching=False,
        num_threads=torch.get_num_threads(),
    )


def measure(driver: Driver, options: argparse.Namespace) -> dict[Case, list[Run]]:
    cases = list(product(options.modes, options.traffic))
    jobs = {traffic: workload(options, traffic).jobs() for traffic in options.traffic}
    for traffic in options.traffic:  # warm up: read the adapters, touch the memory
        driver.run([[_short(job) for job in jobs[traffic]]], options.batch)
    runs: dict[Case, list[Run]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for mode, traffic in cases:
            runs[mode, traffic].append(_run(driver, mode, jobs[traffic], options.batch))
    return runs


def workload(options: argparse.Namespace, traffic: str) -> Workload:
    return Workload(
        traffic,
        options.requests,
        options.adapters,
        options.prompt,
        options.output,
        SHAPES[options.shape].vocab_size,
        options.seed,
    )


def _run(driver: Driver, mode: str, jobs: Sequence[Job], batch: int) -> Run:
    if mode == "static":
        groups = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
        return driver.run(groups, batch)
    return driver.run([jobs], 1 if mode == "batch1" else batch)


def _short(job: Job) -> Job:
    return Job(job.prompt_token_ids, min(job.num_output_tokens, 2), job.adapter)


# ==== rows ====


def _conditions(options: argparse.Namespace) -> str:
    return (
        f"{header(options.seed)} | engine through {options.through} | {options.shape}"
        f" | {options.requests} requests, batch {options.batch}, prompt {options.prompt}, "
        f"output {options.output}, {options.adapters} adapters, {options.rounds} rounds"
    )


def _row(case: Case, runs: list[Run]) -> str:
    mode, traffic = case
    per_cpu_s = [run.num_tokens / run.cpu_s for run in runs]
    return (
        f"{mode} {traffic}"
        f" | {median_and_range([run.tokens_per_s for run in runs])} tokens/s"
        f" | {median_and_range([run.mean_step_ms for run in runs])} ms/step"
        f" | {median_and_range(per_cpu_s)} tokens/CPU s"
        f" | others {statistics.median(run.others for run in runs):.2f} cores"
    )


def _ratios(runs: dict[Case, list[Run]]) -> list[str]:
    """Compare within each round, then take the median: runs of one round had equal conditions."""
    texts: list[str] = []
    for mode, traffic in runs:
        if traffic != "base" and (mode, "base") in runs:
            texts.append(_ratio(runs, (mode, traffic), (mode, "base")))
        if mode == "continuous":
            others = [m for m in ("batch1", "static") if (m, traffic) in runs]
            texts += [_ratio(runs, (mode, traffic), (other, traffic)) for other in others]
    return texts


def _ratio(runs: dict[Case, list[Run]], upper: Case, lower: Case) -> str:
    pairs = list(zip(runs[upper], runs[lower], strict=True))
    by_time = [a.tokens_per_s / b.tokens_per_s for a, b in pairs]
    by_cpu = [(a.num_tokens / a.cpu_s) / (b.num_tokens / b.cpu_s) for a, b in pairs]
    names = f"{' '.join(upper)} / {' '.join(lower)}"
    return f"{names} = {median_and_range(by_time, 2)} by time, {median_and_range(by_cpu, 2)} by CPU"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of the engine without HTTP.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--through", choices=DRIVERS, default="call")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--traffic",
        nargs="+",
        choices=TRAFFIC,
        default=["base", "identical", "distinct", "uniform", "mixed"],
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--adapter-mib", type=int, default=512)
    parser.add_argument("--prompt", type=lengths, default=lengths("32-64"))
    parser.add_argument("--output", type=lengths, default=lengths("8-64"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
