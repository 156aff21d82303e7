"""Compares serving with and without structured output: the same requests, interleaved.

    python -m tests.bench.grammar_bench small --rounds 3 --rows rows.txt

The schema is a list of records that is longer than any answer, so that both kinds of requests get
the same number of tokens. Its grammar is compiled by the warm-up.
"""

import argparse
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench.environment import append_row, header, median_and_range
from tests.bench.load import Summary
from tests.bench.models import SHAPES, make_adapters, make_model
from tests.bench.server import MODEL, publish, serving, write_config
from tests.bench.serving_bench import MIB, Served, serve
from tests.bench.workload import TRAFFIC, Job, Workload, lengths

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "kind", "count", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 500}
STRUCTURED: dict[str, Any] = {"ignore_eos": False, "structured_outputs": {"json": SCHEMA}}


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must end too
    shape = SHAPES[options.shape]
    source, folders = make_model(shape), make_adapters(shape, options.adapters)
    engine = {
        "device": "auto",
        "max_num_seqs": options.concurrency,
        "max_model_len": 2048,
        "memory_bytes": options.memory_mib * MIB,
        "enable_prefix_caching": False,  # rounds repeat their prompts
        "num_threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        config = write_config(Path(scratch), source, engine)
        names = [MODEL, *publish(Path(scratch), source, folders)]
        with serving(config) as (url, pid):
            rounds = measure(options, url, pid, names)
    append_row(options.rows, f"{_conditions(options)} | {_row(rounds)}")
    return 0


def measure(
    options: argparse.Namespace, url: str, pid: int, names: Sequence[str]
) -> list[tuple[Served, Served]]:
    """Run both kinds in turns; return pairs of (plain, structured)."""
    jobs = _workload(options).jobs()
    short = [Job(job.prompt_token_ids, 2, job.adapter) for job in jobs]
    for more in ({}, STRUCTURED):
        serve(url, pid, names, short, 8, more=more)
    rounds: list[tuple[Served, Served]] = []
    for number in range(options.rounds):
        kinds = [{}, STRUCTURED] if number % 2 else [STRUCTURED, {}]
        served = [serve(url, pid, names, jobs, options.concurrency, more=more) for more in kinds]
        plain, structured = served if number % 2 else reversed(served)
        rounds.append((plain, structured))
    return rounds


# ==== rows ====


def _workload(options: argparse.Namespace) -> Workload:
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
        f"{header(options.seed)} | grammar | {options.shape} | {options.traffic}, "
        f"{options.concurrency} clients, {options.requests} requests, prompt {options.prompt}, "
        f"output {options.output}, {options.adapters} adapters, {options.rounds} rounds"
    )


def _row(rounds: Sequence[tuple[Served, Served]]) -> str:
    pairs = [(plain.summary, structured.summary) for plain, structured in rounds]
    parts = [
        _compared("tokens/s", "tokens_per_s", pairs, 1.0),
        _compared("TTFT p50 ms", "ttft_p50_s", pairs, 1e3),
        _compared("TPOT p50 ms", "tpot_p50_s", pairs, 1e3),
        _compared("ITL p99 ms", "itl_p99_s", pairs, 1e3),
    ]
    others = median_and_range([each.others for pair in rounds for each in pair], 2)
    return " | ".join([*parts, f"others {others} cores"])


def _compared(label: str, name: str, pairs: Sequence[tuple[Summary, Summary]], scale: float) -> str:
    plain = [scale * getattr(a, name) for a, _ in pairs]
    structured = [scale * getattr(b, name) for _, b in pairs]
    ratios = [b / a for a, b in zip(plain, structured, strict=True)]
    return (
        f"{label} plain {median_and_range(plain)}, structured {median_and_range(structured)}, "
        f"ratio {median_and_range(ratios, 3)}"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What structured output costs.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--traffic", choices=TRAFFIC, default="uniform")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--memory-mib", type=int, default=2048, help="KV and adapters")
    parser.add_argument("--prompt", type=lengths, default=lengths("32-64"))
    parser.add_argument("--output", type=lengths, default=lengths("64"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
