"""Meter: one Charge for each request that an ingress hands to engines.

What is charged is decided here and by whoever calls: `read` once the engine has answered for a
prompt, `sent` once tokens have been handed over to be sent, `waive` if the answer is an error.
"""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from adapter_store.object_store import ObjectStore
from deployments.usage.journal import NUM_SLOTS, Journal
from deployments.usage.record import UsageRecord, encode_json
from deployments.usage.records import reason_bits
from deployments.usage.recovery import JOURNAL
from deployments.usage.spool import Spool
from deployments.usage.writer import UsageCounts, UsageWriter


class Charge:
    """What one request has cost so far. In itself it charges nothing, for where there is no meter.

    Counts are totals, and what is told last counts.
    """

    __slots__ = ()

    def read(
        self, prompt: int, cached: int, load_bytes: int, queue_s: float, ttft_s: float | None
    ) -> None:
        """Charge for prompts whose answers have begun."""

    def sent(self, output: int, reasoning: int) -> None:
        """Charge for tokens that have been handed over to be sent to the client."""

    def waive(self) -> None:
        """Charge nothing: the answer is an error."""

    def end(self, status: int, reasons: set[str]) -> None:
        """End the request. Exactly once, and last."""


NO_CHARGE = Charge()


class Meter(Protocol):
    def begin(self, record: UsageRecord, held_s: float = 0.0) -> Charge:
        """Begin to charge a request that came `held_s` ago; the record's `id` is set here."""
        ...


class NoMeter:
    """Nothing is recorded."""

    def start(self) -> None:
        return None

    def close(self) -> None:
        return None

    def begin(self, record: UsageRecord, held_s: float = 0.0) -> Charge:
        return NO_CHARGE


class JournalCharge(Charge):
    """Kept in a slot of the journal; without one it is counted as lost."""

    __slots__ = ("_arrival_s", "_journal", "_output", "_prompt", "_slot")

    def __init__(self, journal: Journal, slot: int | None, arrival_s: float) -> None:
        self._journal = journal
        self._slot = slot
        self._arrival_s = arrival_s
        self._prompt = self._output = 0

    def read(
        self, prompt: int, cached: int, load_bytes: int, queue_s: float, ttft_s: float | None
    ) -> None:
        self._prompt = prompt
        if self._slot is not None:
            ttft_s = -1.0 if ttft_s is None else ttft_s
            self._journal.read(self._slot, prompt, cached, load_bytes, queue_s, ttft_s)

    def sent(self, output: int, reasoning: int) -> None:
        self._output = output
        if self._slot is not None:
            self._journal.sent(self._slot, output, reasoning)

    def waive(self) -> None:
        self.read(0, 0, 0, 0.0, None)
        self.sent(0, 0)

    def end(self, status: int, reasons: set[str]) -> None:
        if self._slot is None:
            self._journal.lose(self._prompt, self._output)
            return
        e2e_s = time.monotonic() - self._arrival_s
        self._journal.end(self._slot, e2e_s, status, reason_bits(reasons))


class UsageMeter:
    """Records every request of one process below `folder`. Used in one event loop."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        store: ObjectStore | None,
        fsync_s: float,
        upload_s: float,
        num_slots: int = NUM_SLOTS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._name = secrets.token_hex(8)
        self._number = 1
        self._journal = Journal.create(folder / f"{self._name}{JOURNAL}", num_slots)
        spool = Spool(folder, self._name, max_bytes, clock)
        self.writer = UsageWriter(
            folder, self._name, self._journal, spool, store, fsync_s, upload_s
        )

    def start(self) -> None:
        self.writer.start()

    def close(self) -> None:
        """Flush and upload. Requests that still run are taken for killed ones."""
        self.writer.close()
        self._journal.close()
        self.writer.upload()

    def begin(self, record: UsageRecord, held_s: float = 0.0) -> Charge:
        record.id = f"{self._name}-{self._number}"
        slot = self._journal.begin(encode_json(record))
        self._number += slot is not None
        return JournalCharge(self._journal, slot, time.monotonic() - held_s)

    def read_counts(self) -> UsageCounts:
        return self.writer.counts
