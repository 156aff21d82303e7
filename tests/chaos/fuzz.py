"""Sends hostile HTTP requests to a real server, beside streams that must not notice.

    python -m tests.chaos.fuzz --count 10000 --seed 0
    python -m tests.chaos.fuzz --seed 0 --only 1234      # one of them again, and its answer

Case n of a seed is always the same request. Prints every broken promise with its case, and at the
end: answers by status, what the streams beside them heard, what was left over, and the memory of
the processes. Ends with 1 if a promise was broken.
"""

import argparse
import asyncio
import hashlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.store import AdapterStore
from tests.bench.environment import append_row, header
from tests.chaos.case import JSON, Case, complete
from tests.chaos.cases import Grammar
from tests.chaos.exchange import Answer, exchange, problem
from tests.chaos.memory import as_text, growth
from tests.chaos.server import Server, running
from tests.chaos.stream import WHOLE, streamed
from tests.chaos.victims import Outcome, Victims
from tests.chaos.world import MODEL, write_base, write_config, write_contents

ADAPTERS = ("red", "blue", "green", "gold")
TENANTS = ("acme", "umbrella")
MAX_MODEL_LEN = 256
NUM_VICTIM_TOKENS = 200
WARM_UP = 5  # memory is compared from a 5th of all cases on
IDLE_S = 20.0
NUM_WORDS = 12_000
NUM_AT_ONCE = 120
SHOWN = 400  # bytes of a body or an answer


@dataclass
class Findings:
    statuses: Counter[int] = field(default_factory=Counter[int])
    foreign: Counter[str] = field(default_factory=Counter[str])  # answers of HAProxy, by changes
    problems: list[str] = field(default_factory=list[str])
    rss_mib: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])

    def take(self, case: Case, answer: Answer) -> None:
        self.statuses[answer.status] += 1
        if answer.is_foreign:
            self.foreign[f"{answer.status}: {case.changes[-1]}"] += 1
        found = problem(case, answer)
        if found is not None:
            self.problems.append(f"case {case.number}: {found}")
            print(f"case {case.number}: {found}\n{describe(case, answer)}", flush=True)


def describe(case: Case, answer: Answer) -> str:
    return (
        f"  changes: {', '.join(case.changes)}\n  sent: {case.raw()[:SHOWN]!r}\n"
        f"  answer: {answer.status} {answer.body[:SHOWN]!r}"
    )


# ==== the server ====


def tenant_key(tenant: str) -> str:
    return "reef-" + hashlib.sha256(tenant.encode()).hexdigest()[:40]


@contextmanager
def served(folder: Path, with_tenants: bool) -> Iterator[Server]:
    base = write_base(folder)
    contents = write_contents(folder, base, ADAPTERS, 1)
    store = AdapterStore(f"file://{folder}/store", folder / "publishing", 2**30)
    fingerprint = store.register_base(base)
    for name, (content,) in contents.items():
        store.publish(content.folder, "public", name, fingerprint)
    engine = {
        "device": "cpu",
        "memory_bytes": "8MiB",  # soon all in use: memory that grows later is lost
        "num_threads": 1,
        "max_model_len": MAX_MODEL_LEN,
    }
    args: dict[str, object] = {
        "models": [
            {
                "id": MODEL,
                "source": str(base),
                "dtype": "bfloat16",
                "engine": engine,
                "embeddings": {"pooling": "last"},
            }
        ],
        "adapters": {"root": f"file://{folder}/store", "disk_path": str(folder / "disk")},
        "tenancy": _tenancy(folder) if with_tenants else {},
    }
    config = write_config(folder / "config.json", args)
    with running(config, folder / "disk", folder / "server.log") as server:
        yield server


def _tenancy(folder: Path) -> dict[str, object]:
    hashes = {t: hashlib.sha256(tenant_key(t).encode()).hexdigest() for t in TENANTS}
    document = {"tenants": {tenant: {"keys": [digest]} for tenant, digest in hashes.items()}}
    path = folder / "keys.yaml"
    path.write_text(json.dumps(document))
    return {"mode": "keys", "keys_file": str(path), "metrics": "open"}


def grammar(with_tenants: bool) -> Grammar:
    versions = tuple(f"{name}@1" for name in ADAPTERS)
    models = (MODEL, *ADAPTERS, *versions, f"{MODEL}:red", "red@latest")
    return Grammar(models, tuple(map(tenant_key, TENANTS)) if with_tenants else ())


def victim_bodies() -> list[dict[str, Any]]:
    """One greedy and two that draw, on the base and on adapters."""
    prompts = ([10 * number + at for at in range(16)] for number in range(3))
    models = (MODEL, "red", "blue")
    return [
        streamed(model, prompt, NUM_VICTIM_TOKENS, seed)
        for seed, (model, prompt) in enumerate(zip(models, prompts, strict=True))
    ]


# ==== the cases ====


async def fill_word_cache(server: Server) -> None:
    """Send so many words that memory which grows later is lost.

    `tokenizers` remembers 10,000 of them. The answers are too long, which is seen once the words
    are encoded.
    """
    credentials = [(b"Authorization", f"Bearer {tenant_key(TENANTS[0])}".encode())]
    for first in range(0, NUM_WORDS, NUM_AT_ONCE):
        words = [f"{number:09} " * 20 for number in range(first, first + NUM_AT_ONCE)]
        document = {"model": MODEL, "prompt": words, "max_tokens": MAX_MODEL_LEN}
        case = Case(first, "POST", b"/v1/completions", (JSON,), json.dumps(document).encode())
        await exchange(server.port, complete(case, credentials))


async def send_all(
    server: Server, cases: Grammar, options: argparse.Namespace, found: Findings
) -> None:
    numbers = iter(range(options.first, options.first + options.count))
    num_done = 0

    async def sender() -> None:
        nonlocal num_done
        for number in numbers:
            case = cases.case(options.seed, number)
            found.take(case, await exchange(server.port, case))
            num_done += 1
            if num_done % max(options.count // (2 * WARM_UP), 1) == 0:
                found.rss_mib[num_done] = server.rss_mib()
                print(f"{num_done} sent: {as_text(found.rss_mib[num_done])}", flush=True)

    await asyncio.gather(*(sender() for _ in range(options.senders)))


def run(options: argparse.Namespace, folder: Path) -> int:
    found = Findings()
    cases = grammar(options.tenants)
    with served(folder, options.tenants) as server:
        blocks = _total_blocks(server)
        key = tenant_key(TENANTS[0]) if options.tenants else None
        victims = Victims(server.url, victim_bodies(), key)
        try:
            asyncio.run(fill_word_cache(server))
            began_s = time.monotonic()
            asyncio.run(send_all(server, cases, options, found))
            took_s = time.monotonic() - began_s
            outcome = victims.stop()
        finally:
            victims.kill()
        found.problems += server.wait_until_idle(IDLE_S)
        if _total_blocks(server) != blocks:
            found.problems.append(f"{_total_blocks(server)} KV blocks in all, {blocks} before")
    return report(options, found, outcome, took_s)


def _total_blocks(server: Server) -> list[float]:
    """What adapters in use leave: fewer than before if one stays in use."""
    return [scrape["reef_kv_blocks_total"] for scrape in server.scrapes()]


def report(options: argparse.Namespace, found: Findings, outcome: Outcome, took_s: float) -> int:
    if set(outcome.ends) != {WHOLE}:
        found.problems.append(f"streams beside ended so: {outcome.ends}")
    if outcome.changed:
        found.problems.append(f"{outcome.changed} streams beside had other tokens than alone")
    early, late = found.rss_mib[min(found.rss_mib)], found.rss_mib[max(found.rss_mib)]
    if len(found.rss_mib) > 2:
        early = found.rss_mib[sorted(found.rss_mib)[1]]
        found.problems += growth(early, late)
    statuses = ", ".join(f"{s}: {n}" for s, n in sorted(found.statuses.items()))
    row = (
        f"{header(options.seed)} | fuzz | {options.count} bodies from {options.first}, "
        f"{options.senders} at a time, tenants {'on' if options.tenants else 'off'} | "
        f"{took_s:.0f} s | statuses {statuses} | {len(found.problems)} broken promises | "
        f"beside: {outcome.num_streams} streams, {outcome.num_tokens} tokens, {outcome.changed} "
        f"changed, longest gap {outcome.longest_gap_s:.2f} s, longest wait for a first token "
        f"{outcome.longest_first_s:.2f} s | memory after a fifth: {as_text(early)}, at the end: "
        f"{as_text(late)}"
    )
    append_row(options.rows, row)
    print(f"answers of HAProxy itself: {dict(found.foreign)}")
    for line in found.problems:
        print(f"BROKEN {line}")
    return 1 if found.problems else 0


def show_only(options: argparse.Namespace, folder: Path) -> int:
    case = grammar(options.tenants).case(options.seed, options.only)
    with served(folder, options.tenants) as server:
        answer = asyncio.run(exchange(server.port, case))
        print(f"{describe(case, answer)}\n  problem: {problem(case, answer)}")
        if answer.status >= 500:
            print(server.log.read_text()[-3000:])
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hostile HTTP requests to a real server.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="send this case alone, and print its answer")
    parser.add_argument("--tenants", action="store_true", help="the server asks for keys")
    parser.add_argument("--senders", type=int, default=8)
    parser.add_argument("--rows", type=Path, help="append the row to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        work = run if options.only is None else show_only
        return work(options, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
