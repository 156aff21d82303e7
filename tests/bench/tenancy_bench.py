"""Measures what knowing the tenant and holding it to its limits costs a request.

    python -m tests.bench.tenancy_bench --rows rows.txt

CPU microseconds for a look-up among many stored keys, and for all of identity and quota together:
the key, a request's place, its tokens reserved and settled, and the headers; with the ledger of one
ingress and with one that is asked over a queue. Median over rounds. Memory is what the keys add to
the process. Ray's own part of a call to the ledger is excluded.
"""

import argparse
import asyncio
import gc
import hashlib
import statistics
import time
from pathlib import Path
from random import Random

import psutil

from adapter_store.file_store import FileStore
from deployments.fleet.ledger_link import LedgerLink, OwnLedger, SharedLedger
from deployments.ingress.metrics import Metrics
from deployments.ingress.tenant_limiter import TenantLimiter
from deployments.policy.admission import Limits
from deployments.policy.ledger import Answer, Ledger, Message
from deployments.tenants.key_book import KeyBook
from deployments.tenants.tenants import Keyring
from tests.bench.environment import append_row, header

NUM_REQUESTS = 10_000
NUM_ACTIVE = 100
LIMITS = Limits(10**6, 64, 10**9, tokens_per_day=10**12)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of identity and quotas.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tenants", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, default=Path(".data/bench-tenancy"))
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    before = _resident()
    ring, keys = fill(options.folder, options.tenants, options.keys)
    nbytes = _resident() - before
    looks = [_us(ring, headers_of(keys)) for _ in range(options.rounds)]
    conditions = f"{header(0)} | tenancy | {NUM_REQUESTS} requests, {options.rounds} rounds"
    row = f"{options.tenants} tenants, {options.keys} keys"
    look = f"look-up {statistics.median(looks):.1f} us, {nbytes / 2**20:.0f} MiB"
    append_row(options.rows, f"{conditions} | {row} | {look}")
    for name, headers in (
        (f"{NUM_ACTIVE} tenants at work", headers_of(keys[:NUM_ACTIVE])),
        ("any of the tenants", headers_of(keys)),
    ):
        own = [asyncio.run(requests(ring, headers, False)) for _ in range(options.rounds)]
        shared = [asyncio.run(requests(ring, headers, True)) for _ in range(options.rounds)]
        append_row(
            options.rows,
            f"{conditions} | {row} | identity and quota, {name} | "
            f"{statistics.median(own):.1f} us/request, with a common ledger "
            f"{statistics.median(shared):.1f}",
        )


def headers_of(keys: list[str]) -> list[str]:
    chance = Random(0)
    return [f"Bearer {chance.choice(keys)}" for _ in range(NUM_REQUESTS)]


def fill(folder: Path, num_tenants: int, num_keys: int) -> tuple[Keyring, list[str]]:
    """Make a key ring of so many keys in a store, without a write for each."""
    book, keys = KeyBook(FileStore(folder.absolute())), list[str]()
    for number in range(num_keys):
        keys.append(f"reef-{hashlib.sha256(str(number).encode()).hexdigest()[:43]}")
        fields = {"tenant": f"tenant-{number % num_tenants}", "name": f"key-{number}"}
        times = {"created_s": 1.9e9 + number, "expires_s": None}
        digest = hashlib.sha256(keys[-1].encode()).hexdigest()
        record = {"kind": "create", "digest": digest, "scopes": ["infer"], **fields, **times}
        book._catalog.apply(record)  # pyright: ignore[reportPrivateUsage]
    return Keyring(None, LIMITS, book=book), keys


async def requests(ring: Keyring, headers: list[str], is_shared: bool) -> float:
    """Return the microseconds of CPU for one request."""
    link = _shared() if is_shared else OwnLedger()
    limiter = TenantLimiter(Metrics(200), link=link)
    if isinstance(link, SharedLedger):
        link.start()
    start_s = time.process_time()
    for authorization in headers:
        tenant = ring.identify(authorization)
        place = limiter.place(tenant.name, tenant.limits)
        await place.enter()
        await place.hold(1)
        await place.reserve(100, [256], is_open=False)
        place.settle(100, 60)
        place.headers()
        place.leave()
    used_s = time.process_time() - start_s
    if isinstance(link, SharedLedger):
        await link.close()
    return used_s / len(headers) * 1e6


def _shared() -> LedgerLink:
    ledger = Ledger("bench", time.monotonic_ns(), grace_ns=0)

    async def call(message: Message) -> Answer:
        await asyncio.sleep(0)
        return ledger.take(message, time.monotonic_ns(), time.time())

    return SharedLedger(call, "ingress", 2)


def _us(ring: Keyring, headers: list[str]) -> float:
    start_s = time.process_time()
    for authorization in headers:
        ring.identify(authorization)
    return (time.process_time() - start_s) / len(headers) * 1e6


def _resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
