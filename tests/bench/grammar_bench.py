"""Compares serving with and without structured output: the same requests, interleaved.

    python -m tests.bench.grammar_bench small --rounds 3 --rows rows.txt
    python -m tests.bench.grammar_bench small --jumps --schema names      # see below

The schema is a list of records that is longer than any answer, so that both kinds of requests get
the same number of tokens. Its grammar is compiled by the warm-up.

With --jumps both kinds are structured, and come from two engines of one server: one samples each
token, the other one appends those that the grammar leaves no choice of.
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
NAMES = (
    "customer_identification_number",
    "shipping_address_line_one",
    "preferred_contact_method",
    "date_of_last_modification",
)
LONG_NAMES = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 12} for name in NAMES},
    "required": NAMES,
    "additionalProperties": False,
}
ITEMS: dict[str, dict[str, Any]] = {"records": RECORD, "names": LONG_NAMES}
SAMPLING = "sampling"  # id of the engine that samples each token

Kind = tuple[str, Mapping[str, Any]]  # the base that is asked, and fields of every body

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
    others = {SAMPLING: {**engine, "enable_jump_ahead": False}} if options.jumps else {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        config = write_config(Path(scratch), source, engine, others=others)
        adapters = publish(Path(scratch), source, folders)
        with serving(config) as (url, pid):
            rounds = measure(options, url, pid, adapters)
    append_row(options.rows, f"{_conditions(options)} | {_row(rounds)}")
    return 0


def measure(
    options: argparse.Namespace, url: str, pid: int, adapters: Sequence[str]
) -> list[tuple[Served, Served]]:
    """Run both kinds in turns; return pairs of (A, B)."""
    jobs = workload_of(options).jobs()
    short = [Job(job.prompt_token_ids, 2, job.adapter) for job in jobs]

    def run(kind: Kind, jobs: Sequence[Job], clients: int) -> Served:
        base, more = kind
        names = [base, *(f"{base}:{adapter}" for adapter in adapters)]
        return serve(url, pid, names, jobs, clients, more=more)

    kinds = _kinds(options)
    for kind in kinds:
        run(kind, short, 8)
    a, b = (partial(run, kind, jobs, options.concurrency) for kind in kinds)
    return [in_turns(number, a, b) for number in range(options.rounds)]


def _kinds(options: argparse.Namespace) -> tuple[Kind, Kind]:
    schema = {"type": "array", "items": ITEMS[options.schema], "minItems": 500}
    structured = {"ignore_eos": False, "structured_outputs": {"json": schema}}
    first = (SAMPLING, structured) if options.jumps else (MODEL, {})
    return first, (MODEL, structured)


# ==== rows ====


def _conditions(options: argparse.Namespace) -> str:
    kinds = "A each token sampled, B jumps" if options.jumps else "A plain, B structured"
    return (
        f"{header(options.seed)} | grammar, {kinds} | {options.schema} | {options.shape} | "
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
    parser.add_argument("--schema", choices=ITEMS, default="records")
    parser.add_argument("--jumps", action="store_true", help="what jumping ahead saves")
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
