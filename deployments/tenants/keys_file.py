"""Read the keys file: the hashes of API keys, whose they are, and what each tenant may do.

API keys are never stored: the file holds only their SHA-256. It is YAML or JSON:

    tenants:
      acme:
        keys: [<64 hex digits>, ...]
        requests_per_minute: 600         # instead of the config's; null is no limit
        max_concurrent_requests: 32
        tokens_per_minute: 100000
        request_burst: 60                # at once; a whole minute's if it is left out
        token_burst: 20000
        tokens_per_day: 5000000          # of UTC
        tokens_per_month: 100000000
        namespaces: [lab]                # may use lab's adapters too, as lab/<adapter>
        may_publish: true                # may load and unload its own adapters over HTTP
        publish_keys: {ci: <64 hex>}     # these manage its adapters over /admin/v1, nothing else
        max_upload_bytes: 500MiB         # limits of that, instead of the config's
        max_lora_rank: 64
        max_adapters: 100
        max_stored_bytes: 20GiB          # of live versions together
        weight: 2.0                      # gets twice the tokens of a tenant with 1.0, if both wait
        max_priority_class: interactive  # the most urgent that its requests may be
        max_ttft_s: 5.0                  # a first token that would come later is not waited for
    metrics_keys: [<64 hex digits>]      # these open /metrics and nothing else
    admin_keys: {ann: <64 hex digits>}   # these manage all tenants' adapters over /admin/v1
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from adapter_store.names import NAME_RULE
from deployments.config_sections import Bytes, Limit, Section, explain
from deployments.policy.admission import Limits
from deployments.strict_yaml import YamlMistake, read_yaml
from deployments.tenants.key_id import KEY_PREFIX, key_id
from deployments.tenants.tenant import Publisher, Tenant, UploadLimits
from engine.config import ConfigError
from engine.scheduler.classes import PriorityClass
from engine.scheduler.fairness import MAX_WEIGHT, MIN_WEIGHT


class KeysFileError(ConfigError):
    """The keys file cannot be used; the message says where, and repeats no key."""


Name = Annotated[str, Field(pattern=f"^{NAME_RULE}$")]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class TenantEntry(Section):
    keys: list[Hash] = Field(default=[])
    requests_per_minute: Limit = None
    max_concurrent_requests: Limit = None
    tokens_per_minute: Limit = None
    request_burst: Limit = None
    token_burst: Limit = None
    tokens_per_day: Limit = None
    tokens_per_month: Limit = None
    namespaces: list[Name] = Field(default=[])
    may_publish: bool = False
    publish_keys: dict[Name, Hash] = Field(default={})
    max_upload_bytes: Bytes = 0
    max_lora_rank: Annotated[int, Field(ge=1, le=1024)] = 1
    max_adapters: Limit = None
    max_stored_bytes: Bytes | None = None
    weight: float = Field(default=1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT)
    max_priority_class: Literal["interactive", "standard", "batch"] = "standard"
    max_ttft_s: Annotated[float, Field(ge=0.001, le=86_400)] | None = None


class KeysDocument(Section):
    tenants: dict[Name, TenantEntry] = Field(default={})
    metrics_keys: list[Hash] = Field(default=[])
    admin_keys: dict[Name, Hash] = Field(default={})


@dataclass(frozen=True, slots=True)
class Holder:
    """A key's SHA-256 and whose key it is."""

    digest: bytes
    tenant: Tenant


@dataclass(frozen=True, slots=True)
class Keys:
    """The contents of a keys file. Holders are found by their digests."""

    holders: Mapping[bytes, Holder]
    metrics: Sequence[bytes]
    publishers: Mapping[bytes, Publisher]
    upload_limits: Mapping[str, Mapping[str, Any]]  # of tenants, those that are not the config's
    tenants: Mapping[str, Tenant]


NO_KEYS = Keys({}, (), {}, {}, {})


def read_keys(path: Path, defaults: Limits, shared: tuple[str, ...] = ()) -> Keys:
    """Read and check a keys file, in which no tenant is called as a shared namespace.

    Raises KeysFileError.
    """
    document = parse_document(path)
    metrics = dict.fromkeys(map(bytes.fromhex, document.metrics_keys))
    publishers = _publishers(path, document)
    holders: dict[bytes, Holder] = {}
    tenants: dict[str, Tenant] = {}
    for name, entry in document.tenants.items():
        if name in shared:
            raise KeysFileError(
                f"{path}: tenants.{name}: no tenant may have this name where adapters.plain_root "
                "is set"
            )
        limits, namespaces = _limits(entry, defaults), tuple(entry.namespaces)
        tenant = Tenant(
            name,
            limits,
            namespaces,
            entry.may_publish,
            entry.weight,
            PriorityClass[entry.max_priority_class.upper()],
            entry.max_ttft_s,
            shared=shared,
        )
        tenants[name] = tenant
        for digest in map(bytes.fromhex, entry.keys):
            if digest in holders or digest in metrics or digest in publishers:
                raise _twice(path, f"tenants.{name}.keys", digest)
            holders[digest] = Holder(digest, replace(tenant, key_id=key_id(digest)))
    limits = {name: _upload_limits(entry) for name, entry in document.tenants.items()}
    return Keys(holders, tuple(metrics), publishers, limits, tenants)


def _publishers(path: Path, document: KeysDocument) -> dict[bytes, Publisher]:
    """Map the hashes of keys for the admin API to their holders."""
    metrics = {*map(bytes.fromhex, document.metrics_keys)}
    found: dict[bytes, Publisher] = {}
    places: list[tuple[str, str | None, Mapping[str, str]]] = [
        ("admin_keys", None, document.admin_keys)
    ]
    for tenant, entry in document.tenants.items():
        places.append((f"tenants.{tenant}.publish_keys", tenant, entry.publish_keys))
    for where, tenant, keys in places:
        for name, digest in ((name, bytes.fromhex(text)) for name, text in keys.items()):
            if digest in found or digest in metrics:
                raise _twice(path, where, digest)
            found[digest] = Publisher(name, tenant)
    return found


def _twice(path: Path, where: str, digest: bytes) -> KeysFileError:
    return KeysFileError(f"{path}: {where}: {digest.hex()[:12]}... comes twice in the file")


def _upload_limits(entry: TenantEntry) -> dict[str, Any]:
    names = {field.name for field in fields(UploadLimits)}
    return entry.model_dump(include=entry.model_fields_set & names)


def _limits(entry: TenantEntry, defaults: Limits) -> Limits:
    """Take limits that are not mentioned from the config; null means no limit."""
    names = {field.name for field in fields(Limits)}
    own = entry.model_dump(include=entry.model_fields_set & names)
    for burst, rate in (
        ("request_burst", "requests_per_minute"),
        ("token_burst", "tokens_per_minute"),
    ):
        if rate in own:
            own.setdefault(burst, None)  # the config's burst belongs to the config's rate
    return replace(defaults, **own)


def parse_document(path: Path) -> KeysDocument:
    """Parse a keys file. Raises KeysFileError."""
    try:
        return KeysDocument.model_validate(read_yaml(path))
    except OSError as error:
        raise KeysFileError(f"tenancy.keys_file {path}: {error.strerror}") from None
    except YamlMistake as error:
        raise KeysFileError(_without_keys(f"{path}: {error}")) from None
    except ValidationError as error:
        lines = [_explain(path, each) for each in error.errors()]
        raise KeysFileError("\n".join(lines)) from None


def _explain(path: Path, error: ErrorDetails) -> str:
    # YAML reads 2026-12-01, 123 and no as something else than text.
    hint = ": put it in quotes" if error["type"] == "string_type" else ""
    return _without_keys(f"{path}: {explain(error, 'the document', is_secret=True)}{hint}")


def _without_keys(message: str) -> str:
    """Blank out keys: one in the wrong place must not get into a log."""
    return re.sub(rf"{KEY_PREFIX}[A-Za-z0-9_-]{{16,}}", f"{KEY_PREFIX}...", message)
