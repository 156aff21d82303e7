"""Spool: a process's append-only log of records, in segments that are uploaded and then removed.

`<day>_<writer>-<number>.open` is written, `.log` is closed and changes no more. All writers of one
machine share the folder, and its bound.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from deployments.usage.record import checked, unchecked

SEGMENT_BYTES = 8 * 2**20
DAY_S = 86_400
OPEN, CLOSED = ".open", ".log"


class SpoolFull(Exception):
    """The folder holds as much as it may."""


class Segment:
    """The one file that a writer appends to."""

    def __init__(self, path: Path, now_s: float) -> None:
        self.path = path
        self.opened_s = now_s
        self._file: BinaryIO = path.open("xb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # until the writer closes it, or dies
        self.num_bytes = 0

    def append(self, lines: Sequence[bytes]) -> None:
        """Write the JSON of records and flush it to disk. Raises OSError, and has no part then."""
        data = b"".join(map(checked, lines))
        try:
            _write_all(self._file, data)
            os.fdatasync(self._file.fileno())
        except OSError:
            self._file.truncate(self.num_bytes)  # frees room: it cannot fail for want of it
            self._file.seek(self.num_bytes)
            raise
        self.num_bytes += len(data)

    def close(self) -> None:
        self.path.rename(self.path.with_suffix(CLOSED))
        self._file.close()


class Spool:
    """The segments of one writer."""

    def __init__(
        self,
        folder: Path,
        writer: str,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._folder = folder
        self._writer = writer
        self._max_bytes = max_bytes
        self._clock = clock
        self._segment_bytes = segment_bytes
        self._segment: Segment | None = None
        self._number = 0

    def append(self, lines: Sequence[bytes]) -> None:
        """Make records durable. Raises OSError or SpoolFull; then none of them is."""
        if folder_bytes(self._folder) >= self._max_bytes:
            raise SpoolFull(f"{self._folder} holds usage.max_bytes ({self._max_bytes}) already")
        if self._segment is None:
            self._segment = self._opened()
        self._segment.append(lines)

    def rotate(self, older_s: float = 0.0) -> None:
        """Close the segment if it is large or at least so old: then it can be uploaded.

        Not before what was appended is out of the journal: a closed segment is never searched for
        the records of a dead process.
        """
        segment = self._segment
        if segment is None:
            return
        is_old = self._clock() - segment.opened_s >= older_s
        if is_old or segment.num_bytes >= self._segment_bytes:
            self._segment = None
            segment.close()

    def _opened(self) -> Segment:
        now_s = self._clock()
        self._number += 1
        name = f"{day_of(now_s)}_{self._writer}-{self._number:06}{OPEN}"
        return Segment(self._folder / name, now_s)


def day_of(time_s: float) -> str:
    """Write the day of a time in seconds since 1970, in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime(time_s))


def folder_bytes(folder: Path) -> int:
    """Sum the sizes of all segments in a folder."""
    total = 0
    for entry in os.scandir(folder):
        if entry.name.endswith((OPEN, CLOSED)):
            try:
                total += entry.stat().st_size
            except FileNotFoundError:  # just uploaded
                continue
    return total


def writer_of(path: Path) -> str:
    """Return the writer that a segment is of."""
    return path.name.partition("_")[2].partition("-")[0]


def closed_segments(folder: Path) -> list[Path]:
    """List the segments that change no more, the oldest first."""
    return sorted(folder.glob(f"*{CLOSED}"))


def read_segment(path: Path) -> Iterator[bytes | None]:
    """Yield the JSON of each line; None for a damaged one."""
    with path.open("rb") as file:
        for line in file:
            yield unchecked(line[:-1]) if line.endswith(b"\n") else None


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = file.write(view)
        view = view[written:]
