"""KeyBook: the keys in the adapter store, in a log of their own below keys/.

What one process writes is seen by all others that `refresh`. A new key is returned once, and kept
nowhere.
"""

import time
from collections.abc import Callable, Sequence

from adapter_store.followed_log import FollowedLog
from adapter_store.names import check_name
from adapter_store.object_store import ObjectStore
from adapter_store.record_log import Record, RecordLog
from deployments.tenants.key_id import draw_key, hash_key
from deployments.tenants.key_table import KeyTable, StoredKey, check_scopes

PREFIX = "keys/"


class KeyNotFound(Exception):
    """No key has this id."""


class KeyEnded(Exception):
    """The key was revoked or has expired, so it cannot be changed any more."""


class KeyBook(FollowedLog[KeyTable]):
    """Thread-safe. Reads answer from memory as of the last `refresh`; writes refresh first.

    The constructor, `refresh` and all writes may raise AdapterStoreError.
    """

    def __init__(
        self,
        store: ObjectStore,
        reader: ObjectStore | None = None,
        may_write: bool = True,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        records = RecordLog(store, KeyTable.from_data, reader, PREFIX)
        super().__init__(records, KeyTable(), wall_clock, may_write)

    def find(self, digest: bytes) -> StoredKey | None:
        return self._catalog.find(digest)  # one look into a dict: no lock is needed

    def list(self, tenant: str | None = None) -> Sequence[StoredKey]:
        """List the keys of a tenant, or of all, in the order in which they were made."""
        with self._lock:
            return self._catalog.list(tenant)

    def create(
        self,
        tenant: str,
        name: str,
        scopes: Sequence[str],
        expires_s: float | None = None,
        by: str = "",
    ) -> tuple[StoredKey, str]:
        """Make a key; return what is known of it, and the key. Raises ValueError, InvalidName."""
        check_name("name", name)
        wanted = check_scopes(tenant, scopes)
        key = draw_key()
        digest = hash_key(key)

        def record(table: KeyTable) -> Record:
            return {
                "kind": "create",
                "digest": digest.hex(),
                "tenant": tenant,
                "name": name,
                "scopes": list(wanted),
                "created_s": self._wall_clock(),
                "expires_s": expires_s,
            }

        self._append(record, by)
        return self._known(digest), key

    def rotate(self, key_id: str, overlap_s: float, by: str = "") -> tuple[StoredKey, str]:
        """Make a key for the same as this one, which goes on for `overlap_s`.

        A key that expires is followed by one that lasts as long as it did from its making. Raises
        KeyNotFound, KeyEnded.
        """
        key = draw_key()
        digest = hash_key(key)

        def record(table: KeyTable) -> Record:
            old, now_s = self._valid(table, key_id), self._wall_clock()
            life_s = None if old.expires_s is None else old.expires_s - old.created_s
            return {
                "kind": "rotate",
                "old": old.digest.hex(),
                "old_expires_s": now_s + overlap_s,
                "digest": digest.hex(),
                "tenant": old.tenant,
                "name": old.name,
                "scopes": list(old.scopes),
                "created_s": now_s,
                "expires_s": None if life_s is None else now_s + life_s,
            }

        self._append(record, by)
        return self._known(digest), key

    def revoke(self, key_id: str, by: str = "") -> StoredKey:
        """End a key at once and for good. Raises KeyNotFound."""

        def record(table: KeyTable) -> Record | None:
            found = _of_id(table, key_id)
            if found.revoked_s is not None:
                return None
            now_s = self._wall_clock()
            return {"kind": "end", "digest": found.digest.hex(), "revoked_s": now_s}

        self._append(record, by)
        return self._of_id(key_id)

    def expire(self, key_id: str, expires_s: float | None, by: str = "") -> StoredKey:
        """Set until when a key is valid; None is without end. Raises KeyNotFound, KeyEnded."""

        def record(table: KeyTable) -> Record:
            found = self._valid(table, key_id)
            digest = found.digest.hex()
            return {"kind": "end", "digest": digest, "revoked_s": None, "expires_s": expires_s}

        self._append(record, by)
        return self._of_id(key_id)

    def _valid(self, table: KeyTable, key_id: str) -> StoredKey:
        found = _of_id(table, key_id)
        if not found.is_valid(self._wall_clock()):
            raise KeyEnded(f"the key {key_id} has ended: make a new one")
        return found

    def _known(self, digest: bytes) -> StoredKey:
        found = self.find(digest)
        assert found is not None, "its record has just been read"
        return found

    def _of_id(self, key_id: str) -> StoredKey:
        with self._lock:
            return _of_id(self._catalog, key_id)


def _of_id(table: KeyTable, key_id: str) -> StoredKey:
    found = table.by_id(key_id)
    if found is None:
        raise KeyNotFound(f"there is no key {key_id[:40]!r}")
    return found
