"""Lets one fault after the other loose on a real fleet, under load, and judges what clients heard.

    python -m tests.chaos.storm --minutes 10 --streams 32 --seed 0

Two engine replicas and two ingresses on this machine, adapters in a real S3 server behind a proxy
that fails on order, the disk cache on a small file system of its own. Clients stream in a closed
loop while adapters are republished all the time. Every stream is compared with what the engine
answers alone; every error must be one that the fault of its time explains. Prints a table by fault,
and what was left over at the end. Ends with 1 if a promise was broken.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapter_store.store import AdapterStore
from tests.adapter_store.forwarder import Forwarder
from tests.adapter_store.roots import BUCKET, s3_client
from tests.bench.environment import append_row, header
from tests.chaos.faults import FAULTS, NUM_ENGINES, NUM_INGRESSES, Target
from tests.chaos.hostile import hostile_cases
from tests.chaos.judge import Answers, Listened, Span, Verdict, judge, table
from tests.chaos.memory import as_text, growth
from tests.chaos.oracle import Oracle, Prompt
from tests.chaos.publisher import ALIAS, Publisher
from tests.chaos.server import MIB, Server, can_have_small_disk, running
from tests.chaos.stream import WHOLE, listen, new_session
from tests.chaos.world import MODEL, Content, write_base, write_config, write_contents
from tests.swift.process import ACCESS_KEY, SECRET, Swift, running_swift, why_not

NAMES = tuple(f"adapter{number:02}" for number in range(12))
NUM_CONTENTS = 4  # of each name
NUM_PROMPTS = 6
DISK_BYTES = 2 * MIB  # of the cache: less than all contents together
FILE_SYSTEM_BYTES = 6 * MIB
WARM_UP_S = 20.0
CALM_S = (2.0, 6.0)
IDLE_S = 40.0
AFTER_ERROR_S = 0.2
S3_SETTINGS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


@dataclass
class Run:
    """What happened."""

    listened: list[Listened] = field(default_factory=list[Listened])
    spans: list[Span] = field(default_factory=list[Span])
    rss_mib: list[dict[str, float]] = field(default_factory=list[dict[str, float]])


# ==== before the server starts ====


def make_prompts(seed: int) -> list[Prompt]:
    rng = random.Random(f"{seed}/prompts")
    return [
        Prompt(
            tuple(rng.randrange(256) for _ in range(rng.randint(8, 60))), rng.randint(100, 400), at
        )
        for at in range(NUM_PROMPTS)
    ]


def ask_oracle(
    base: Path, dtype: str, contents: Mapping[str, Sequence[Content]], prompts: Sequence[Prompt]
) -> Answers:
    began_s = time.monotonic()
    oracle = Oracle(base, dtype)
    try:
        every = [None, *(content for each in contents.values() for content in each)]
        answers = {(c, prompt): oracle.answer(c, prompt) for c in every for prompt in prompts}
    finally:
        oracle.close()
    distinct = len(set(map(tuple, answers.values())))
    took_s = time.monotonic() - began_s
    print(f"oracle: {len(answers)} answers, {distinct} distinct, in {took_s:.0f} s", flush=True)
    if distinct < len(answers) * 0.95:
        raise RuntimeError("the adapters do not change what is said")
    return answers


def configuration(folder: Path, base: Path, dtype: str, endpoint_url: str) -> Path:
    model = {
        "id": MODEL,
        "source": str(base),
        "dtype": dtype,
        "engine": {"device": "cpu", "memory_bytes": "16MiB", "num_threads": 1, "max_num_seqs": 64},
        "replicas": {"min": NUM_ENGINES, "num_cpus": 0.5},
    }
    args: dict[str, object] = {
        "models": [model],
        "adapters": {
            "root": f"s3://{BUCKET}/storm",
            "endpoint_url": endpoint_url,
            "disk_path": str(folder / "disk"),
            "disk_bytes": DISK_BYTES,
        },
        "ingress": {"replicas": NUM_INGRESSES},
    }
    return write_config(folder / "config.json", args)


@contextmanager
def storing(folder: Path) -> Iterator[tuple[Swift, Forwarder]]:
    """Run the S3 server and the proxy in front of it."""
    os.environ.update(S3_SETTINGS)
    (folder / "swift").mkdir()
    if reason := why_not(folder / "swift"):
        raise RuntimeError(reason)
    with running_swift(folder / "swift") as swift, Forwarder(swift.endpoint_url) as forwarder:
        s3_client(swift.endpoint_url).create_bucket(Bucket=BUCKET)
        yield swift, forwarder


# ==== the storm ====


async def client(
    run: Run,
    server: Server,
    publisher: Publisher,
    prompts: Sequence[Prompt],
    seed: str,
    stop: asyncio.Event,
) -> None:
    """Stream one request after the other, popular adapters more often."""
    rng = random.Random(seed)
    weights = [1 / (at + 1) for at in range(len(NAMES) + 1)]
    async with new_session(server.url) as session:
        while not stop.is_set():
            name = rng.choices((MODEL, *NAMES), weights)[0]
            model, prompt = _spelled(rng, publisher, name), rng.choice(prompts)
            heard = await listen(session, prompt.body(model))
            run.listened.append(Listened(model, prompt, heard))
            if heard.end != WHOLE:
                await asyncio.sleep(AFTER_ERROR_S)


def _spelled(rng: random.Random, publisher: Publisher, name: str) -> str:
    kind = rng.random()
    if name == MODEL or kind < 0.6:
        return name
    if kind < 0.8:
        return f"{name}@{ALIAS}"
    versions = publisher.settled_versions(name)
    return f"{name}@{rng.choice(versions)}" if versions else name


def schedule(seed: int, kinds: Sequence[str]) -> Iterator[str]:
    """Every kind once in a random order, and again."""
    rng = random.Random(f"{seed}/schedule")
    while True:
        yield from rng.sample(list(kinds), len(kinds))


async def strike(run: Run, target: Target, kinds: Sequence[str], seed: int, ends_s: float) -> None:
    """One fault after the other, with calm between them, until the time is over."""
    for kind in schedule(seed, kinds):
        calm_s = target.rng.uniform(*CALM_S)
        if time.monotonic() + calm_s > ends_s:
            return
        await asyncio.sleep(calm_s)
        run.rss_mib.append(target.server.rss_mib())
        span = Span(kind, time.monotonic())
        run.spans.append(span)
        await FAULTS[kind](target)
        await target.until_recovered()
        span.ended_s = time.monotonic()
        took_s = span.ended_s - span.began_s
        print(f"{kind}: {took_s:.1f} s, {as_text(run.rss_mib[-1])}", flush=True)


async def blow(
    options: argparse.Namespace, target: Target, publisher: Publisher, prompts: Sequence[Prompt]
) -> Run:
    run, stop = Run(), asyncio.Event()
    ends_s = time.monotonic() + 60 * options.minutes
    seeds = [f"{options.seed}/client/{number}" for number in range(options.streams)]
    clients = [
        asyncio.create_task(client(run, target.server, publisher, prompts, seed, stop))
        for seed in seeds
    ]
    publisher.start()
    await asyncio.sleep(min(WARM_UP_S, 10 * options.minutes))
    await asyncio.to_thread(target.note_blocks)
    await strike(run, target, options.faults, options.seed, ends_s)
    await asyncio.sleep(max(0.0, ends_s - time.monotonic()))
    stop.set()
    await asyncio.gather(*clients)
    await asyncio.to_thread(publisher.stop)
    return run


# ==== the verdict ====


def report(
    options: argparse.Namespace, run: Run, target: Target, verdict: Verdict, num_versions: int
) -> int:
    early, late = run.rss_mib[len(run.rss_mib) // 3], run.rss_mib[-1]
    problems = [*target.problems, *verdict.problems, *growth(early, late)]
    for line in problems:
        print(f"BROKEN {line}")
    print(table(verdict))
    print(f"hostile bodies were answered: {dict(sorted(target.hostile_statuses.items()))}")
    num_whole = sum(ends[WHOLE] for ends in verdict.ends.values())
    ends = sum(verdict.ends.values(), start=Counter())
    row = (
        f"{header(options.seed)} | storm | {options.minutes:g} minutes, {options.streams} streams, "
        f"{NUM_ENGINES} engine replicas, {NUM_INGRESSES} ingresses, {options.dtype} | "
        f"{len(run.spans)} faults of {len({span.kind for span in run.spans})} kinds, "
        f"{num_versions} versions | {len(run.listened)} streams, {num_whole} whole, "
        f"{verdict.num_tokens} tokens | ends "
        f"{', '.join(f'{end}: {count}' for end, count in sorted(ends.items()))} | "
        f"{len(problems)} broken promises | longest gap "
        f"{max(verdict.gaps_s.values()):.1f} s, in calm {verdict.gaps_s.get('calm', 0.0):.1f} s | "
        f"oldest meaning of a name {verdict.oldest_s:.1f} s | "
        f"memory after a third: {as_text(early)}, at the end: {as_text(late)}"
    )
    append_row(options.rows, row)
    return 1 if problems else 0


def storm(options: argparse.Namespace, folder: Path) -> int:
    base = write_base(folder)
    contents = write_contents(folder, base, NAMES, NUM_CONTENTS)
    prompts = make_prompts(options.seed)
    answers = ask_oracle(base, options.dtype, contents, prompts)
    with ExitStack() as stack:
        swift, forwarder = stack.enter_context(storing(folder))
        root = f"s3://{BUCKET}/storm"
        store = AdapterStore(root, folder / "publishing", 2**30, endpoint_url=swift.endpoint_url)
        publisher = Publisher(store, store.register_base(base), contents, options.seed)
        publisher.publish_first()
        config = configuration(folder, base, options.dtype, forwarder.endpoint_url)
        small = FILE_SYSTEM_BYTES if can_have_small_disk() else None
        if small is None:
            print("no file system of its own for the disk cache here: it will not be full")
            options.faults = [kind for kind in options.faults if kind != "disk is full"]
        server = stack.enter_context(running(config, folder / "disk", options.log, small))
        rng = random.Random(f"{options.seed}/faults")
        target = Target(server, forwarder, hostile_cases(), rng)
        run = asyncio.run(blow(options, target, publisher, prompts))
        target.problems += server.wait_until_idle(IDLE_S)
        run.rss_mib.append(server.rss_mib())
        verdict = judge(run.listened, run.spans, publisher, answers)
        return report(options, run, target, verdict, publisher.num_versions)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Faults under load, and what clients hear.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--rows", type=Path, help="append the row to this file")
    parser.add_argument("--log", type=Path, help="where the server's output goes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="storm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        options.log = options.log or folder / "server.log"
        return storm(options, folder)


if __name__ == "__main__":
    raise SystemExit(main())
