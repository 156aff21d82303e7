"""Measures what the number of published adapters costs: names, lists, starts and publishing.

    python -m tests.bench.store_bench 100 10000
    python -m tests.bench.store_bench 10000 --root s3://bucket/prefix   # with S3_ENDPOINT_URL

The store is made as `reef gc` leaves one: two snapshots, and 300 records after the older. With
`--whole-log` (a folder only) no record was ever removed. Manifests are made up, but for the one
adapter that is published.
"""

import argparse
import asyncio
import gc
import hashlib
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from adapter_store.catalog import Catalog
from adapter_store.followed_log import SNAPSHOT_EVERY
from adapter_store.listing import Wanted, page_of
from adapter_store.object_store import ObjectStore
from adapter_store.open_store import endpoint_from, open_store
from adapter_store.record_log import RecordLog, encode, log_key, snapshot_key
from adapter_store.store import AdapterStore
from tests.bench.environment import append_row, header
from tests.deployments.support.fakes import FakeStore, serving
from tests.deployments.support.tiny_models import make_adapter, make_base

NUM_RESOLVED = 20_000
NUM_PAGES = 20
NUM_PUBLISHED = 5
TENANT = "public"


def main() -> int:
    options = _parse()
    conditions = header(0)
    for number in options.numbers:
        with tempfile.TemporaryDirectory() as name:
            root = (
                f"{options.root}/{number}-{os.getpid()}" if options.root else f"file://{name}/store"
            )
            made = Made(root, Path(name), number, options.whole_log)
            row = " | ".join([conditions, "store", made.describe(), *made.measure()])
        append_row(options.rows, row)
    return 0


class Made:
    """A store with so many adapters."""

    def __init__(self, root: str, folder: Path, number: int, is_whole: bool) -> None:
        self.root, self.folder, self.number, self.is_whole = root, folder, number, is_whole
        make_base(folder / "base", 64)
        self.base = self.open("first").register_base(folder / "base")
        fill(open_store(root, endpoint_from(os.environ, root)), number, self.base, is_whole)

    def open(self, name: str) -> AdapterStore:
        endpoint = endpoint_from(os.environ, self.root)
        return AdapterStore(self.root, self.folder / name, 2**30, endpoint_url=endpoint)

    def describe(self) -> str:
        where = "S3" if self.root.startswith("s3") else "a folder"
        return f"{self.number} adapters in {where}{', whole log' if self.is_whole else ''}"

    def measure(self) -> Iterator[str]:
        yield f"memory {self._bytes_each():.0f} B each"
        store, start_s = timed(lambda: self.open("disk"))
        yield f"start {start_s * 1e3:.0f} ms"
        places = [(TENANT, self.base)]
        wanted = [name_of(n * 104_729 % self.number) for n in range(NUM_RESOLVED)]
        times = [timed(lambda name=name: store.resolve_known(places, name))[1] for name in wanted]
        yield f"resolve p50 {part(times, 0.5) * 1e6:.0f} us, p99 {part(times, 0.99) * 1e6:.0f} us"
        times = [timed(store.refresh)[1] for _ in range(20)]
        yield f"refresh p50 {part(times, 0.5) * 1e3:.1f} ms"
        times = asyncio.run(self._pages(store))
        p50, most = part(times, 0.5) * 1e3, max(times) * 1e3
        yield f"/v1/models of 1000 p50 {p50:.1f} ms, max {most:.1f} ms"
        _, seconds = timed(lambda: page_of(store, Wanted(name="none-*"), None, 100))
        yield f"a filter that finds none {seconds * 1e3:.0f} ms"
        times = self._publish(store)
        _, snapshot_s = timed(store._registry.save_snapshot)
        p50 = part(times, 0.5) * 1e3
        # Nobody waits for the snapshot: what follows says what it takes of the processor meanwhile.
        yield f"publish p50 {p50:.0f} ms, a snapshot beside it {snapshot_s * 1e3:.0f} ms"

    def _bytes_each(self) -> float:
        """Measure what a store takes beyond an empty one."""
        return (self._traced(self.root) - self._traced(f"{self.root}-empty")) / self.number

    def _traced(self, root: str) -> int:
        gc.collect()
        tracemalloc.start()
        endpoint = endpoint_from(os.environ, root)
        store = AdapterStore(root, self.folder / "traced", 2**30, endpoint_url=endpoint)
        gc.collect()
        num_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del store
        return num_bytes

    async def _pages(self, store: AdapterStore) -> list[float]:
        """Time pages of /v1/models from all over the list."""
        names = sorted(name_of(n) for n in range(self.number))
        found: list[float] = []
        how: dict[str, Any] = {"base_fingerprint": self.base}
        async with serving(store=cast(FakeStore, store), **how) as server:
            for n in range(NUM_PAGES):
                after = names[n * max(0, self.number - 1001) // NUM_PAGES]
                began = time.perf_counter()
                answer = await server.call("GET", f"/v1/models?after={after}")
                found.append(time.perf_counter() - began)
                assert answer.status == 200
        return found

    def _publish(self, store: AdapterStore) -> list[float]:
        """Publish adapters of a few kB."""
        seconds: list[float] = []
        for n in range(NUM_PUBLISHED):
            folder = self.folder / f"peft{n}"
            make_adapter(folder, self.folder / "base", 4, seed=n)
            work = partial(store.publish, folder, "t", "new", self.base)
            seconds.append(timed(work)[1])
        return seconds


def fill(objects: ObjectStore, number: int, base: str, is_whole: bool) -> None:
    """Write what a store of so many adapters holds."""
    catalog, records = Catalog(), list[bytes]()
    last = number // SNAPSHOT_EVERY * SNAPSHOT_EVERY
    for n in range(number):
        raw = encode(_record(n, base) | {"previous": catalog.head})
        catalog.apply(_record(n, base), _sha256(raw))
        records.append(raw)
        if catalog.num_records in (last - SNAPSHOT_EVERY, last) and catalog.num_records:
            log = RecordLog(objects, Catalog.from_data)
            log.save_snapshot(catalog.num_records, encode(catalog.to_data()))
    first = 0 if is_whole else max(0, last - SNAPSHOT_EVERY)
    for n in range(first, number):
        if is_whole:  # without a flush to the disk for each
            path = objects._root / log_key(n + 1)  # type: ignore[attr-defined]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(records[n])
        else:
            objects.put(log_key(n + 1), records[n])
    assert last == 0 or objects.size(snapshot_key(last)) is not None


def _record(n: int, base: str) -> dict[str, Any]:
    return {
        "kind": "publish",
        "tenant": TENANT,
        "name": name_of(n),
        "version": 1,
        "digest": f"{n:064x}",
        "base": base,
        "lora_rank": 16,
        "nbytes": 10**7,
        "published_s": 1.7e9 + n,
        "generation": 0,
        "own_files": [],
        "vocab_size": 0,
        "by": "acme/ci",
        "at_s": 1.7e9 + n,
    }


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def name_of(n: int) -> str:
    return f"customer-{n * 7919 % 1_000_003:07}-support"


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def part(seconds: Sequence[float], part: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * part))]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("numbers", type=int, nargs="+", help="of adapters")
    parser.add_argument("--root", help="s3://bucket/prefix; else a folder")
    parser.add_argument("--whole-log", action="store_true", help="no record was ever removed")
    parser.add_argument("--rows", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
