"""Kills and stops engines at random moments under many kinds of streams, and compares each with the
same one when nothing dies.

    python -m tests.chaos.deaths --deaths 200 --streams 24 --seed 0

Three engine replicas on this machine; a death comes as soon as two of them serve. Chat and plain
completions, several choices, log probabilities, stop strings, penalties, forced JSON, base and
adapters. Prints how long clients waited for a token by kind of death. Ends with 1 if a token was
lost, repeated or changed.
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from adapter_store.store import AdapterStore
from tests.bench.environment import append_row, header
from tests.chaos.server import Server, running
from tests.chaos.stream import WHOLE, new_session
from tests.chaos.transcript import Transcript, transcribe
from tests.chaos.world import MODEL, write_base, write_config, write_contents

NAMES = ("red", "green", "blue", "gold")
NUM_ENGINES = 3
NUM_SERVING = 2  # of them, before the next one dies
RECOVERY_S = 120.0
PAUSE_S = (0.1, 1.5)
IN_FLIGHT_S = 0.05  # so long tokens may still come that were on their way as an engine died
DEATHS = ("kill engine", "kill replica", "stop engine")
WEIGHTS = (6, 2, 2)
JSON_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "done": {"type": "boolean"}},
    "required": ["name", "done"],
    "additionalProperties": False,
}
# What a request asks for beside its prompt. Odd ones are sampled.
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {}),
    ("/v1/completions", {"n": 3}),
    ("/v1/completions", {"logprobs": 3}),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"n": 2}),
    ("/v1/completions", {"frequency_penalty": 0.7, "presence_penalty": 0.3}),
    ("/v1/completions", {"repetition_penalty": 1.2, "logprobs": 0}),
    ("/v1/completions", {"stop": "from what it says"}),
    ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
)


@dataclass
class Death:
    kind: str
    at_s: float


@dataclass
class Run:
    heard: list[tuple[int, Transcript]] = field(default_factory=list[tuple[int, Transcript]])
    deaths: list[Death] = field(default_factory=list[Death])
    problems: list[str] = field(default_factory=list[str])
    enough_blocks: float = 0.0  # that many of KV there are only while enough engines serve

    def note(self, problem: str) -> None:
        self.problems.append(problem)
        tqdm.write(problem)


# ==== requests ====


def request(number: int) -> tuple[str, dict[str, Any]]:
    path, more = KINDS[number % len(KINDS)]
    text = f"stream {number}"
    chat = {"messages": [{"role": "user", "content": text}]}
    if more.get("response_format"):
        schema = {"name": "answer", "schema": JSON_SCHEMA}
        more = {"response_format": {"type": "json_schema", "json_schema": schema}}
    return path, {
        **({"prompt": text} if path.endswith("v1/completions") else chat),
        "model": (MODEL, *NAMES)[number % 5],
        "max_tokens": 100 + 37 * (number % 8),
        "ignore_eos": "response_format" not in more,
        "temperature": number % 2,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **more,
    }


async def expect(server: Server, num_kinds: int) -> tuple[list[Any], list[Transcript]]:
    """Each request with its answer while nothing dies; the stop string is one that comes."""
    requests = [request(number) for number in range(num_kinds)]
    async with new_session(server.url) as session:
        for _, body in requests:
            if "stop" in body:
                plain = await transcribe(session, "/v1/completions", {**body, "stop": None})
                body["stop"] = plain.choices[0].text[-24:-18]
        answers = [await transcribe(session, path, body) for path, body in requests]
    wrong = [answer.end for answer in answers if answer.end != WHOLE]
    if wrong:
        raise RuntimeError(f"before anything died: {wrong}")
    return requests, answers


# ==== deaths ====


async def client(
    run: Run, server: Server, requests: Sequence[Any], rng: random.Random, stop: asyncio.Event
) -> None:
    async with new_session(server.url) as session:
        while not stop.is_set():
            number = rng.randrange(len(requests))
            path, body = requests[number]
            run.heard.append((number, await transcribe(session, path, body)))


async def die(run: Run, server: Server, rng: random.Random, count: int) -> None:
    for _ in tqdm(range(count), desc="deaths", unit="death"):
        await until_serving(run, server)
        await asyncio.sleep(rng.uniform(*PAUSE_S))
        kind = rng.choices(DEATHS, WEIGHTS)[0]
        pids = await members(server, "replica" if kind == "kill replica" else "engine")
        # One that hangs as it starts is waited for as long as a start may take, and nobody waits.
        pid = rng.choice(pids[:NUM_SERVING] if kind == "stop engine" else pids)
        run.deaths.append(Death(kind, time.monotonic()))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if kind == "stop engine" else signal.SIGKILL)
        if kind == "stop engine":
            await until_gone(run, server, pid)
    await until_serving(run, server)


async def members(server: Server, group: str) -> list[int]:
    """The processes of that kind now, oldest first. One that served before may have ended."""
    while not (found := (await asyncio.to_thread(server.look)).get(group, [])):
        await asyncio.sleep(0.1)
    return sorted(found, key=_born_s)


def _born_s(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return float("inf")


async def until_serving(run: Run, server: Server) -> None:
    """Wait until enough engines take requests."""
    deadline_s, blocks = time.monotonic() + RECOVERY_S, 0.0
    while time.monotonic() < deadline_s:
        groups = await asyncio.to_thread(server.look)
        numbers = [len(groups.get(name, ())) for name in ("engine", "replica")]
        blocks = await asyncio.to_thread(num_blocks, server)
        if min(numbers) >= NUM_SERVING and blocks > run.enough_blocks:
            return
        await asyncio.sleep(0.1)
    run.note(f"fewer than {NUM_SERVING} engines for {RECOVERY_S} s: {server.look()}, {blocks=}")


def num_blocks(server: Server) -> float:
    """KV blocks of all engines that the ingress knows; adapters in use take some of them."""
    return min((scrape["reef_kv_blocks_total"] for scrape in server.scrapes()), default=0.0)


async def until_gone(run: Run, server: Server, pid: int) -> None:
    deadline_s = time.monotonic() + RECOVERY_S
    while pid in (await asyncio.to_thread(server.look)).get("engine", []):
        if time.monotonic() > deadline_s:
            run.note(f"engine {pid} was stopped, and is not replaced")
            os.kill(pid, signal.SIGKILL)
            return
        await asyncio.sleep(0.2)


async def play(options: argparse.Namespace, server: Server) -> tuple[Run, list[Transcript]]:
    requests, expected = await expect(server, options.kinds)
    run, stop = Run(), asyncio.Event()
    run.enough_blocks = num_blocks(server) * (NUM_SERVING - 0.3) / NUM_ENGINES
    rngs = [random.Random(f"{options.seed}/{at}") for at in range(options.streams + 1)]
    clients = [asyncio.create_task(client(run, server, requests, r, stop)) for r in rngs[1:]]
    await asyncio.sleep(3)
    await die(run, server, rngs[0], options.deaths)
    stop.set()
    await asyncio.gather(*clients)
    return run, expected


# ==== the verdict ====


def gaps_s(run: Run, kind: str) -> list[float]:
    """Of each stream that was open as one died so: its wait from then on, not from later deaths."""
    return [
        heard.gap_s(death.at_s, death.at_s + IN_FLIGHT_S)
        for death in run.deaths
        if death.kind == kind
        for _, heard in run.heard
        if heard.sent_s <= death.at_s < heard.ended_s
    ]


def report(options: argparse.Namespace, run: Run, expected: Sequence[Transcript]) -> int:
    found = [(number, heard.difference(expected[number])) for number, heard in run.heard]
    problems = run.problems + [f"request {n}: {why}" for n, why in found if why is not None]
    for line in problems[:20]:
        print(f"BROKEN {line[:600]}")
    parts = [_waited(kind, run) for kind in DEATHS if any(d.kind == kind for d in run.deaths)]
    num_tokens = sum(heard.num_tokens for _, heard in run.heard)
    row = (
        f"{header(options.seed)} | deaths | {NUM_ENGINES} engine replicas, {options.streams} "
        f"clients | {len(run.deaths)} deaths, {len(run.heard)} streams, {num_tokens} tokens | "
        f"{len(problems)} lost, repeated or changed | longest wait for a token of streams open "
        f"then: {'; '.join(parts)}"
    )
    append_row(options.rows, row)
    return 1 if problems else 0


def _waited(kind: str, run: Run) -> str:
    gaps = sorted(gaps_s(run, kind)) or [0.0]
    median, p99 = statistics.median(gaps), gaps[int(0.99 * (len(gaps) - 1))]
    number = sum(death.kind == kind for death in run.deaths)
    return f"{kind} ({number}) p50 {median:.2f} s, p99 {p99:.2f} s, max {gaps[-1]:.2f} s"


def configuration(folder: Path, base: Path, root: str) -> Path:
    engine = {"device": "cpu", "memory_bytes": "32MiB", "num_threads": 1, "max_num_seqs": 96}
    replicas = {"min": NUM_ENGINES, "num_cpus": 0.5}
    model = {"id": MODEL, "source": str(base), "engine": engine, "replicas": replicas}
    adapters = {"root": root, "disk_path": str(folder / "disk")}
    return write_config(folder / "config.json", {"models": [model], "adapters": adapters})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Engines die, and what clients hear of it.")
    parser.add_argument("--deaths", type=int, default=200)
    parser.add_argument("--streams", type=int, default=24, help="clients at a time")
    parser.add_argument("--kinds", type=int, default=90, help="different requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append the row to this file")
    parser.add_argument("--log", type=Path, help="where the server's output goes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="deaths-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        base = write_base(folder)
        store = AdapterStore(f"file://{folder}/store", folder / "publishing", 2**30)
        fingerprint = store.register_base(base)
        for each in write_contents(folder, base, NAMES, 1).values():
            store.publish(each[0].folder, "public", each[0].adapter_name, fingerprint)
        config = configuration(folder, base, f"file://{folder}/store")
        with running(config, folder / "disk", options.log or folder / "server.log") as server:
            run, expected = asyncio.run(play(options, server))
        return report(options, run, expected)


if __name__ == "__main__":
    raise SystemExit(main())
