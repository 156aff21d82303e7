"""Compares serving with and without structured output: the same requests, interleaved.

    python -m tests.bench.grammar_bench small --rounds 3 --rows rows.txt

The schema is a list of records that is longer than any answer, so that both kinds of requests get
the same number of tokens. Its grammar is compiled by the warm-up.
"""

import argparse
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.environment import append_row, comparison, header, in_turns, median_and_range
from tests.bench.models import SHAPES, make_adapters, make_model
from tests.bench.server import MODEL, engine_settings, publish, serving, write_config
from tests.bench.serving_bench import Served, serve, workload_of
from tests.bench.workload import TRAFFIC, Job, lengths

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

# name, digits of a median, function that reads it
FIGURES: tuple[tuple[str, int, Callable[[Served], float]], ...] = (
    ("tokens/s", 1, lambda served: served.summary.tokens_per_s),
    ("TTFT p50 ms", 2, lambda served: 1e3 * served.summary.ttft_p50_s),
    ("TPOT p50 ms", 2, lambda served: 1e3 * served.summary.tpot_p50_s),
    ("ITL p99 ms", 2, lambda served: 1e3 * served.summary.itl_p99_s),
)


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must end too
    shape = SHAPES[options.shape]
    source, folders = make_model(shape), make_adapters(shape, options.adapters)
    engine = engine_settings(options.concurrency, options.memory_mib)
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
    jobs = workload_of(options).jobs()
    short = [Job(job.prompt_token_ids, 2, job.adapter) for job in jobs]

    def run(jobs: Sequence[Job], clients: int, more: Mapping[str, Any]) -> Served:
        return serve(url, pid, names, jobs, clients, more=more)

    for more in ({}, STRUCTURED):
        run(short, 8, more)
    plain, structured = (partial(run, jobs, options.concurrency, m) for m in ({}, STRUCTURED))
    return [in_turns(number, plain, structured) for number in range(options.rounds)]


# ==== rows ====


def _conditions(options: argparse.Namespace) -> str:
    return (
        f"{header(options.seed)} | grammar, A plain, B structured | {options.shape} | "
        f"{options.traffic}, {options.concurrency} clients, {options.requests} requests, "
        f"prompt {options.prompt}, output {options.output}, {options.adapters} adapters, "
        f"{options.rounds} rounds"
    )


def _row(rounds: Sequence[tuple[Served, Served]]) -> str:
    figures = [
        f"{name} {comparison([(read(a), read(b)) for a, b in rounds], digits)}"
        for name, digits, read in FIGURES
    ]
    others = median_and_range([each.others for pair in rounds for each in pair], 2)
    return " | ".join([*figures, f"others {others} cores"])


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
