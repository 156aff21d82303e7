"""Map names to digests by an append-only log in the object store, replayed into memory.

Record n is the object log/<n>, written with put-if-absent: if several writers try one number, one
succeeds, and the others read its record and try the next number. So no record is lost, every record
was valid when it was written, and following the log takes one LIST after the last key seen.
Snapshots only shorten the start: a damaged one is skipped. A damaged record is not: what follows it
may depend on it, so reading stops before it, and `damage` says so until the record is repaired.
"""

import gzip
import json
import logging
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby, islice
from typing import Any, cast

from adapter_store.catalog import Catalog
from adapter_store.errors import (
    AdapterNotFound,
    ObjectNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.manifest import AdapterManifest
from adapter_store.names import AdapterRecord, AdapterRef, check_alias, check_name, split_name
from adapter_store.object_store import ObjectStore

SNAPSHOT_EVERY = 256  # records
_SNAPSHOT_DAMAGE = (
    *(OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError),
    *(OverflowError, RecursionError, ObjectNotFound, StoreCorrupt),
)
_log = logging.getLogger(__name__)

Record = dict[str, Any]


class Registry:
    """The names in one object store. Thread-safe.

    Reads answer from memory as of the last `refresh`; writes refresh first. The constructor,
    `refresh` and all writes may raise SourceUnavailable; `refresh` and the writes StoreCorrupt too.
    """

    def __init__(self, store: ObjectStore, wall_clock: Callable[[], float]) -> None:
        self._store = store
        self._wall_clock = wall_clock
        self._refreshing = threading.Lock()  # held over I/O
        self._lock = threading.Lock()  # held over memory only
        self._damage: str | None = None
        self._catalog = self._load_snapshot()
        with suppress(StoreCorrupt):  # known names are served all the same
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

    def resolve(self, tenant: str, full_name: str, base: str | None = None) -> AdapterRef:
        """Return what name[@version|alias] means. Raises InvalidName, AdapterNotFound."""
        with self._lock:
            return self._catalog.resolve(tenant, full_name, base)

    def list(self, tenant: str | None = None) -> Sequence[AdapterRecord]:
        """List the live versions, of one tenant or of all."""
        with self._lock:
            return tuple(self._catalog.list(tenant))

    def list_from(self, tenant: str, first_name: str, num_names: int) -> Sequence[AdapterRecord]:
        """List the live versions of the tenant's next names, from this one on."""
        with self._lock:
            by_name = groupby(self._catalog.list_from(tenant, first_name), lambda r: r.name)
            return [record for _, records in islice(by_name, num_names) for record in records]

    def publish(self, tenant: str, name: str, manifest: AdapterManifest) -> AdapterRef:
        """Append the name's next version, unless the latest has this very content; return it.

        Raises InvalidName.
        """
        check_name("tenant", tenant)
        check_name("adapter", name)

        def record(catalog: Catalog) -> Record | None:
            found = catalog.find_digest(tenant, name, manifest.digest)
            if found is not None and found == catalog.latest(tenant, name, manifest.base):
                return None
            return {
                "kind": "publish",
                "tenant": tenant,
                "name": name,
                "version": catalog.num_versions(tenant, name) + 1,
                "digest": manifest.digest,
                "base": manifest.base,
                "lora_rank": manifest.lora_rank,
                "nbytes": manifest.nbytes,
                "published_s": self._wall_clock(),
            }

        self._append(record)
        with self._lock:
            version = self._catalog.find_digest(tenant, name, manifest.digest)
        if version is None:
            raise AdapterNotFound(f"{name} of tenant {tenant} was retired while it was published")
        return AdapterRef(tenant, name, version, manifest.digest, manifest.base)

    def alias(self, tenant: str, name: str, alias: str, version: int) -> None:
        """Make name@alias mean this version from now on. Raises InvalidName, AdapterNotFound."""
        check_alias(alias)

        def record(catalog: Catalog) -> Record:
            ref = catalog.resolve(tenant, f"{check_name('adapter', name)}@{version}")
            return {
                "kind": "alias",
                "tenant": tenant,
                "name": name,
                "alias": alias,
                "version": ref.version,
            }

        self._append(record)

    def retire(self, tenant: str, full_name: str) -> tuple[int, ...]:
        """Withdraw name@version, or every version of a bare name; return the versions withdrawn.

        Raises InvalidName, AdapterNotFound.
        """
        retired: tuple[int, ...] = ()

        def record(catalog: Catalog) -> Record:
            nonlocal retired
            ref = catalog.resolve(tenant, full_name)
            name, _ = split_name(full_name)
            retired = (ref.version,) if "@" in full_name else catalog.live_versions(tenant, name)
            return {"kind": "retire", "tenant": tenant, "name": name, "versions": list(retired)}

        self._append(record)
        return retired

    # ---- the log -------------------------------------------------------------------------------

    def _read_log(self) -> None:
        keys = self._store.list("log/", start_after=_log_key(self._catalog.num_records))
        if self._damage is not None:
            # Read the damaged record alone first: all that follow it need not be read every time.
            self._apply_records(keys[:1])
            keys = keys[1:]
        self._apply_records(keys)

    def _apply_records(self, keys: Sequence[str]) -> None:
        for key, raw in zip(keys, self._store.get_many(keys), strict=True):
            record = self._parse_record(key, raw)
            with self._lock:
                try:
                    self._catalog.apply(record)
                except StoreCorrupt as error:
                    raise StoreCorrupt(f"{key}: {error}") from error

    def _append(self, make_record: Callable[[Catalog], Record | None]) -> None:
        """Append the record that `make_record` derives from the newest state, unless it is None."""
        while True:
            self.refresh()
            with self._lock:
                record = make_record(self._catalog)
                number = self._catalog.num_records + 1
            if record is None:
                return
            written = self._store.put_if_absent(_log_key(number), _encode(record))
            self.refresh()
            if self._catalog.num_records < number:
                raise SourceUnavailable(f"the store has record {number} but does not list it")
            if written:
                self._check_kept(_log_key(number), _encode(record))
                if number % SNAPSHOT_EVERY == 0:
                    self._save_snapshot()
                return

    def _check_kept(self, key: str, raw: bytes) -> None:
        """Raise StoreCorrupt if another writer has replaced the record that was written here."""
        if self._store.get(key) != raw:
            raise StoreCorrupt(
                f"{key} was overwritten by another writer just after it was written here, so this "
                "change is lost: the object store does not keep one of two concurrent "
                "conditional writes"
            )

    def _parse_record(self, key: str, raw: bytes) -> Record:
        if key != _log_key(self._catalog.num_records + 1):
            raise StoreCorrupt(f"{key} is there, but not the record before it")
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise StoreCorrupt(f"{key} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise StoreCorrupt(f"{key} is not a JSON object")
        return cast("Record", record)

    # ---- snapshots -----------------------------------------------------------------------------

    def _save_snapshot(self) -> None:
        with self._lock:
            number, data = self._catalog.num_records, self._catalog.to_data()
        # mtime=0: equal states give equal bytes in every process.
        self._store.put_if_absent(_snapshot_key(number), gzip.compress(_encode(data), mtime=0))

    def _load_snapshot(self) -> Catalog:
        for key in reversed(self._store.list("snapshots/")):
            try:
                catalog = Catalog.from_data(json.loads(gzip.decompress(self._store.get(key))))
                if key != _snapshot_key(catalog.num_records):
                    raise ValueError(f"it is snapshot {catalog.num_records}")
                return catalog
            except _SNAPSHOT_DAMAGE as error:
                _log.warning("skipping the damaged snapshot %s: %r", key, error)
        return Catalog()


def _log_key(number: int) -> str:
    return f"log/{number:020}.json"


def _snapshot_key(number: int) -> str:
    return f"snapshots/{number:020}.json.gz"


def _encode(data: Record) -> bytes:
    return json.dumps(data, sort_keys=True).encode()
