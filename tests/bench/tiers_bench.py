"""Measures what adapters cost that do not all fit on the device, and that come from S3.

    python -m tests.bench.tiers_bench crowded small --traffic skewed
    python -m tests.bench.tiers_bench loads small
    python -m tests.bench.on_swift tiers_bench cold small

`crowded` serves the same requests with room for all adapters and for a quarter of them, in an open
loop at a part of what the first can do. `loads` looks at the gaps in streams of adapters that are
on the device, with and without others that are loaded one after the other. `cold` asks for adapters
that lie in S3 alone, and fetches each once more by itself.
"""

import argparse
import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapter_store.layout import WEIGHTS_NAME
from adapter_store.open_store import endpoint_from, open_store
from adapter_store.store import AdapterStore
from tests.bench.environment import NoiseMeter, append_row, header, median_and_range
from tests.bench.load import Summary, as_line, closed_loop, open_loop
from tests.bench.models import SHAPES, Shape, make_adapters, make_model
from tests.bench.server import (
    MODEL,
    TENANT,
    engine_settings,
    groups_of_processes,
    publish,
    serving,
    write_config,
)
from tests.bench.workload import Job, Workload, lengths

NUM_STREAMS = 4  # on adapters that are on the device, in `loads`
LOADED = 0.7  # of what the server can do, in `crowded`


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must end too
    shape = SHAPES[options.shape]
    source = make_model(shape)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        MODES[options.mode](options, shape, source, Path(scratch))
    return 0


# ==== more adapters than there is room for ====


def crowded(options: argparse.Namespace, shape: Shape, source: Path, scratch: Path) -> None:
    folders = make_adapters(shape, options.adapters, [options.rank])
    names = [MODEL, *publish(scratch, source, folders)]
    jobs = _jobs(options, shape, options.traffic, options.requests)
    everybody = _jobs(options, shape, "distinct", 2 * options.adapters)
    found: dict[int, Summary] = {}
    rate = 0.0
    for room in (options.adapters, options.room):
        config = write_config(scratch, source, _engine(options, _bytes_of(folders[0]) * room))
        with serving(config) as (url, pid):
            asyncio.run(closed_loop(url, names, everybody, options.concurrency))
            if not rate:
                busy = asyncio.run(closed_loop(url, names, jobs, options.concurrency))
                rate = LOADED * busy.requests_per_s
            noise = _noise(pid)
            found[room] = asyncio.run(open_loop(url, names, jobs, rate, options.seed))
            others = noise.read().others
        _check(found[room])
        row = f"room for {room} | {rate:.2f} requests/s asked | {as_line(found[room])}"
        append_row(options.rows, f"{_conditions(options)} | {row} | others {others:.2f}")
    tight, wide = found[options.room], found[options.adapters]
    row = (
        f"room for {options.room} / for all: median TTFT {tight.ttft_p50_s / wide.ttft_p50_s:.2f} x"
        f", p99 {tight.ttft_p99_s / wide.ttft_p99_s:.2f} x"
        f", p99 ITL {tight.itl_p99_s / wide.itl_p99_s:.2f} x"
    )
    append_row(options.rows, f"{_conditions(options)} | {row}")


# ==== others that are loaded ====


def loads(options: argparse.Namespace, shape: Shape, source: Path, scratch: Path) -> None:
    folders = make_adapters(shape, options.adapters, [options.rank])
    names = [MODEL, *publish(scratch, source, folders)]
    config = write_config(scratch, source, _engine(options, _bytes_of(folders[0]) * options.room))
    workload = _jobs(options, shape, "distinct", options.requests)
    resident = [
        Job(job.prompt_token_ids, job.num_output_tokens, n % NUM_STREAMS)
        for n, job in enumerate(workload)
    ]
    ratios: list[float] = []
    rates: list[float] = []
    with serving(config) as (url, pid):
        everybody = _jobs(options, shape, "distinct", options.adapters)
        asyncio.run(closed_loop(url, names, everybody, options.concurrency))
        asyncio.run(closed_loop(url, names, resident, NUM_STREAMS))
        noise = _noise(pid)
        for _ in range(options.rounds):
            quiet = asyncio.run(closed_loop(url, names, resident, NUM_STREAMS))
            busy, rate = asyncio.run(_beside_loads(url, names, resident, options, shape))
            _check(quiet)
            _check(busy)
            ratios.append(busy.itl_p99_s / quiet.itl_p99_s)
            rates.append(rate)
        others = noise.read().others
    row = f"p99 ITL beside loads {median_and_range(ratios, 3)} x alone"
    row += f" | {median_and_range(rates)} loads/s | others {others:.2f}"
    append_row(options.rows, f"{_conditions(options)} | {row}")


async def _beside_loads(
    url: str,
    names: Sequence[str],
    resident: Sequence[Job],
    options: argparse.Namespace,
    shape: Shape,
) -> tuple[Summary, float]:
    """Stream on adapters that stay, while others are asked for a token, one after the other."""
    num_loads = 0
    prompt = _jobs(options, shape, "base", 1)[0].prompt_token_ids[:1]

    async def load_others() -> None:
        nonlocal num_loads
        while True:
            for adapter in range(NUM_STREAMS, options.adapters):
                await closed_loop(url, names, [Job(prompt, 1, adapter)], 1)
                num_loads += 1

    loading = asyncio.create_task(load_others())
    summary = await closed_loop(url, names, resident, NUM_STREAMS)
    loading.cancel()
    with suppress(asyncio.CancelledError):
        await loading
    return summary, num_loads / summary.wall_s


# ==== from S3 ====


def cold(options: argparse.Namespace, shape: Shape, source: Path, scratch: Path) -> None:
    root = f"{options.root}/{os.getpid()}"
    endpoint = endpoint_from(os.environ, root)
    folders = make_adapters(shape, options.rounds + 1, [options.rank])
    store = AdapterStore(root, scratch / "publisher", 2**30, endpoint_url=endpoint)
    base = store.register_base(source)
    refs = [store.publish(folder, TENANT, folder.name, base) for folder in folders]
    config = write_config(scratch, source, _engine(options, _bytes_of(folders[0]) * 64), root=root)
    job = Job(_jobs(options, shape, "base", 1)[0].prompt_token_ids, 1, 0)
    ratios: list[float] = []
    objects = open_store(root, endpoint, read_only=True)
    names = [ref.name for ref in refs]
    with serving(config) as (url, pid):
        noise = _noise(pid)
        for number, ref in enumerate(refs):
            began_s = time.perf_counter()
            objects.get_file(f"blobs/{ref.digest}/{WEIGHTS_NAME}", scratch / "fetched")
            alone_s = time.perf_counter() - began_s
            asked = asyncio.run(closed_loop(url, [MODEL, names[number]], [job], 1))
            _check(asked)
            if number:  # the first one warms up
                ratios.append(asked.ttft_p50_s / alone_s)
        others = noise.read().others
    nbytes = statistics.mean(_bytes_of(folder) for folder in folders) / 1e6
    row = f"{nbytes:.0f} MB | first token {median_and_range(ratios, 2)} x its fetch alone"
    row += f", the last {alone_s:.2f} s | others {others:.2f}"
    append_row(options.rows, f"{_conditions(options)} | {row}")


# ==== what they share ====


def _engine(options: argparse.Namespace, adapter_bytes: int) -> dict[str, Any]:
    settings = engine_settings(options.concurrency, options.memory_mib)
    return settings | {"adapter_memory_bytes": adapter_bytes}


def _noise(pid: int) -> NoiseMeter:
    return NoiseMeter([*groups_of_processes(pid), os.getpid()])


def _bytes_of(folder: Path) -> int:
    return (folder / WEIGHTS_NAME).stat().st_size


def _jobs(options: argparse.Namespace, shape: Shape, traffic: str, number: int) -> list[Job]:
    sizes = (options.prompt, options.output, shape.vocab_size, options.seed)
    return Workload(traffic, number, options.adapters, *sizes).jobs()


def _check(summary: Summary) -> None:
    if summary.num_errors:
        raise SystemExit(f"{summary.num_errors} errors: {summary.first_error}")


def _conditions(options: argparse.Namespace) -> str:
    traffic = f", {options.traffic}" if options.mode == "crowded" else ""
    return (
        f"{header(options.seed)} | tiers {options.mode} {options.shape}{traffic}, "
        f"{options.adapters} adapters of rank {options.rank}, prompt {options.prompt}, "
        f"output {options.output}, {options.requests} requests"
    )


MODES = {"crowded": crowded, "loads": loads, "cold": cold}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--room", type=int, default=16, help="adapters that fit on the device")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--traffic", choices=("uniform", "skewed"), default="uniform")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--prompt", type=lengths, default=lengths("64"))
    parser.add_argument("--output", type=lengths, default=lengths("32"))
    parser.add_argument("--root", help="s3://bucket/prefix, for cold")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    if options.mode == "cold" and not options.root:
        parser.error("cold needs --root")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
