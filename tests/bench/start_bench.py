"""Compares the starts of two checkouts' servers: time to the first answer, and memory then.

    python -m tests.bench.start_bench tiny ../before . --rounds 4

Each is started as its own `make serve` does, in turns, one at a time, with the same model and
adapters; a first start of both, which writes caches, is not counted. Memory is that of all its
processes: what they share is divided among them (Pss).
"""

import argparse
import asyncio
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.environment import (
    append_row,
    commit,
    comparison,
    header,
    in_turns,
)
from tests.bench.load import closed_loop
from tests.bench.models import SHAPES, make_adapters, make_model
from tests.bench.pair import Side, make_side
from tests.bench.server import engine_settings, groups_of_processes, serving
from tests.bench.workload import Job


@dataclass(frozen=True, slots=True)
class Start:
    """One start, until the base and each adapter have answered once."""

    first_answer_s: float
    pss_mib: float
    processes: int


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must end too
    conditions = header(0, f"A {commit(options.a)}, B {commit(options.b)}")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        a, b = (
            partial(start, _side(options, Path(scratch) / name, checkout))
            for name, checkout in (("a", options.a), ("b", options.b))
        )
        in_turns(0, a, b)
        pairs = [in_turns(number, a, b) for number in range(options.rounds)]
    setting = f"start | {options.shape}, {options.adapters} adapters, {options.rounds} rounds"
    append_row(options.rows, f"{conditions} | {setting} | {_row(pairs)}")
    return 0


def start(side: Side) -> Start:
    began_s = time.monotonic()
    with serving(side.config, side.checkout, side.command) as (url, pid):
        answer(url, side.names[:1])
        first_answer_s = time.monotonic() - began_s
        answer(url, side.names)
        processes = groups_of_processes(pid)
        return Start(first_answer_s, sum(map(pss_mib, processes)), len(processes))


def answer(url: str, names: Sequence[str]) -> None:
    jobs = [Job([1, 2, 3], 2, None), *(Job([1, 2, 3], 2, i) for i in range(len(names) - 1))]
    summary = asyncio.run(closed_loop(url, names, jobs, 1))
    if summary.num_errors:
        raise RuntimeError(f"a request failed: {summary.first_error}")


def pss_mib(pid: int) -> float:
    """Return the process's share of memory; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _side(options: argparse.Namespace, folder: Path, checkout: Path) -> Side:
    shape = SHAPES[options.shape]
    source, adapters = make_model(shape), make_adapters(shape, options.adapters)
    return make_side(folder, checkout, source, adapters, engine_settings(16, 256))


def _row(pairs: Sequence[tuple[Start, Start]]) -> str:
    figures = (
        ("s to the first answer", 2, lambda start: start.first_answer_s),
        ("Pss MiB", 0, lambda start: start.pss_mib),
        ("processes", 0, lambda start: start.processes),
    )
    return " | ".join(
        f"{name} {comparison([(read(a), read(b)) for a, b in pairs], digits)}"
        for name, digits, read in figures
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Starts of two checkouts' servers, in turns.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("a", type=Path, help="the first checkout, with its own .venv")
    parser.add_argument("b", type=Path, help="the second")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
