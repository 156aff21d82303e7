"""KeyTable: the keys in the adapter store, as of the records of their log. No I/O, no clock.

A record holds a key's hash, never the key. What a key was for stays known after its end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from adapter_store.errors import InvalidName, StoreCorrupt
from adapter_store.names import check_name
from deployments.tenants.key_id import key_id

Scope = Literal["infer", "publish", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
OF_TENANTS: tuple[Scope, ...] = ("infer", "publish")
_MISFITS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, InvalidName)


@dataclass(slots=True)
class StoredKey:
    """A key. Times are in seconds since 1970; `id` tells nothing of the key or its hash."""

    digest: bytes
    tenant: str  # empty for admin and metrics, which are for all of them
    name: str  # who has it, as the audit log calls them
    scopes: tuple[Scope, ...]
    created_s: float
    created_by: str = ""
    expires_s: float | None = None
    revoked_s: float | None = None

    @property
    def id(self) -> str:
        return key_id(self.digest)

    def is_valid(self, now_s: float) -> bool:
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)


class KeyTable:
    """All keys that were ever made."""

    def __init__(self) -> None:
        self.num_records = 0
        self.head: str | None = None
        self._keys: dict[bytes, StoredKey] = {}
        self._digests: dict[str, bytes] = {}  # by id
        self._scopes: dict[tuple[Scope, ...], tuple[Scope, ...]] = {}  # each kept once

    def find(self, digest: bytes) -> StoredKey | None:
        return self._keys.get(digest)

    def by_id(self, wanted: str) -> StoredKey | None:
        return self._keys.get(self._digests.get(wanted, b""))

    def list(self, tenant: str | None = None) -> Sequence[StoredKey]:
        """List the keys in the order in which they were made, of one tenant or all."""
        return [key for key in self._keys.values() if tenant in (None, key.tenant)]

    def apply(self, record: Mapping[str, Any], sha256: str | None = None) -> None:
        """Apply the next record of the log; StoreCorrupt, and no change, if it does not fit."""
        number = self.num_records + 1
        try:
            {"create": self._create, "rotate": self._rotate, "end": self._end}[record["kind"]](
                record
            )
        except _MISFITS as error:
            raise StoreCorrupt(f"key record {number} does not make sense: {error!r}") from error
        self.num_records, self.head = number, sha256

    def to_data(self) -> dict[str, Any]:
        keys = [{**asdict(key), "digest": key.digest.hex()} for key in self._keys.values()]
        return {"format": 1, "num_records": self.num_records, "head": self.head, "keys": keys}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "KeyTable":
        """Restore a state from `to_data`; KeyError, TypeError or ValueError for other data."""
        if data["format"] != 1:
            raise ValueError(f"format {data['format']!r} is not 1")
        table = cls()
        table.num_records, table.head = int(data["num_records"]), data["head"]
        for entry in cast(Iterable[Mapping[str, Any]], data["keys"]):
            key = table._read(entry)
            key.revoked_s = entry["revoked_s"]
            table._add(key)
        return table

    def _create(self, record: Mapping[str, Any]) -> None:
        self._add(self._read(record))

    def _add(self, key: StoredKey) -> None:
        if key.digest in self._keys or key.id in self._digests:
            raise ValueError("the key is there already")
        self._keys[key.digest] = key
        self._digests[key.id] = key.digest

    def _rotate(self, record: Mapping[str, Any]) -> None:
        """Add a key in place of another, which ends a while later."""
        old, expires_s = self._keys[bytes.fromhex(record["old"])], float(record["old_expires_s"])
        self._create(record)
        old.expires_s = expires_s if old.expires_s is None else min(old.expires_s, expires_s)

    def _end(self, record: Mapping[str, Any]) -> None:
        """Set when a key expires, or revoke it for good."""
        key = self._keys[bytes.fromhex(record["digest"])]
        if record["revoked_s"] is not None:
            key.revoked_s = float(record["revoked_s"])
        else:
            expires_s = record["expires_s"]
            key.expires_s = None if expires_s is None else float(expires_s)

    def _read(self, record: Mapping[str, Any]) -> StoredKey:
        digest, expires_s = bytes.fromhex(record["digest"]), record["expires_s"]
        if len(digest) != 32:
            raise ValueError(f"a hash has 32 bytes, not {len(digest)}")
        scopes = tuple(record["scopes"])
        return StoredKey(
            digest,
            str(record["tenant"]),
            str(record["name"]),
            self._scopes.setdefault(check_scopes(record["tenant"], scopes), scopes),
            float(record["created_s"]),
            str(record.get("by") or record.get("created_by", "")),
            None if expires_s is None else float(expires_s),
        )


def check_scopes(tenant: str, scopes: Sequence[str]) -> tuple[Scope, ...]:
    """Return the scopes of a key, in order. Raises ValueError, InvalidName."""
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        given = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"a key has one or more of the scopes {', '.join(SCOPES)}, not {given}")
    for scope in scopes:
        if (scope in OF_TENANTS) != bool(tenant):
            whose = "needs a tenant" if scope in OF_TENANTS else "is for all tenants: name none"
            raise ValueError(f"a key of scope {scope} {whose}")
    if tenant:
        check_name("tenant", tenant)
    return tuple(scope for scope in SCOPES if scope in scopes)
