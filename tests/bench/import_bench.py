"""Measures the time to import in a fresh process: one checkout against another, in turns.

    python -m tests.bench.import_bench ../before . --rounds 15

Each process is the checkout's own .venv/bin/python in the checkout's folder. Wall time includes
the start of the interpreter; CPU time covers all threads.
"""

import argparse
import os
import resource
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.environment import append_row, commit, comparison, header, in_turns

STATEMENTS = ("import deployments.app", "import engine.process; import engine.engine")


@dataclass(frozen=True, slots=True)
class Import:
    wall_ms: float
    cpu_ms: float


def main() -> int:
    options = _parse()
    conditions = header(0, f"A {commit(options.a)}, B {commit(options.b)}")
    for statement in options.statements:
        pairs = measure(options.a, options.b, statement, options.rounds)
        setting = f"import | {statement} | {options.rounds} rounds"
        append_row(options.rows, f"{conditions} | {setting} | {_row(pairs)}")
    return 0


def measure(a: Path, b: Path, statement: str, rounds: int) -> list[tuple[Import, Import]]:
    of_a, of_b = partial(fresh_import, a, statement), partial(fresh_import, b, statement)
    in_turns(0, of_a, of_b)  # warm up: writes the byte code, reads the files
    return [in_turns(number, of_a, of_b) for number in range(rounds)]


def fresh_import(checkout: Path, statement: str) -> Import:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # empty: byte code is written
    command = [str(checkout.absolute() / ".venv/bin/python"), "-c", statement]
    start_s, start_cpu_s = time.perf_counter(), _children_cpu_s()
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    wall_s, used_s = time.perf_counter() - start_s, _children_cpu_s() - start_cpu_s
    return Import(1e3 * wall_s, 1e3 * used_s)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _row(pairs: list[tuple[Import, Import]]) -> str:
    wall = comparison([(a.wall_ms, b.wall_ms) for a, b in pairs], 0)
    cpu = comparison([(a.cpu_ms, b.cpu_ms) for a, b in pairs], 0)
    return f"wall ms {wall} | CPU ms {cpu}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Import time of two checkouts, in turns.")
    parser.add_argument("a", type=Path, help="the first checkout, with its own .venv")
    parser.add_argument("b", type=Path, help="the second")
    parser.add_argument("--statements", nargs="+", default=STATEMENTS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
