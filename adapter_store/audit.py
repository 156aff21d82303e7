"""AuditLog: who has changed what and when, as the records of the log say.

The log itself is the audit log: a change and the entry on it are one object, so neither is there
without the other, and each record holds the SHA-256 of the one before. Records that snapshots stand
for are removed some day; before that their bytes are put into archives, audit/<first>-<last>.
Archives are never changed, and may overlap where a collector was stopped.
"""

import gzip
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapter_store.errors import ObjectNotFound, StoreCorrupt
from adapter_store.object_store import ObjectStore
from adapter_store.record_log import log_key, number_of

MAX_AUDITED = 1000  # entries that one page looks at
ARCHIVED = 256  # records in one archive
_ARCHIVE = re.compile(r"audit/([0-9]{20})-([0-9]{20})\.json\.gz")
_HEAD = ("kind", "tenant", "name", "by", "at_s", "previous")


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change. `tenant` and `name` are empty where it is about no adapter's name."""

    number: int  # of the record
    at_s: float  # seconds since 1970 by the clock of the writer; 0 if the record does not say
    by: str  # who; empty if the record does not say
    kind: str  # publish, alias, retire, restore, delete, verdict, collect
    tenant: str
    name: str
    details: Mapping[str, Any]  # versions, digest and the like


@dataclass(frozen=True, slots=True)
class AuditPage:
    """Entries, the newest first. `next_before` begins the page that follows; None: no more."""

    entries: Sequence[AuditEntry]
    next_before: int | None


class AuditLog:
    """The audit log of one object store. Holds no state."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def archive(self, keys: Sequence[str]) -> None:
        """Keep the records of these keys, which are going to be removed. Raises StoreCorrupt."""
        numbers = sorted(number for key in keys if (number := number_of(key)) is not None)
        for start in range(0, len(numbers), ARCHIVED):
            some = numbers[start : start + ARCHIVED]
            self._write(some, self._raw_records(some))

    def read(self, last: int, limit: int, tenant: str | None) -> AuditPage:
        """Look at entries from this number downwards; leave out those of other tenants."""
        if not 1 <= limit <= MAX_AUDITED:
            raise ValueError(f"limit must be in [1, {MAX_AUDITED}], not {limit}")
        first = max(1, last - limit + 1)
        numbers = list(range(first, last + 1))
        raw: dict[int, str] = {}
        for _ in range(2):  # the second time for what was archived after the first look
            raw |= self._archived([number for number in numbers if number not in raw])
            raw |= self._raw_records([number for number in numbers if number not in raw])
        entries = [_entry(number, raw[number]) for number in reversed(numbers) if number in raw]
        wanted = [entry for entry in entries if tenant in (None, entry.tenant)]
        return AuditPage(wanted, first if first > 1 else None)

    def _raw_records(self, numbers: Sequence[int]) -> dict[int, str]:
        """Read the records that are still in the log."""
        if not numbers:
            return {}
        try:
            found = self._objects.get_many([log_key(number) for number in numbers])
            return {number: raw.decode() for number, raw in zip(numbers, found, strict=True)}
        except ObjectNotFound:
            middle = len(numbers) // 2
            if not middle:
                return {}
            return self._raw_records(numbers[:middle]) | self._raw_records(numbers[middle:])
        except UnicodeDecodeError as error:
            raise StoreCorrupt(
                f"a record after {log_key(numbers[0])} is damaged: {error}"
            ) from error

    def _write(self, numbers: Sequence[int], raw: Mapping[int, str]) -> None:
        if not raw:  # another collector was faster
            return
        content = json.dumps({str(number): raw[number] for number in numbers if number in raw})
        key = f"audit/{min(numbers):020}-{max(numbers):020}.json.gz"
        self._objects.put_if_absent(key, gzip.compress(content.encode(), mtime=0))

    def _archived(self, numbers: Sequence[int]) -> dict[int, str]:
        """Read what the archives have of these records."""
        missing = set(numbers)
        found: dict[int, str] = {}
        for key in self._objects.list("audit/") if missing else ():
            match = _ARCHIVE.fullmatch(key)
            if match is None or not missing & set(range(int(match[1]), int(match[2]) + 1)):
                continue
            found |= {n: raw for n, raw in self._archive(key).items() if n in missing}
        return found

    def _archive(self, key: str) -> dict[int, str]:
        try:
            content: dict[str, Any] = json.loads(gzip.decompress(self._objects.get(key)))
            return {int(number): str(raw) for number, raw in content.items()}
        except (OSError, EOFError, zlib.error, ValueError, AttributeError) as error:
            raise StoreCorrupt(f"{key} is damaged: {error!r}") from error


def _entry(number: int, raw: str) -> AuditEntry:
    try:
        record: dict[str, Any] = json.loads(raw)
        details = {name: value for name, value in record.items() if name not in _HEAD}
        return AuditEntry(
            number=number,
            at_s=float(record.get("at_s", record.get("published_s", 0.0))),
            by=str(record.get("by", "")),
            kind=str(record["kind"]),
            tenant=str(record.get("tenant", "")),
            name=str(record.get("name", "")),
            details=details,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreCorrupt(f"{log_key(number)} makes no sense: {error!r}") from error
