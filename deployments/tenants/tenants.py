"""Tenants: identify the tenant of a request by its API key, and follow the keys file.

When the file changes it is read again within two seconds; if it is broken then, an error is logged
and the old keys stay.

`reef new-key` makes a key (`new_key`). Knows no adapters, and of limits only their numbers.
"""

import asyncio
import hmac
import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from deployments.config_sections import TenancySection
from deployments.policy.admission import NO_LIMITS, Limits
from deployments.tenants.keys_file import KeysFileError, hash_key, read_keys
from deployments.tenants.tenant import PUBLIC, Publisher, Tenant, UploadLimits
from engine.scheduler.classes import PriorityClass

FOLLOW_S = 1.0

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


def open_tenants(tenancy: TenancySection) -> Tenants:
    """Open what the config's mode says. Raises KeysFileError."""
    if tenancy.mode == "open":
        return Everybody(tenancy.limits)
    assert tenancy.keys_file is not None, "load_config wants a keys file in this mode"
    return Keyring(Path(tenancy.keys_file), tenancy.limits, tenancy.metrics == "open")


class Everybody:
    """The one tenant of mode open."""

    asks_for_keys = False

    def __init__(self, limits: Limits = NO_LIMITS) -> None:
        highest = PriorityClass.INTERACTIVE
        self._tenant = Tenant(PUBLIC, limits, may_publish=True, max_priority_class=highest)

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
    """The tenants of mode keys, as of the last valid version of the keys file."""

    asks_for_keys = True

    def __init__(self, path: Path, defaults: Limits, metrics_are_open: bool = False) -> None:
        self._path = path
        self._defaults = defaults
        self._metrics_are_open = metrics_are_open
        self._stamp = _stamp(path)
        self._keys = read_keys(path, defaults)
        self._task: asyncio.Task[None] | None = None

    def identify(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        digest = hash_key(_only_key(authorization, api_key))
        holder = self._keys.holders.get(digest)
        if holder is None or not hmac.compare_digest(holder.digest, digest):
            raise KeyRefused("The API key is not valid.")
        return holder.tenant

    def check_metrics(self, authorization: str | None) -> None:
        if self._metrics_are_open:
            return
        digest = hash_key(_bearer_key(authorization))
        if not any(hmac.compare_digest(known, digest) for known in self._keys.metrics):
            raise KeyRefused("The key is not one of the metrics_keys.")

    def identify_publisher(self, authorization: str | None) -> Publisher:
        digest = hash_key(_bearer_key(authorization))
        publisher = self._keys.publishers.get(digest)
        if publisher is not None:
            return publisher
        if digest in self._keys.holders or digest in self._keys.metrics:
            raise RightMissing(
                "This key may not use the admin API: it is none of the publish_keys and admin_keys."
            )
        raise KeyRefused("The API key is not valid.")

    def upload_limits(self, tenant: str, defaults: UploadLimits) -> UploadLimits:
        return replace(defaults, **self._keys.upload_limits.get(tenant, {}))

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    def set_limits(self, limits: Limits) -> None:
        if limits != self._defaults:
            self._defaults, self._stamp = limits, None

    def refresh(self) -> None:
        """Read the file again if it has changed. An error in it is logged once."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # taken before reading, so that a write meanwhile counts as a change
        try:
            self._keys = read_keys(self._path, self._defaults)
        except KeysFileError as error:
            logger.error("the keys stay as they were: %s", error)
        except Exception as error:  # its words may hold a key
            kind = type(error).__name__
            logger.error("the keys stay as they were: %s cannot be read: %s", self._path, kind)
        else:
            logger.info("%s has %d keys of tenants now", self._path, len(self._keys.holders))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:
                logger.exception("%s could not be looked at, it is tried again", self._path)


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
