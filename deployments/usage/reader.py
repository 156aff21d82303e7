"""Reads records: of the object store, and of files on disk, each record once.

A stream: at most one object or segment is in memory.
"""

import gzip
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from msgspec import DecodeError

from adapter_store.object_store import ObjectStore
from deployments.usage.record import LostUsage, UsageRecord, decode_json, unchecked
from deployments.usage.spool import CLOSED, DAY_S, OPEN, day_of
from deployments.usage.uploader import DAMAGED, PREFIX, SUFFIX

PLAIN = ".jsonl"
_LOCAL = (OPEN, CLOSED, DAMAGED)


class NotUsage(Exception):
    """A file or an object holds no usage records; the message names it."""


@dataclass(slots=True)
class Found:
    """What was found beside records that count."""

    repeated: int = 0
    damaged_lines: int = 0
    lost: dict[str, LostUsage] = field(default_factory=dict[str, LostUsage])  # by writer

    @property
    def lost_requests(self) -> int:
        return sum(each.requests for each in self.lost.values())


class Seen:
    """Which records have been read: ranges of each writer's numbers, as they nearly come in order.

    Memory follows the gaps between the numbers, not the number of records.
    """

    def __init__(self) -> None:
        self._ranges: dict[str, list[list[int]]] = {}  # [first, behind the last], sorted

    def add(self, record_id: str) -> bool:
        """Note a record; tell whether it is new. Raises ValueError for an id that is none."""
        writer, _, digits = record_id.rpartition("-")
        number = int(digits)
        ranges = self._ranges.setdefault(writer, [])
        if ranges and ranges[-1][1] == number:  # nearly always
            ranges[-1][1] += 1
            return True
        at = bisect_right(ranges, number, key=lambda each: each[0])
        if at and number < ranges[at - 1][1]:
            return False
        joins_left = at > 0 and ranges[at - 1][1] == number
        joins_right = at < len(ranges) and ranges[at][0] == number + 1
        if joins_left and joins_right:
            ranges[at - 1][1] = ranges.pop(at)[1]
        elif joins_left:
            ranges[at - 1][1] += 1
        elif joins_right:
            ranges[at][0] -= 1
        else:
            ranges.insert(at, [number, number + 1])
        return True


def read_records(
    store: ObjectStore | None, paths: Iterable[Path], found: Found, since_s: float = 0.0
) -> Iterator[UsageRecord]:
    """Yield the records of the store and of files and folders.

    Segments of days before `since_s` are not read, so some earlier records may come as well.
    Raises NotUsage, AdapterStoreError, OSError.
    """
    seen = Seen()
    for name, lines in _sources(store, paths, since_s):
        for data in lines:
            if data is None:
                found.damaged_lines += 1
                continue
            try:
                line = decode_json(data)
                if isinstance(line, LostUsage):
                    _keep_largest(found.lost, line)
                elif seen.add(line.id):
                    yield line
                else:
                    found.repeated += 1
            except (DecodeError, ValueError) as error:
                raise NotUsage(f"{name} holds a line that is no usage record: {error}") from None


def _keep_largest(lost: dict[str, LostUsage], line: LostUsage) -> None:
    known = lost.get(line.writer)
    if known is None or known.requests < line.requests:
        lost[line.writer] = line


def _sources(
    store: ObjectStore | None, paths: Iterable[Path], since_s: float
) -> Iterator[tuple[str, Iterable[bytes | None]]]:
    if store is not None:
        # A segment may be open over midnight.
        first = PREFIX + day_of(max(since_s - DAY_S, 0.0))
        for key in store.list(PREFIX, start_after=first):
            yield key, _object_lines(key, store.get(key))
    for path in paths:
        inside = sorted(each for each in path.iterdir() if _is_ours(each)) if path.is_dir() else ()
        for each in inside if path.is_dir() else [path]:
            yield str(each), _file_lines(each)


def _is_ours(path: Path) -> bool:
    return path.name.endswith((*_LOCAL, PLAIN, SUFFIX))


def _object_lines(name: str, data: bytes) -> list[bytes]:
    try:
        return gzip.decompress(data).splitlines()
    except (OSError, EOFError) as error:
        raise NotUsage(f"{name} is damaged: {error}") from None


def _file_lines(path: Path) -> Iterator[bytes | None]:
    if path.name.endswith(SUFFIX):
        yield from _object_lines(str(path), path.read_bytes())
        return
    is_local = path.suffix in _LOCAL
    with path.open("rb") as file:
        for line in file:
            if path.suffix == OPEN and not line.endswith(b"\n"):
                return  # it is being written
            yield unchecked(line.rstrip(b"\n")) if is_local else line
