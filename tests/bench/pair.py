"""Compares two checkouts: the same requests through the servers of both, in turns.

    python -m tests.bench.pair tiny ../before . --starts 3 --rounds 4 --rows rows.txt

Starts each checkout's own server in its own folder with its own environment, both with the same
model, adapters and engine settings, and runs closed loops through A, B, B, A, ... Prints one line
for each traffic and number of clients. Both servers stay up meanwhile, so the idle one costs the
other a little; with more starts the range shows how much single starts differ.
"""

import argparse
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.environment import (
    append_row,
    commit,
    comparison,
    header,
    in_turns,
    median_and_range,
)
from tests.bench.models import SHAPES, make_adapters, make_model
from tests.bench.server import (
    GROUPS,
    MODEL,
    command_of_make,
    engine_settings,
    groups_of_processes,
    publish,
    serving,
    write_config,
)
from tests.bench.serving_bench import Served, serve
from tests.bench.workload import TRAFFIC, Job, Workload, lengths

# name, digits of a median, function that reads it
FIGURES: tuple[tuple[str, int, Callable[[Served], float]], ...] = (
    ("tokens/s", 1, lambda served: served.summary.tokens_per_s),
    ("TTFT p50 ms", 2, lambda served: 1e3 * served.summary.ttft_p50_s),
    ("TTFT p99 ms", 2, lambda served: 1e3 * served.summary.ttft_p99_s),
    ("ITL p99 ms", 2, lambda served: 1e3 * served.summary.itl_p99_s),
    ("CPU us/token beside the engine", 0, lambda served: _beside_engine(served)),
    ("CPU us/token of the engine", 0, lambda served: served.us_per_token["engine"]),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the result: these requests with this many clients."""

    traffic: str
    clients: int
    requests: int


@dataclass(frozen=True, slots=True)
class Side:
    """One checkout, with a configuration and a store for its server alone."""

    checkout: Path
    command: str
    config: Path
    names: list[str]  # model names of the base and the adapters, for requests


@dataclass(frozen=True, slots=True)
class Server:
    side: Side
    url: str
    pid: int


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers must end too
    conditions = header(options.seed, f"A {commit(options.a)}, B {commit(options.b)}")
    pairs: dict[Case, list[tuple[Served, Served]]] = {case: [] for case in _cases(options)}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        sides = _sides(options, Path(scratch))
        for number in range(options.starts):
            with ExitStack() as stack:
                servers = _start(stack, sides, number)
                _measure(options, servers, pairs)
    for case, measured in pairs.items():
        append_row(options.rows, f"{conditions} | {_setting(options, case)} | {_row(measured)}")
    return 0


# ==== the servers ====


def _sides(options: argparse.Namespace, scratch: Path) -> tuple[Side, Side]:
    shape = SHAPES[options.shape]
    source, folders = make_model(shape), make_adapters(shape, options.adapters)
    engine = engine_settings(max(options.clients), options.memory_mib)

    def side(name: str, checkout: Path, command: str | None) -> Side:
        return make_side(scratch / name, checkout, source, folders, engine, command)

    return side("a", options.a, options.a_command), side("b", options.b, options.b_command)


def make_side(
    folder: Path,
    checkout: Path,
    source: Path,
    adapters: Sequence[Path],
    engine: dict[str, Any],
    command: str | None = None,
) -> Side:
    """Publish the adapters in a new folder; without a `command`, `make serve` says how to start."""
    folder.mkdir()
    names = [MODEL, *publish(folder, source, adapters)]
    config = write_config(folder, source, engine)
    return Side(checkout, command or command_of_make(checkout), config, names)


def _start(stack: ExitStack, sides: tuple[Side, Side], number: int) -> tuple[Server, Server]:
    def start(side: Side) -> Server:
        server = serving(side.config, side.checkout, side.command)
        url, pid = stack.enter_context(server)
        missing = set(GROUPS) - set(groups_of_processes(pid).values())
        if missing:
            raise RuntimeError(f"no process of {side.checkout} is known as {sorted(missing)}")
        return Server(side, url, pid)

    return in_turns(number, partial(start, sides[0]), partial(start, sides[1]))


# ==== the turns ====


def _measure(
    options: argparse.Namespace,
    servers: tuple[Server, Server],
    pairs: dict[Case, list[tuple[Served, Served]]],
) -> None:
    a, b = servers
    for server, idle in ((a, b), (b, a)):
        for jobs in _warm_up(options):
            _turn(server, idle, jobs, max(options.clients))
    for number in range(options.rounds):
        for case, measured in pairs.items():
            jobs = _jobs(options, case)
            turn_a = partial(_turn, a, b, jobs, case.clients)
            turn_b = partial(_turn, b, a, jobs, case.clients)
            measured.append(in_turns(number, turn_a, turn_b))


def _turn(server: Server, idle: Server, jobs: Sequence[Job], clients: int) -> Served:
    others = groups_of_processes(idle.pid)
    return serve(server.url, server.pid, server.side.names, jobs, clients, others)


def _warm_up(options: argparse.Namespace) -> Iterator[list[Job]]:
    """Yield short jobs that load the adapters, touch the memory and run all batch sizes."""
    for case in _cases(options):
        yield [Job(job.prompt_token_ids, 4, job.adapter) for job in _jobs(options, case)]


def _cases(options: argparse.Namespace) -> list[Case]:
    counts = list(zip(options.clients, options.requests, strict=True))
    return [Case(traffic, *count) for traffic in options.traffic for count in counts]


def _jobs(options: argparse.Namespace, case: Case) -> list[Job]:
    vocab_size = SHAPES[options.shape].vocab_size
    return Workload(
        case.traffic,
        case.requests,
        options.adapters,
        options.prompt,
        options.output,
        vocab_size,
        options.seed,
    ).jobs()


# ==== rows ====


def _setting(options: argparse.Namespace, case: Case) -> str:
    return (
        f"pair | {options.shape} | {case.traffic}, {case.clients} clients, "
        f"{case.requests} requests, prompt {options.prompt}, output {options.output}, "
        f"{options.adapters} adapters, {options.starts} starts of {options.rounds} rounds"
    )


def _row(measured: Sequence[tuple[Served, Served]]) -> str:
    figures = [
        f"{name} {comparison([(read(a), read(b)) for a, b in measured], digits)}"
        for name, digits, read in FIGURES
    ]
    others = [served.others for pair in measured for served in pair]
    return " | ".join([*figures, f"others {median_and_range(others, 2)} cores"])


def _beside_engine(served: Served) -> float:
    return sum(used for group, used in served.us_per_token.items() if group != "engine")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Served throughput of two checkouts, in turns.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("a", type=Path, help="the first checkout, with its own .venv")
    parser.add_argument("b", type=Path, help="the second")
    command = "its server, with {config} and {port} (default: what its `make serve` runs)"
    parser.add_argument("--a-command", help=command)
    parser.add_argument("--b-command", help=command)
    parser.add_argument("--traffic", choices=TRAFFIC, nargs="+", default=["base", "distinct"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 96], help="by clients")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--memory-mib", type=int, default=1024, help="KV and adapters")
    parser.add_argument("--prompt", type=lengths, default=lengths("32-64"))
    parser.add_argument("--output", type=lengths, default=lengths("16-64"))
    parser.add_argument("--starts", type=int, default=3, help="of both servers")
    parser.add_argument("--rounds", type=int, default=4, help="in each start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    if len(options.clients) != len(options.requests):
        parser.error("--clients and --requests must be as many")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
