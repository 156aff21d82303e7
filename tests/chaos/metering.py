"""Kills metering processes while they record usage, and compares the sums with what clients saw.

    python -m tests.chaos.metering --records 1000000 --kills 200
    python -m tests.chaos.metering --records 2000 --kills 4 --seed 3

Several processes record requests as an ingress does: an event is handed to the client (a pipe,
whose other end counts), then it is charged. SIGKILL strikes them at random moments, also while they
recover and upload; the store is out of reach half of the time; now and then the disk takes nothing.
At the end each request that ended must be charged exactly what its client saw, each that was
killed that or one event less, and nothing may be missing or come twice.
"""

import argparse
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.errors import SourceUnavailable
from adapter_store.file_store import FileStore
from deployments.usage import spool
from deployments.usage.meter import Charge, UsageMeter
from deployments.usage.reader import Found, read_records
from deployments.usage.record import UsageRecord

EVENT = struct.Struct("<QIHH")  # request, tokens, whether it is the last, nothing
STORE_DOWN, DISK_FULL = "store-is-down", "disk-is-full"
MOST_TAKEN = 7000  # of 8,192 slots: clients wait then, so that nothing is lost
OPEN_AT_ONCE = 8
TENANTS = 50
FAULT_S = 0.5


class FaultyStore(FileStore):
    """Out of reach while a file says so."""

    def __init__(self, root: Path, fault: Path) -> None:
        super().__init__(root)
        self._fault = fault

    def put_if_absent(self, key: str, data: bytes) -> bool:
        done = random.random() < 0.5 and super().put_if_absent(key, data)  # it may break off
        if self._fault.exists():
            raise SourceUnavailable("the store is down")
        return done or super().put_if_absent(key, data)


def meter_of(folder: Path) -> UsageMeter:
    store = FaultyStore(folder / "store", folder / STORE_DOWN)
    return UsageMeter(folder / "spool", 2**33, store, 0.05, 0.2)


def serve(folder: Path, first: int, pipe: int, seed: int) -> None:
    """Record requests until somebody kills this process. Their numbers begin with `first`."""
    full, write = folder / DISK_FULL, spool._write_all

    def write_all(file: Any, data: bytes) -> None:
        if full.exists():
            raise OSError(28, "No space left on device")
        write(file, data)

    spool._write_all = write_all
    chance = random.Random(seed)
    meter = meter_of(folder)
    meter.start()
    live: list[tuple[int, Charge, list[int]]] = []
    number = first
    while True:
        while len(live) < OPEN_AT_ONCE:
            live.append((number, _begin(meter, number), [chance.randrange(9), 0]))
            number += 1
        at = chance.randrange(len(live))
        request, charge, progress = live[at]
        is_last = chance.random() < 0.5
        progress[1] += progress[0] + 1
        os.write(pipe, EVENT.pack(request, progress[0] + 1, is_last, 0))
        charge.sent(progress[1], 0)
        if is_last:
            charge.end(200, {"stop"})
            live.pop(at)
        while meter._journal.num_taken > MOST_TAKEN:
            time.sleep(0.005)


def _begin(meter: UsageMeter, number: int) -> Charge:
    tenant = f"tenant-{number % TENANTS}"
    record = UsageRecord(
        id="", request_id=str(number), time_s=time.time(), tenant=tenant, route="r", model="m"
    )
    charge = meter.begin(record)
    charge.read(number % 100, 0, 0, 0.0, 0.1)
    return charge


@dataclass
class Seen:
    """What clients saw: tokens by request, and which of them ended."""

    tokens: dict[int, int] = field(default_factory=dict[int, int])
    ended: set[int] = field(default_factory=set[int])
    last: dict[int, int] = field(default_factory=dict[int, int])  # tokens of the latest event

    def take(self, data: bytes) -> None:
        for number, tokens, is_last, _ in EVENT.iter_unpack(data):
            self.tokens[number] = self.tokens.get(number, 0) + tokens
            if is_last:
                self.ended.add(number)
            self.last[number] = tokens


class Worker:
    """One metering process, and the clients' end of its pipe."""

    def __init__(self, folder: Path, first: int, seed: int) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self._rest = b""
        arguments = ["--serve", str(folder), str(first), str(write), str(seed)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.metering", *arguments], pass_fds=[write]
        )
        os.close(write)

    def drain(self, seen: Seen) -> None:
        while True:
            try:
                data = os.read(self._read, 2**20)
            except BlockingIOError:
                return
            if not data:
                return
            data = self._rest + data
            whole = len(data) // EVENT.size * EVENT.size
            self._rest = data[whole:]
            seen.take(data[:whole])

    def kill(self, seen: Seen) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.drain(seen)
        os.close(self._read)


def run(folder: Path, num_records: int, num_kills: int, num_workers: int, seed: int) -> Seen:
    """Have so many records made, with so many kills on the way. Returns what clients saw."""
    chance, seen = random.Random(seed), Seen()
    numbers = iter(range(0, 2**62, 2**32))
    start: Callable[[], Worker] = lambda: Worker(folder, next(numbers), chance.getrandbits(32))  # noqa: E731
    workers = [start() for _ in range(num_workers)]
    killed, fault_s = 0, 0.0
    try:
        while len(seen.ended) < num_records:
            for worker in workers:
                worker.drain(seen)
                assert worker.process.poll() is None, "a metering process ended by itself"
            if killed < num_kills * min(1.0, len(seen.ended) / num_records * 1.05):
                at = chance.randrange(num_workers)
                workers[at].kill(seen)
                workers[at] = start()
                killed += 1
            if time.monotonic() > fault_s:
                fault_s = time.monotonic() + FAULT_S
                _set(folder / STORE_DOWN, chance.random() < 0.5)
                _set(folder / DISK_FULL, chance.random() < 0.2)
            time.sleep(0.002)
    finally:
        for worker in workers:
            worker.kill(seen)
    return seen


def _set(path: Path, is_on: bool) -> None:
    if is_on:
        path.touch()
    else:
        path.unlink(missing_ok=True)


def judge(folder: Path, seen: Seen) -> tuple[int, int]:
    """Compare all records with what clients saw. Returns how many ended, and were killed."""
    for name in (STORE_DOWN, DISK_FULL):
        _set(folder / name, False)
    last = meter_of(folder)
    last.close()
    found, tokens, num_killed = Found(), dict(seen.tokens), 0
    for record in read_records(FileStore(folder / "store"), [folder / "spool"], found):
        number = int(record.request_id)
        saw = tokens.pop(number, 0)
        is_new = record.finish_reason == "killed" and not saw  # nothing may have been read yet
        assert record.prompt_tokens == number % 100 or is_new, f"request {number}: {record}"
        if record.finish_reason == "killed":
            num_killed += 1
            short = saw - record.output_tokens
            assert short in (0, seen.last.get(number, 0)), f"{number}: saw {saw}, {record}"
        else:
            assert number in seen.ended and record.output_tokens == saw, (
                f"{number}: {saw}, {record}"
            )
    assert not tokens, f"{len(tokens)} requests have no record, such as {next(iter(tokens))}"
    assert not found.lost_requests and not found.damaged_lines, found
    assert not list((folder / "spool").glob("*.log")), "all of it is in the store"
    return len(seen.tokens) - num_killed, num_killed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=4, metavar=("FOLDER", "FIRST", "PIPE", "SEED"))
    options = parser.parse_args(arguments)
    if options.serve:
        folder, *numbers = options.serve
        serve(Path(folder), *map(int, numbers))
    with tempfile.TemporaryDirectory() as name:
        began_s = time.monotonic()
        seen = run(Path(name), options.records, options.kills, options.workers, options.seed)
        made_s = time.monotonic() - began_s
        ended, killed = judge(Path(name), seen)
        read_s = time.monotonic() - began_s - made_s
        print(
            f"{ended} requests ended and {killed} were killed in {options.kills} kills: all as "
            f"clients saw; recorded in {made_s:.1f} s, recovered and read in {read_s:.1f} s"
        )


if __name__ == "__main__":
    main()
