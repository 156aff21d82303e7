"""Generates load on any OpenAI-compatible server: streamed completions of fixed length.

    python -m tests.bench.load http://127.0.0.1:8000 --model half --adapters a,b \\
        --traffic skewed --concurrency 8 --requests 64 --prompt 64 --output 32-96

Closed loop with --concurrency, open loop (Poisson arrivals) with --rate. Prompts are token ids,
so that no tokenizer is needed here. A request whose usage differs from the request is an error.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import aiohttp

from tests.bench.workload import TRAFFIC, Job, Workload, lengths

TIMEOUT_S = 600.0


@dataclass(slots=True)
class Result:
    """Result of one request. Times are by the client's clock; arrivals are of stream chunks."""

    started_s: float
    arrivals_s: list[float] = field(default_factory=list[float])
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of the requests without error. `itl` is the time between a stream's chunks."""

    num_requests: int
    num_errors: int
    num_tokens: int
    wall_s: float
    tokens_per_s: float
    requests_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    client_us_per_token: float
    first_error: str | None


class RequestFailed(Exception):
    """Raised if the server refuses, breaks off, or returns a wrong number of tokens."""


async def closed_loop(
    url: str,
    names: Sequence[str],
    jobs: Sequence[Job],
    concurrency: int,
    more: Mapping[str, Any] | None = None,
) -> Summary:
    """Run `concurrency` clients; each sends its next request when its last one has ended.

    `more` are fields of every body.
    """

    async def run(complete: Callable[[Job, float], Coroutine[Any, Any, Result]]) -> list[Result]:
        queue = iter(jobs)

        async def client() -> list[Result]:
            return [await complete(job, time.perf_counter()) for job in queue]

        results = await asyncio.gather(*(client() for _ in range(concurrency)))
        return list(chain.from_iterable(results))

    return await _measure(url, names, run, more or {})


async def open_loop(
    url: str, names: Sequence[str], jobs: Sequence[Job], rate: float, seed: int
) -> Summary:
    """Send requests at `rate` per second, regardless of how long earlier ones take."""
    rng = random.Random(seed + 2)
    arrivals: list[float] = []
    for _ in jobs:
        arrivals.append((arrivals[-1] if arrivals else 0.0) + rng.expovariate(rate))

    async def run(complete: Callable[[Job, float], Coroutine[Any, Any, Result]]) -> list[Result]:
        start_s = time.perf_counter()

        async def at(job: Job, arrival_s: float) -> Result:
            await asyncio.sleep(start_s + arrival_s - time.perf_counter())
            return await complete(job, start_s + arrival_s)

        return await asyncio.gather(*map(at, jobs, arrivals))

    return await _measure(url, names, run, {})


async def _measure(
    url: str,
    names: Sequence[str],
    run: Callable[[Callable[[Job, float], Coroutine[Any, Any, Result]]], Any],
    more: Mapping[str, Any],
) -> Summary:
    """Run and summarise; `names[0]` is the base model's name, the rest are adapters'."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:

        async def complete(job: Job, started_s: float) -> Result:
            name = names[0 if job.adapter is None else job.adapter + 1]
            return await _complete(session, name, job, started_s, more)

        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        results = await run(complete)
        cpu_s = time.process_time() - start_cpu_s
        return summarise(results, time.perf_counter() - start_s, cpu_s)


# ==== one request ====


async def _complete(
    session: aiohttp.ClientSession, name: str, job: Job, started_s: float, more: Mapping[str, Any]
) -> Result:
    result = Result(started_s)
    body = {
        "model": name,
        "prompt": job.prompt_token_ids,
        "max_tokens": job.num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise RequestFailed(f"status {response.status}: {(await response.text())[:200]}")
            await _read(response, result)
        if result.num_tokens != job.num_output_tokens:
            raise RequestFailed(f"{result.num_tokens} tokens, not {job.num_output_tokens}")
    except (RequestFailed, aiohttp.ClientError, TimeoutError, ValueError) as error:
        result.error = f"{type(error).__name__}: {error}"
    return result


async def _read(response: aiohttp.ClientResponse, result: Result) -> None:
    async for event in _events(response):
        if "error" in event:
            raise RequestFailed(str(event["error"])[:200])
        if event.get("choices"):
            result.arrivals_s.append(time.perf_counter())
        if event.get("usage"):
            result.num_tokens = event["usage"]["completion_tokens"]


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise RequestFailed("the stream ended without [DONE]")


# ==== numbers ====


def summarise(results: Sequence[Result], wall_s: float, client_cpu_s: float) -> Summary:
    good = [r for r in results if r.error is None]
    errors = [r.error for r in results if r.error is not None]
    num_tokens = sum(r.num_tokens for r in good)
    ttft = [r.arrivals_s[0] - r.started_s for r in good]
    tpot = [
        (r.arrivals_s[-1] - r.arrivals_s[0]) / (r.num_tokens - 1) for r in good if r.num_tokens > 1
    ]
    itl = [
        later - earlier
        for r in good
        for earlier, later in zip(r.arrivals_s, r.arrivals_s[1:], strict=False)
    ]
    return Summary(
        num_requests=len(results),
        num_errors=len(errors),
        num_tokens=num_tokens,
        wall_s=wall_s,
        tokens_per_s=num_tokens / wall_s,
        requests_per_s=len(good) / wall_s,
        ttft_p50_s=percentile(ttft, 50),
        ttft_p99_s=percentile(ttft, 99),
        tpot_p50_s=percentile(tpot, 50),
        tpot_p99_s=percentile(tpot, 99),
        itl_p50_s=percentile(itl, 50),
        itl_p99_s=percentile(itl, 99),
        client_us_per_token=1e6 * client_cpu_s / max(num_tokens, 1),
        first_error=errors[0] if errors else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % do not exceed; nan if empty."""
    if not values:
        return float("nan")
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(int(rank) - 1, 0)]


def as_line(summary: Summary) -> str:
    def ms(p50: float, p99: float) -> str:
        return f"{1e3 * p50:.1f}/{1e3 * p99:.1f} ms"

    s = summary
    text = (
        f"{s.tokens_per_s:.1f} tokens/s | {s.requests_per_s:.2f} requests/s"
        f" | p50/p99: TTFT {ms(s.ttft_p50_s, s.ttft_p99_s)}, TPOT {ms(s.tpot_p50_s, s.tpot_p99_s)}"
        f", ITL {ms(s.itl_p50_s, s.itl_p99_s)} | client {s.client_us_per_token:.0f} us/token"
        f" | {s.num_errors} errors of {s.num_requests}"
    )
    return text if s.first_error is None else f"{text}, first: {s.first_error}"


def as_json(summary: Summary) -> str:
    """Format as one line of JSON; missing values (percentiles of no values) are null."""
    figures = asdict(summary).items()
    return json.dumps({name: None if value != value else value for name, value in figures})


def main() -> int:
    options = _parse()
    adapters = options.adapters.split(",") if options.adapters else []
    workload = Workload(
        options.traffic,
        options.requests,
        len(adapters),
        options.prompt,
        options.output,
        options.vocab_size,
        options.seed,
    )
    names = [options.model, *adapters]
    if options.rate is not None:
        work = open_loop(options.url, names, workload.jobs(), options.rate, options.seed)
    else:
        work = closed_loop(options.url, names, workload.jobs(), options.concurrency)
    summary = asyncio.run(work)
    print(as_json(summary) if options.json else as_line(summary))
    return 1 if summary.num_errors else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load for an OpenAI-compatible server.")
    parser.add_argument("url")
    parser.add_argument("--model", required=True, help="the base model's name")
    parser.add_argument("--adapters", default="", help="names, comma-separated")
    parser.add_argument("--traffic", choices=TRAFFIC, default="base")
    parser.add_argument("--requests", type=int, default=32)
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--concurrency", type=int, default=8)
    loop.add_argument("--rate", type=float, help="requests per second")
    parser.add_argument("--prompt", type=lengths, default=lengths("64"), help="64 or 32-128")
    parser.add_argument("--output", type=lengths, default=lengths("32"))
    parser.add_argument("--vocab-size", type=int, default=1000, help="prompts' ids are below it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.traffic != "base" and not options.adapters:
        parser.error(f"--traffic {options.traffic} needs --adapters")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
