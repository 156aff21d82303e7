"""Tenants: whose request it is, by its API key, and which adapters that tenant may use.

Keys are long random strings that nobody stores: the keys file holds their SHA-256, which nobody
can turn back. It is YAML or JSON:

    tenants:
      acme:
        keys: [<64 hex digits>, ...]
        requests_per_minute: 600         # instead of the config's; null is no limit
        max_concurrent_requests: 32
        namespaces: [lab]                # may use lab's adapters too, as lab/<adapter>
    metrics_keys: [<64 hex digits>]      # these open /metrics and nothing else

A tenant's adapters are the ones published under its name. When the file changes it is read
again, within two seconds; if it is broken then, an error is logged and the old keys stay.

`reef new-key` makes a key (`new_key`). Knows no adapters, and of limits only their numbers.
"""

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import yaml
from pydantic import Field, ValidationError

from adapter_store.names import NAME_RULE
from deployments.config import Limit, Section, TenancySection
from deployments.ingress.http_errors import bad_key
from deployments.policy.admission import NO_LIMITS, Limits
from engine.config import ConfigError

PUBLIC = "public"  # everybody's namespace, and everybody where there are no keys
KEY_PREFIX = "reef-"
FOLLOW_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tenant:
    """`granted` are the namespaces beyond its own and `public`."""

    name: str
    limits: Limits = NO_LIMITS
    granted: tuple[str, ...] = ()

    @property
    def default_namespaces(self) -> tuple[str, ...]:
        """Where a name without a tenant is looked for, in this order."""
        return (PUBLIC,) if self.name == PUBLIC else (self.name, PUBLIC)

    @property
    def namespaces(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.default_namespaces, *self.granted)))


class Tenants(Protocol):
    """Who is asking. `authorization` is the header of that name."""

    def identify(self, authorization: str | None) -> Tenant:
        """Raises ApiError, 401."""
        ...

    def check_metrics(self, authorization: str | None) -> None:
        """Raises ApiError, 401, unless /metrics may be shown."""
        ...

    def start(self) -> None:
        """In the event loop that will ask."""
        ...


def open_tenants(tenancy: TenancySection) -> Tenants:
    """Raises ConfigError where the keys file cannot be used."""
    if tenancy.mode == "open":
        return Everybody(tenancy.limits)
    assert tenancy.keys_file is not None, "load_config wants a keys file in this mode"
    return Keyring(Path(tenancy.keys_file), tenancy.limits, tenancy.metrics == "open")


class Everybody:
    """Tenants of mode open: there is one."""

    def __init__(self, limits: Limits = NO_LIMITS) -> None:
        self._tenant = Tenant(PUBLIC, limits)

    def identify(self, authorization: str | None) -> Tenant:
        return self._tenant

    def check_metrics(self, authorization: str | None) -> None:
        return None

    def start(self) -> None:
        return None


# ---- the keys file -------------------------------------------------------------------------

Name = Annotated[str, Field(pattern=f"^{NAME_RULE}$")]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class TenantEntry(Section):
    keys: list[Hash] = Field(default=[])
    requests_per_minute: Limit = None
    max_concurrent_requests: Limit = None
    namespaces: list[Name] = Field(default=[])


class KeysDocument(Section):
    tenants: dict[Name, TenantEntry] = Field(default={})
    metrics_keys: list[Hash] = Field(default=[])


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses a key that comes twice, where YAML's own loaders keep the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [self.construct_object(key) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} comes twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


@dataclass(frozen=True, slots=True)
class Holder:
    """A key's SHA-256 and whose key it is."""

    digest: bytes
    tenant: Tenant


@dataclass(frozen=True, slots=True)
class Keys:
    """What a keys file says. Holders are found by their digests."""

    holders: Mapping[bytes, Holder]
    metrics: Sequence[bytes]


def read_keys(path: Path, defaults: Limits) -> Keys:
    """Raises ConfigError; its words repeat no part of the file that could be a key."""
    document = parse_document(path)
    metrics = list(map(bytes.fromhex, document.metrics_keys))
    holders: dict[bytes, Holder] = {}
    for name, entry in document.tenants.items():
        tenant = Tenant(name, _limits(entry, defaults), tuple(entry.namespaces))
        for digest in map(bytes.fromhex, entry.keys):
            if digest in holders or digest in metrics:
                raise ConfigError(
                    f"{path}: tenants.{name}.keys: {digest.hex()[:12]}... comes twice in the file"
                )
            holders[digest] = Holder(digest, tenant)
    return Keys(holders, metrics)


def _limits(entry: TenantEntry, defaults: Limits) -> Limits:
    """A limit that is not mentioned is the config's; one that is null is none at all."""
    names = {field.name for field in fields(Limits)}
    return replace(defaults, **entry.model_dump(include=entry.model_fields_set & names))


def parse_document(path: Path) -> KeysDocument:
    """Raises ConfigError."""
    try:
        document = yaml.load(path.read_text(), _Loader)
        return KeysDocument.model_validate(document)
    except OSError as error:
        raise ConfigError(f"tenancy.keys_file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is not text") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ConfigError(_without_keys(f"{path}: {error.problem}{line}")) from None
    except yaml.YAMLError:
        raise ConfigError(f"{path}: it is neither YAML nor JSON") from None
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, each) for each in error.errors())) from None


def _explain(path: Path, error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the document"
    unknown = error["type"] == "extra_forbidden"
    return _without_keys(f"{path}: {where}: {'unknown key' if unknown else error['msg']}")


def _without_keys(message: str) -> str:
    """A key that somebody put in the wrong place must not get into a log."""
    return re.sub(rf"{KEY_PREFIX}[A-Za-z0-9_-]{{16,}}", f"{KEY_PREFIX}...", message)


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class Keyring:
    """Tenants of mode keys, as of the last good version of the file."""

    def __init__(self, path: Path, defaults: Limits, metrics_are_open: bool = False) -> None:
        self._path = path
        self._defaults = defaults
        self._metrics_are_open = metrics_are_open
        self._stamp = _stamp(path)
        self._keys = read_keys(path, defaults)
        self._task: asyncio.Task[None] | None = None

    def identify(self, authorization: str | None) -> Tenant:
        digest = hash_key(_bearer_key(authorization))
        holder = self._keys.holders.get(digest)
        if holder is None or not hmac.compare_digest(holder.digest, digest):
            raise bad_key("The API key is not valid.")
        return holder.tenant

    def check_metrics(self, authorization: str | None) -> None:
        if self._metrics_are_open:
            return
        digest = hash_key(_bearer_key(authorization))
        if not any(hmac.compare_digest(known, digest) for known in self._keys.metrics):
            raise bad_key("The key is not one of the metrics_keys.")

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    def refresh(self) -> None:
        """Reads the file again if it is another one now. What is wrong with it is logged once."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp  # of before the reading: what is written meanwhile is news again
        try:
            self._keys = read_keys(self._path, self._defaults)
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
        else:
            logger.info("%s has %d keys of tenants now", self._path, len(self._keys.holders))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_S)
            await asyncio.to_thread(self.refresh)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Differs whenever the file does. None: it cannot be read."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _bearer_key(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise bad_key("An API key is required, in a header 'Authorization: Bearer <key>'.")
    return key
