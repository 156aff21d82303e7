"""Requests and answers of the admin API."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from adapter_store.aliases import MAX_VERSIONS, AliasView, Trial
from adapter_store.audit import AuditPage
from adapter_store.listing import Page
from adapter_store.manifest import AdapterManifest
from adapter_store.names import AdapterRecord, State
from deployments.ingress.api.openai_fields import Model


class StateChange(Model):
    """`live` restores, `retired` withdraws, `deleted` withdraws for good."""

    state: State


class TrialSettings(Model):
    """How the candidate is judged beside the alias' other version; what is left out: defaults."""

    candidate: int = Field(ge=1)
    max_regression: float | None = None
    max_length_change: float | None = None
    alpha: float | None = None
    min_requests: int | None = None
    max_requests: int | None = None
    ttft_s: float | None = None

    def trial(self) -> Trial:
        """Return it with the defaults. Raises InvalidShares."""
        return Trial(**self.model_dump(exclude_none=True))


class NewAlias(Model):
    """A version, or the weights of several, of which one may be on trial."""

    alias: str = Field(min_length=1, max_length=96)
    version: int | None = Field(None, ge=1)
    versions: dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,17}$")], float] | None = Field(
        None, min_length=1, max_length=MAX_VERSIONS
    )
    trial: TrialSettings | None = None

    @model_validator(mode="after")
    def _one_or_several(self) -> "NewAlias":
        if (self.version is None) == (self.versions is None):
            raise ValueError("version: one of version and versions must be given")
        return self

    @property
    def weights(self) -> dict[int, float]:
        """The weights by version."""
        if self.versions is not None:
            return {int(version): weight for version, weight in self.versions.items()}
        return {} if self.version is None else {self.version: 1.0}


class NewSource(Model):
    """Where an adapter is published from: s3://, hf://, or a version such as sql@3."""

    source: str = Field(min_length=1, max_length=1024)


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
    """What an alias means. `version` is the one with the largest weight.

    `figures` are what a trial has shown so far; `flip` says how new versions were waited for.
    """

    tenant: str
    name: str
    alias: str
    version: int
    versions: dict[str, float]
    before: dict[str, float]
    moved_at: str
    flip: str | None
    trial: dict[str, Any] | None
    figures: dict[str, Any] | None


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


def alias_answer(view: AliasView, figures: Mapping[str, Any] | None) -> AliasAnswer:
    return AliasAnswer(
        tenant=view.tenant,
        name=view.name,
        alias=view.alias,
        version=max(view.shares, key=lambda share: share[1])[0].version,
        versions={str(ref.version): weight for ref, weight in view.shares},
        before={str(ref.version): weight for ref, weight in view.before},
        moved_at=time_text(view.moved_s),
        flip=view.flip or None,
        trial=None if view.trial is None else view.trial.to_data(),
        figures=None if figures is None else dict(figures),
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
