"""Keep the records of an append-only log and snapshots of its state in the object store.

Record n is the object log/<n> below the log's prefix, written with put-if-absent: if several
writers try one number, one succeeds. Each record holds the SHA-256 of the one before it. So a
reader notices when the records that it has not read yet were removed, even if a writer that slept
meanwhile has put its own in a place that became free: then a snapshot says what they did.
"""

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from adapter_store.errors import ObjectNotFound, StoreCorrupt
from adapter_store.object_store import ObjectStore

SNAPSHOT_LEVEL = 3  # of gzip; 9 takes four times as long and saves a tenth
MAX_LISTINGS = 5  # of snapshots, if those that are listed have just been removed
_SNAPSHOT_DAMAGE = (
    *(OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError, StoreCorrupt),
)
_NUMBERED = re.compile(r"(?:log/([0-9]{20})\.json|snapshots/([0-9]{20})\.json\.gz)")
_log = logging.getLogger(__name__)

Record = dict[str, Any]


class LogState(Protocol):
    """What the records of a log make, one after the other."""

    num_records: int
    head: str | None  # SHA-256 of the last record as it was written, if known

    def apply(self, record: Mapping[str, Any], sha256: str | None = None) -> None:
        """Apply the next record; StoreCorrupt, and no change, if it does not fit."""
        ...

    def to_data(self) -> dict[str, Any]:
        """Return the whole state as JSON values: the content of a snapshot."""
        ...


S = TypeVar("S", bound=LogState)


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as it was read."""

    record: Record
    sha256: str

    def may_follow(self, head: str | None) -> bool:
        """Check the link to the record before it, if both this one and the reader know that one."""
        previous = self.record.get("previous")
        return previous is None or head is None or previous == head


class LogBroken(Exception):
    """The next record cannot be read: it is gone, or it does not follow what was read before.

    `pending` was read just before that, and nothing shows that it is part of the log.
    """

    def __init__(self, reason: str, pending: Entry | None = None) -> None:
        super().__init__(reason)
        self.pending = pending


class RecordLog(Generic[S]):
    """The log and the snapshots in one object store. Holds no state.

    `restore` makes a state of a snapshot's content.
    """

    def __init__(
        self,
        store: ObjectStore,
        restore: Callable[[Mapping[str, Any]], S],
        reader: ObjectStore | None = None,
        prefix: str = "",
    ) -> None:
        self._store = store
        self._restore = restore
        self._reader = reader or store
        self._prefix = prefix

    def key_of(self, number: int) -> str:
        """Return the key of a record."""
        return self._prefix + log_key(number)

    # ---- records -------------------------------------------------------------------------------

    def keys_after(self, number: int) -> Sequence[str]:
        """List the keys of the records after this one."""
        return self._reader.list(f"{self._prefix}log/", start_after=self.key_of(number))

    def read(
        self, keys: Sequence[str], number: int, head: str | None
    ) -> Generator[Entry, None, None]:
        """Read the records of these keys, which must continue record `number` of SHA-256 `head`.

        A record is held back until the next one confirms it. Raises StoreCorrupt at a record that
        is not one, LogBroken at one that is not the next.
        """
        num_next = sum(1 for n, key in enumerate(keys, number + 1) if key == self.key_of(n))
        pending: Entry | None = None
        for key, raw in zip(keys[:num_next], self._read(keys[:num_next]), strict=True):
            try:
                entry = _parse(key, raw)
            except StoreCorrupt:
                if pending is not None:
                    yield pending
                raise
            if not entry.may_follow(head):
                raise LogBroken(f"{key} does not follow the record before it", pending)
            if pending is not None:
                yield pending
            pending, head = entry, entry.sha256
        if num_next < len(keys):
            reason = f"{keys[num_next]} is there, but not the record before it"
            raise LogBroken(reason, pending)
        if pending is not None:
            yield pending

    def append(self, number: int, raw: bytes) -> bool:
        """Write a record unless there is one of this number; return whether it was written."""
        return self._store.put_if_absent(self.key_of(number), raw)

    def check_kept(self, number: int, raw: bytes) -> None:
        """Raise StoreCorrupt if another writer has replaced the record that was written here."""
        try:
            found = self._store.get(self.key_of(number))
        except ObjectNotFound:  # removed since, like every record that a snapshot covers
            return
        if found != raw:
            raise StoreCorrupt(
                f"{self.key_of(number)} was overwritten by another writer just after it was "
                "written here, so this change is lost: the object store does not keep one of two "
                "concurrent conditional writes"
            )

    def _read(self, keys: Sequence[str]) -> Sequence[bytes]:
        try:
            return self._reader.get_many(keys)
        except ObjectNotFound as error:  # removed after it was listed
            raise LogBroken(str(error)) from error

    # ---- snapshots -----------------------------------------------------------------------------

    def snapshots(self) -> Sequence[int]:
        """List the numbers of the records after which there is a snapshot, the newest first."""
        keys = self._reader.list(f"{self._prefix}snapshots/")
        numbers = [number_of(key.removeprefix(self._prefix)) for key in keys]
        return sorted((number for number in numbers if number is not None), reverse=True)

    def save_snapshot(self, number: int, encoded: bytes) -> None:
        """Write a state's data after this record unless there is a snapshot of it."""
        # mtime=0: equal states give equal bytes in every process.
        raw = gzip.compress(encoded, SNAPSHOT_LEVEL, mtime=0)
        self._store.put_if_absent(self._prefix + snapshot_key(number), raw)

    def load_snapshot(self, number: int) -> S | None:
        """Restore the state after this record; None, and a warning, if the snapshot is damaged.

        Raises ObjectNotFound.
        """
        key = self._prefix + snapshot_key(number)
        raw = self._reader.get(key)
        try:
            state = self._restore(json.loads(gzip.decompress(raw)))
            if state.num_records != number:
                raise ValueError(f"it is snapshot {state.num_records}")
            return state
        except _SNAPSHOT_DAMAGE as error:
            _log.warning("skipping the damaged snapshot %s: %r", key, error)
            return None

    def newest_snapshot(self, after: int) -> S | None:
        """Restore the newest snapshot that can be read, if it is of a record after this one."""
        for _ in range(MAX_LISTINGS):
            try:
                for number in self.snapshots():
                    if number <= after:
                        break
                    if state := self.load_snapshot(number):
                        return state
                return None
            except ObjectNotFound:  # removed after it was listed, so there are newer ones
                continue
        return None

    def leads_to(self, number: int, data: Mapping[str, Any]) -> bool:
        """Check that a snapshot and the records after it give a state of this data."""
        num_more = data["num_records"] - number
        if num_more < 0:
            return False
        try:
            state = self.load_snapshot(number)
            if state is None:
                return False
            keys = self.keys_after(number)[:num_more]
            for entry in self.read(keys, number, state.head):
                state.apply(entry.record, entry.sha256)
        except (LogBroken, ObjectNotFound, StoreCorrupt):
            return False
        return state.to_data() == data


def log_key(number: int) -> str:
    """Return the key of a record."""
    return f"log/{number:020}.json"


def snapshot_key(number: int) -> str:
    """Return the key of the snapshot after this record."""
    return f"snapshots/{number:020}.json.gz"


def number_of(key: str) -> int | None:
    """Return the number in the key of a record or a snapshot; None for any other key."""
    match = _NUMBERED.fullmatch(key)
    return None if match is None else int(match[1] or match[2])


def encode(data: Mapping[str, Any]) -> bytes:
    """Encode a record or the content of a snapshot."""
    return json.dumps(data, sort_keys=True).encode()


def _parse(key: str, raw: bytes) -> Entry:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StoreCorrupt(f"{key} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise StoreCorrupt(f"{key} is not a JSON object")
    return Entry(cast("Record", record), hashlib.sha256(raw).hexdigest())
