"""UsageWriter: brings what has ended from the journal to the log, and the log to the store.

Two threads, so that a store that hangs holds up no flush. Nothing here waits for anybody, and
nobody waits for it: while the disk takes nothing, what has ended stays in the journal; once that
is full, requests are served without a record, which is counted and written down when it can be.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapter_store.object_store import ObjectStore
from deployments.usage.journal import Journal
from deployments.usage.record import LostUsage, encode_json
from deployments.usage.records import record_of
from deployments.usage.spool import Spool, SpoolFull, folder_bytes
from deployments.usage.uploader import UploadCounts, Uploader

BATCH = 1000  # records that one flush takes
LOG_EVERY_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """What became of the records of this process so far."""

    written: int
    write_failures: int
    lost: int
    waiting: int  # running, or ended and not flushed
    spool_bytes: int  # of the folder: written, not uploaded
    upload: UploadCounts


class UsageWriter:
    def __init__(
        self,
        folder: Path,
        writer: str,
        journal: Journal,
        spool: Spool,
        store: ObjectStore | None,
        fsync_s: float,
        upload_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._writer = writer
        self._journal = journal
        self._spool = spool
        self._uploader = Uploader(folder, store)
        self._fsync_s = fsync_s
        self._upload_s = upload_s
        self._clock = clock
        self._num_written = self._num_failures = self._num_lost_noted = 0
        self._logged_s = -LOG_EVERY_S
        self._end = threading.Event()
        self._lock = threading.Lock()  # of the spool
        self._threads = [
            threading.Thread(target=self._write, name="usage-writer", daemon=True),
            threading.Thread(target=self._upload, name="usage-uploader", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Flush and close. What the store does not take now is uploaded by another process."""
        self._end.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self._fsync_s + 5.0)
        self.flush()
        with self._lock:
            self._spool.rotate()

    def flush(self) -> None:
        """Make all that has ended durable. Errors are counted and logged."""
        with self._lock:
            self._tried(self._flush_all)
            # Also where the log is full: what is closed is uploaded, and makes room.
            self._tried(lambda: self._spool.rotate(self._upload_s))

    def upload(self) -> None:
        """Upload what is closed."""
        self._uploader.run()

    @property
    def counts(self) -> UsageCounts:
        journal = self._journal
        return UsageCounts(
            self._num_written,
            self._num_failures,
            journal.lost[0],
            journal.num_taken,
            folder_bytes(self._folder),
            self._uploader.counts,
        )

    def _tried(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, SpoolFull) as error:
            self._num_failures += 1
            self._log("usage: records wait in memory, they cannot be written: %s", error)

    def _flush_all(self) -> None:
        while self._flush_some():
            pass

    def _flush_some(self) -> bool:
        """Flush one batch; tell whether there may be more."""
        ended = self._journal.ended(BATCH)
        lines = [encode_json(record_of(slot)) for slot in ended]
        lost = self._journal.lost
        if lost[0] > self._num_lost_noted:
            lines.append(encode_json(_lost(self._writer, lost)))
        if not lines:
            return False
        self._spool.append(lines)
        self._journal.free(len(ended))
        self._num_written += len(ended)
        if lost[0] > self._num_lost_noted:
            self._num_lost_noted = lost[0]
            self._log("usage: %d requests have no record: the log could not be written", lost[0])
        return len(ended) == BATCH

    def _write(self) -> None:
        while not self._end.wait(self._fsync_s):
            self._guarded(self.flush)

    def _upload(self) -> None:
        self._guarded(self.upload)  # what the last process has left
        while not self._end.wait(self._upload_s):
            self._guarded(self.upload)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            self._num_failures += 1
            logger.exception("usage: it is tried again")

    def _log(self, text: str, *values: object) -> None:
        """Log an error that may come with every flush."""
        now_s = self._clock()
        if now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s
            logger.error(text, *values)


def _lost(writer: str, lost: tuple[int, int, int]) -> LostUsage:
    return LostUsage(writer=writer, requests=lost[0], prompt_tokens=lost[1], output_tokens=lost[2])
