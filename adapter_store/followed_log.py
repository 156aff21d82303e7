"""Follow an append-only log into memory, and append to it.

Writers that try one number read the record of the one that succeeded and try the next number. So no
record is lost, every record was valid when it was written, and following the log takes one LIST
after the last key seen.

Snapshots shorten the start, and stand for records that were removed: a reader that finds its next
record gone goes on from a newer snapshot. A damaged snapshot is skipped. A damaged record is not:
what follows it may depend on it, so reading stops before it, and `damage` says so until the record
is repaired.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Generic

from adapter_store.errors import AccessDenied, SourceUnavailable, StoreCorrupt
from adapter_store.record_log import Entry, LogBroken, Record, RecordLog, S, encode

SNAPSHOT_EVERY = 256  # records
LISTING_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # for a record that is there to be listed
_log = logging.getLogger(__name__)


def do_now(work: Callable[[], None]) -> None:
    """Do it at once."""
    work()


class FollowedLog(Generic[S]):
    """The state of one log, `_catalog`. Thread-safe.

    Reads answer from memory as of the last `refresh`; writes refresh first. The constructor,
    `refresh` and all writes may raise SourceUnavailable; `refresh` and the writes StoreCorrupt too.
    """

    def __init__(
        self,
        records: RecordLog[S],
        empty: S,
        wall_clock: Callable[[], float],
        may_write: bool = True,
        run_later: Callable[[Callable[[], None]], None] = do_now,
    ) -> None:
        """Read the log. Without `may_write` all writes raise AccessDenied.

        `run_later` is given what is due after a write, and takes long if the state is large.
        """
        self._may_write = may_write
        self._run_later = run_later
        self._records = records
        self._wall_clock = wall_clock
        self._refreshing = threading.Lock()  # held over I/O
        self._lock = threading.Lock()  # held over memory only
        self._damage: str | None = None
        self._catalog: S = self._records.newest_snapshot(after=0) or empty
        self._num_skipped = self._catalog.num_records  # records that a snapshot stood for
        with suppress(StoreCorrupt):  # what is known is served all the same
            self.refresh()

    @property
    def damage(self) -> str | None:
        """Why the log cannot be read to its end; None if the last `refresh` could."""
        return self._damage

    def refresh(self) -> None:
        """Apply every record that other writers have appended.

        Records before a damaged one are applied before StoreCorrupt is raised.
        """
        with self._refreshing:
            try:
                self._read_log()
            except StoreCorrupt as error:
                if str(error) != self._damage:
                    _log.error("the adapter store is damaged: %s", error)
                self._damage = str(error)
                raise
            if self._damage is not None:
                _log.warning("the adapter store is whole again: the log was read to its end")
                self._damage = None

    @property
    def num_records(self) -> int:
        """The number of the last record that was read."""
        return self._catalog.num_records

    # ---- the log -------------------------------------------------------------------------------

    def _read_log(self) -> None:
        while True:
            try:
                self._follow(self._records.keys_after(self._catalog.num_records))
                return
            except LogBroken as broken:
                if self._skip_to_newer_snapshot():
                    continue
                if broken.pending is not None:
                    self._apply([broken.pending])
                raise StoreCorrupt(str(broken)) from broken

    def _follow(self, keys: Sequence[str]) -> None:
        # Read a damaged record alone first: all that follow it need not be read every time.
        num_first = 0 if self._damage is None else 1
        for some in (keys[:num_first], keys[num_first:]):
            number, head = self._catalog.num_records, self._catalog.head
            self._apply(self._records.read(some, number, head))

    def _apply(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            with self._lock:
                try:
                    self._catalog.apply(entry.record, entry.sha256)
                except StoreCorrupt as error:
                    key = self._records.key_of(self._catalog.num_records + 1)
                    raise StoreCorrupt(f"{key}: {error}") from error

    def _skip_to_newer_snapshot(self) -> bool:
        """Go on from a newer snapshot; return False if there is none."""
        newer = self._records.newest_snapshot(after=self._catalog.num_records)
        if newer is None:
            return False
        with self._lock:
            self._catalog = newer
        self._num_skipped = newer.num_records
        return True

    def _append(self, make_record: Callable[[S], Record | None], by: str) -> None:
        """Append the record that `make_record` derives from the newest state, unless it is None.

        `by` says in the log whose change it is.
        """
        check_may_write(self._may_write)
        while True:
            self.refresh()
            with self._lock:
                record = make_record(self._catalog)
                number, head = self._catalog.num_records + 1, self._catalog.head
            if record is None:
                return
            raw = encode(record | {"previous": head, "by": by, "at_s": self._wall_clock()})
            written = self._records.append(number, raw)
            self._refresh_to(number)
            if written:
                self._check_written(number, raw)
                return

    def _refresh_to(self, number: int) -> None:
        """Refresh until this record is read, which is there: a listing may lag behind a write."""
        for pause_s in (*LISTING_PAUSES_S, 0):
            self.refresh()
            if self._catalog.num_records >= number:
                return
            time.sleep(pause_s)
        raise SourceUnavailable(f"the store has record {number} but does not list it")

    def _check_written(self, number: int, raw: bytes) -> None:
        if number <= self._num_skipped:
            raise SourceUnavailable(
                f"log record {number} took so long to write that newer ones were removed "
                "meanwhile, so whether it counts is not known: see what is there, and try again"
            )
        self._records.check_kept(number, raw)
        if number % SNAPSHOT_EVERY == 0:
            self._run_later(self.save_snapshot)

    # ---- snapshots -----------------------------------------------------------------------------

    def save_snapshot(self) -> None:
        """Write a snapshot of the state, unless there is one."""
        with self._lock:
            data = self._catalog.to_data()
        self._records.save_snapshot(data["num_records"], encode(data))

    def save_overdue_snapshot(self) -> None:
        """Write a snapshot if a writer that should have done so has failed to."""
        newest = next(iter(self._records.snapshots()), 0)
        if self._catalog.num_records - newest >= SNAPSHOT_EVERY:
            self.save_snapshot()

    def covered(self) -> int:
        """Return the number of the last record that can be removed; 0 if none can.

        Two snapshots must lead to the present state, so that one may get damaged; what the older
        of them holds is covered.
        """
        with self._lock:
            data = self._catalog.to_data()
        covering = (n for n in self._records.snapshots() if self._records.leads_to(n, data))
        return next(islice(covering, 1, None), 0)


def check_may_write(may_write: bool) -> None:
    """Raise AccessDenied in a process that leaves writing to another one."""
    if not may_write:
        raise AccessDenied(
            "this process writes nothing to the store: adapters.single_writer is true, so "
            "adapters are published with `reef --single-writer` alone"
        )
