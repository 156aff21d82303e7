"""Requests and answers of the admin API."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from adapter_store.audit import AuditPage
from adapter_store.listing import Page
from adapter_store.manifest import AdapterManifest
from adapter_store.names import AdapterRecord, State
from deployments.ingress.api.openai_fields import Model


class StateChange(Model):
    """`live` restores, `retired` withdraws, `deleted` withdraws for good."""

    state: State


class NewAlias(Model):
    alias: str = Field(min_length=1, max_length=96)
    version: int = Field(ge=1)


class Verification(Model):
    """What is hashed again: all of a tenant's live versions, or those of one name."""

    tenant: str | None = None
    name: str | None = None


class Proof(BaseModel):
    outcome: str
    reason: str
    proven_at: str


class AdapterItem(BaseModel):
    """A version. `base_model` is the server's name of its base, if it serves that."""

    tenant: str
    name: str
    version: int
    state: State
    aliases: list[str]
    digest: str
    base: str
    base_model: str | None
    lora_rank: int
    nbytes: int
    published_at: str
    published_by: str
    proof: Proof | None


class AdapterList(BaseModel):
    """`next_after` goes into `after` for the next page; null: there is none."""

    adapters: list[AdapterItem]
    next_after: str | None


class ModuleItem(BaseModel):
    lora_rank: int
    scaling: float
    in_features: int
    out_features: int
    dtype: str


class AdapterDescription(AdapterItem):
    """`files` and `modules` are null once the files were removed."""

    num_parameters: int | None
    files: dict[str, int] | None  # bytes by name
    modules: dict[str, ModuleItem] | None
    converted_from: str | None


class ChangedVersions(BaseModel):
    tenant: str
    name: str
    versions: list[int]
    state: State


class AliasAnswer(BaseModel):
    tenant: str
    name: str
    alias: str
    version: int


class AuditItem(BaseModel):
    number: int
    at: str
    by: str
    kind: str
    tenant: str
    name: str
    details: dict[str, Any]


class AuditList(BaseModel):
    """The newest first. `next_before` goes into `before` for the next page; null: no more."""

    entries: list[AuditItem]
    next_before: int | None


class VerifyLine(BaseModel):
    """A line of the answer of `verify`; the last one has the outcome."""

    checked_bytes: int
    total_bytes: int
    outcome: Literal["verified", "damaged", "failed"] | None = None
    num_adapters: int | None = None
    damage: list[str] | None = None


def time_text(seconds: float) -> str:
    """Write seconds since 1970 as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _proof(record: AdapterRecord) -> Proof | None:
    verdict = record.verdict
    if verdict is None:
        return None
    return Proof(
        outcome=verdict.outcome, reason=verdict.reason, proven_at=time_text(verdict.proven_s)
    )


def adapter_fields(record: AdapterRecord, base_models: Mapping[str, str]) -> dict[str, Any]:
    """Describe a version; `base_models` names bases by their fingerprints."""
    return {
        "tenant": record.tenant,
        "name": record.name,
        "version": record.version,
        "state": record.state,
        "aliases": list(record.aliases),
        "digest": record.digest,
        "base": record.base,
        "base_model": base_models.get(record.base),
        "lora_rank": record.lora_rank,
        "nbytes": record.nbytes,
        "published_at": time_text(record.published_s),
        "published_by": record.published_by,
        "proof": _proof(record),
    }


def adapter_list(page: Page, base_models: Mapping[str, str]) -> AdapterList:
    after = None if page.next_after is None else str(page.next_after)
    items = [AdapterItem(**adapter_fields(record, base_models)) for record in page.records]
    return AdapterList(adapters=items, next_after=after)


def adapter_description(
    record: AdapterRecord, manifest: AdapterManifest | None, base_models: Mapping[str, str]
) -> AdapterDescription:
    fields = adapter_fields(record, base_models)
    if manifest is None:
        none = dict.fromkeys(("num_parameters", "files", "modules", "converted_from"))
        return AdapterDescription(**fields, **none)
    origin = manifest.conversion
    return AdapterDescription(
        **fields,
        num_parameters=manifest.num_parameters,
        files={name: entry.nbytes for name, entry in sorted(manifest.files.items())},
        modules={
            name: ModuleItem(
                lora_rank=module.lora_rank,
                scaling=module.scaling,
                in_features=module.in_features,
                out_features=module.out_features,
                dtype=module.dtype,
            )
            for name, module in sorted(manifest.modules.items())
        },
        converted_from=None if origin is None else origin.source,
    )


def audit_list(page: AuditPage) -> AuditList:
    entries = [
        AuditItem(
            number=entry.number,
            at=time_text(entry.at_s),
            by=entry.by,
            kind=entry.kind,
            tenant=entry.tenant,
            name=entry.name,
            details=dict(entry.details),
        )
        for entry in page.entries
    ]
    return AuditList(entries=entries, next_before=page.next_before)
