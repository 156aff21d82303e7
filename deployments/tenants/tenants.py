"""Tenants: identify the tenant of a request by its API key, and follow what keys there are.

Keys are in the keys file, in the adapter store (`key_book`), or in both. When the file changes it
is read again within two seconds; if it is broken then, an error is logged and the old keys stay. So
do those of the store while it cannot be read; what others write to it is seen within five seconds.

`reef new-key` makes a key for the file (`new_key`), `reef keys` those of the store. Knows no
adapters, and of limits only their numbers.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from adapter_store.errors import AdapterStoreError
from deployments.config_sections import TenancySection
from deployments.policy.admission import NO_LIMITS, Limits
from deployments.tenants.key_book import KeyBook
from deployments.tenants.key_id import hash_key
from deployments.tenants.key_table import Scope, StoredKey
from deployments.tenants.keys_file import NO_KEYS, KeysFileError, read_keys
from deployments.tenants.tenant import PUBLIC, Publisher, Tenant, UploadLimits
from engine.scheduler.classes import PriorityClass

FOLLOW_S = 1.0
FOLLOW_STORE_S = 2.0  # a listing of the store each time

logger = logging.getLogger(__name__)


class KeyRefused(Exception):
    """No valid API key came with a request. The message repeats nothing of what did come."""


class RightMissing(Exception):
    """A valid key came that does not open this. The message repeats nothing of it."""


class Tenants(Protocol):
    """Who is asking. `authorization` and `api_key` are the headers that may hold a key."""

    asks_for_keys: bool

    def identify(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        """Find the tenant that a key belongs to; two keys must be the same. Raises KeyRefused."""
        ...

    def check_metrics(self, authorization: str | None) -> None:
        """Check that /metrics may be shown. Raises KeyRefused."""
        ...

    def identify_publisher(self, authorization: str | None) -> Publisher:
        """Find who holds a key for the admin API. Raises KeyRefused, RightMissing."""
        ...

    def upload_limits(self, tenant: str, defaults: UploadLimits) -> UploadLimits:
        """Tell how much may be published for a tenant."""
        ...

    def start(self) -> None:
        """Begin to follow changes, in the running event loop."""
        ...

    def set_limits(self, limits: Limits) -> None:
        """Change what holds for tenants that have no limits of their own, within two seconds."""
        ...


def open_tenants(
    tenancy: TenancySection, book: KeyBook | None = None, shared: tuple[str, ...] = ()
) -> Tenants:
    """Open what the config's mode says; `book` has the store's keys.

    `shared` namespaces are open to all tenants. Raises KeysFileError.
    """
    if tenancy.mode == "open":
        return Everybody(tenancy.limits, shared)
    path = None if tenancy.keys_file is None else Path(tenancy.keys_file)
    is_open = tenancy.metrics == "open"
    return Keyring(path, tenancy.limits, is_open, book, shared=shared)


class Everybody:
    """The one tenant of mode open."""

    asks_for_keys = False

    def __init__(self, limits: Limits = NO_LIMITS, shared: tuple[str, ...] = ()) -> None:
        highest = PriorityClass.INTERACTIVE
        self._tenant = Tenant(
            PUBLIC, limits, may_publish=True, max_priority_class=highest, shared=shared
        )

    def identify(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        return self._tenant

    def check_metrics(self, authorization: str | None) -> None:
        return None

    def identify_publisher(self, authorization: str | None) -> Publisher:
        raise KeyRefused("This server has no keys, so nobody may use the admin API.")

    def upload_limits(self, tenant: str, defaults: UploadLimits) -> UploadLimits:
        return defaults

    def start(self) -> None:
        return None

    def set_limits(self, limits: Limits) -> None:
        self._tenant = replace(self._tenant, limits=limits)


class Keyring:
    """The tenants of mode keys, as of the last valid version of the keys file and of the store."""

    asks_for_keys = True

    def __init__(
        self,
        path: Path | None,
        defaults: Limits,
        metrics_are_open: bool = False,
        book: KeyBook | None = None,
        wall_s: Callable[[], float] = time.time,
        shared: tuple[str, ...] = (),
    ) -> None:
        self._path = path
        self._book = book
        self._wall_s = wall_s
        self._defaults = defaults
        self._metrics_are_open = metrics_are_open
        self._shared = shared
        self._stamp = None if path is None else _stamp(path)
        self._keys = NO_KEYS if path is None else read_keys(path, defaults, shared)
        self._tasks: list[asyncio.Task[None]] = []
        self._store_is_read = True

    def identify(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        digest = hash_key(_only_key(authorization, api_key))
        holder = self._keys.holders.get(digest)
        if holder is not None and hmac.compare_digest(holder.digest, digest):
            return holder.tenant
        return self._tenant_of(self._stored(digest, "infer", "send requests"))

    def check_metrics(self, authorization: str | None) -> None:
        if self._metrics_are_open:
            return
        digest = hash_key(_bearer_key(authorization))
        if any(hmac.compare_digest(known, digest) for known in self._keys.metrics):
            return
        try:
            self._stored(digest, "metrics", "read the metrics")
        except (KeyRefused, RightMissing):
            raise KeyRefused("The key is not one of the metrics_keys.") from None

    def identify_publisher(self, authorization: str | None) -> Publisher:
        digest = hash_key(_bearer_key(authorization))
        publisher = self._keys.publishers.get(digest)
        if publisher is not None:
            return publisher
        if digest in self._keys.holders or digest in self._keys.metrics:
            raise RightMissing(
                "This key may not use the admin API: it is none of the publish_keys and admin_keys."
            )
        found = self._stored(digest, "publish", "use the admin API", "admin")
        return Publisher(found.name, found.tenant or None)

    def _stored(
        self, digest: bytes, scope: Scope, what: str, other: Scope | None = None
    ) -> StoredKey:
        """Find a key of the store that is valid now and has one of the scopes."""
        found = None if self._book is None else self._book.find(digest)
        if found is None or not hmac.compare_digest(found.digest, digest):
            raise KeyRefused("The API key is not valid.")
        if not found.is_valid(self._wall_s()):
            raise KeyRefused("The API key has expired or was revoked.")
        if scope not in found.scopes and other not in found.scopes:
            raise RightMissing(f"This key may not {what}: it has not the scope {scope}.")
        return found

    def _tenant_of(self, key: StoredKey) -> Tenant:
        tenant = self._keys.tenants.get(key.tenant)
        if tenant is None:
            tenant = Tenant(key.tenant, self._defaults, shared=self._shared)
        may_publish = tenant.may_publish or "publish" in key.scopes
        return replace(tenant, may_publish=may_publish, key_id=key.id)

    def upload_limits(self, tenant: str, defaults: UploadLimits) -> UploadLimits:
        return replace(defaults, **self._keys.upload_limits.get(tenant, {}))

    def start(self) -> None:
        if self._path is not None:
            self._tasks.append(asyncio.create_task(self._follow(FOLLOW_S, self.refresh)))
        if self._book is not None:
            follow = self._follow(FOLLOW_STORE_S, self.refresh_store)
            self._tasks.append(asyncio.create_task(follow))

    def set_limits(self, limits: Limits) -> None:
        if limits != self._defaults:
            self._defaults, self._stamp = limits, None

    def refresh(self) -> None:
        """Read the file again if it has changed. An error in it is logged once."""
        if self._path is None:
            return
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # taken before reading, so that a write meanwhile counts as a change
        try:
            self._keys = read_keys(self._path, self._defaults, self._shared)
        except KeysFileError as error:
            logger.error("the keys stay as they were: %s", error)
        except Exception as error:  # its words may hold a key
            kind = type(error).__name__
            logger.error("the keys stay as they were: %s cannot be read: %s", self._path, kind)
        else:
            logger.info("%s has %d keys of tenants now", self._path, len(self._keys.holders))

    def refresh_store(self) -> None:
        """Read what others have written to the store. An outage is logged once."""
        if self._book is None:
            return
        try:
            self._book.refresh()
        except AdapterStoreError as error:
            if self._store_is_read:
                logger.error("the keys of the adapter store stay as they were: %s", error)
            self._store_is_read = False
        else:
            self._store_is_read = True

    async def _follow(self, period_s: float, refresh: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(period_s)
            try:
                await asyncio.to_thread(refresh)
            except Exception:
                logger.exception("the keys could not be looked at, it is tried again")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Identify a version of the file; None if it cannot be read."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _only_key(authorization: str | None, api_key: str | None) -> str:
    """Take the key from where it is. Two that differ may be of two tenants: neither is taken."""
    if not api_key:
        return _bearer_key(authorization)
    if authorization is not None and _bearer_key(authorization) != api_key:
        raise KeyRefused("Authorization and x-api-key hold different keys: send one of them.")
    return api_key


def _bearer_key(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise KeyRefused("An API key is required, in a header 'Authorization: Bearer <key>'.")
    return key
