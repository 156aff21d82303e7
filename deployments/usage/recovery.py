"""Recovery: takes what a dead process of this machine has left, each record once.

The records of its journal that are not yet in its open segment are appended there; then the journal
is removed, then the segment is closed. A recovery that is killed itself is begun again by the next
one, which finds the records that the first has appended.
"""

import fcntl
import logging
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from msgspec import DecodeError

from deployments.usage.journal import DeadJournal
from deployments.usage.record import (
    Line,
    LostUsage,
    UsageRecord,
    checked,
    decode_json,
    encode_json,
    unchecked,
)
from deployments.usage.records import record_of
from deployments.usage.spool import CLOSED, OPEN, day_of, writer_of

JOURNAL = ".journal"

logger = logging.getLogger(__name__)


def recover(folder: Path) -> int:
    """Finish what dead processes have left. Returns how many records that brought.

    Raises OSError, and can be called again.
    """
    num = 0
    for path in sorted([*folder.glob(f"*{JOURNAL}"), *folder.glob("*.new")]):
        journal = DeadJournal.open(path)
        if journal is not None:
            num += _finish(folder, path.stem, journal)
    alive = {path.stem for path in folder.glob(f"*{JOURNAL}")}
    for path in folder.glob(f"*{OPEN}"):
        if writer_of(path) not in alive:
            _close(path)
    return num


def _finish(folder: Path, writer: str, journal: DeadJournal) -> int:
    lines = list(_lines(writer, journal))
    found = next(iter(folder.glob(f"*_{writer}-*{OPEN}")), None)
    path = found or folder / f"{day_of(time.time())}_{writer}-last{OPEN}"
    try:
        num = _append_missing(path, lines) if lines or found else 0
    except BaseException:
        journal.release()
        raise
    journal.remove()
    if path.exists():
        path.rename(path.with_suffix(CLOSED))
    return num


def _lines(writer: str, journal: DeadJournal) -> Iterator[Line]:
    for slot in journal.slots:
        try:
            yield record_of(slot)
        except DecodeError as error:
            logger.error("usage: a slot of %s is damaged: %s: %r", writer, error, slot)
    if journal.lost[0]:
        yield LostUsage(
            writer=writer,
            requests=journal.lost[0],
            prompt_tokens=journal.lost[1],
            output_tokens=journal.lost[2],
        )


def _append_missing(path: Path, lines: list[Line]) -> int:
    """Append the records that a segment has not, behind its last whole line."""
    with _locked(path) as file:
        if file is None:
            raise OSError(f"{path} is locked, though its process is dead")
        known = _read_whole(file)
        new = [each for each in lines if not isinstance(each, UsageRecord) or each.id not in known]
        file.write(b"".join(checked(encode_json(each)) for each in new))
        file.flush()
        os.fdatasync(file.fileno())
    return sum(isinstance(each, UsageRecord) for each in new)


def _close(path: Path) -> None:
    """Close a segment whose journal is gone, unless it is being written."""
    with _locked(path) as file:
        if file is not None:
            _read_whole(file)
            path.rename(path.with_suffix(CLOSED))


def _read_whole(file: BinaryIO) -> set[str]:
    """Cut off the torn end. Returns the ids of the records before it."""
    ids, end = set[str](), 0
    for raw in file:
        data = unchecked(raw[:-1]) if raw.endswith(b"\n") else None
        if data is None:
            break
        end += len(raw)
        line = decode_json(data)
        if isinstance(line, UsageRecord):
            ids.add(line.id)
    file.seek(end)
    file.truncate()
    return ids


@contextmanager
def _locked(path: Path) -> Generator[BinaryIO | None]:
    """Open a segment of a dead process, new or not; None if a live one has it, or if it is gone."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file
