"""Requests and answers of the admin API that are about keys."""

from pydantic import BaseModel, Field

from deployments.ingress.api.admin import time_text
from deployments.ingress.api.openai_fields import Model
from deployments.tenants.key_table import Scope, StoredKey

MAX_S = 10 * 366 * 86_400  # ten years


class NewKey(Model):
    """`tenant` is left out for the scopes admin and metrics, which are for all tenants."""

    tenant: str = Field("", max_length=96)
    name: str = Field(min_length=1, max_length=96)
    scopes: list[Scope] = Field(default=["infer"], min_length=1, max_length=4)
    expires_in_s: float | None = Field(None, gt=0, le=MAX_S)


class KeyRotation(Model):
    """For how many seconds the old key goes on; a day if it is not said."""

    overlap_s: float = Field(86_400.0, ge=0, le=MAX_S)


class KeyExpiry(Model):
    """After how many seconds the key ends; null is never."""

    expires_in_s: float | None = Field(ge=0, le=MAX_S)


class KeyItem(BaseModel):
    """A key, of which neither it nor its hash is shown. `tenant` is null for all tenants."""

    id: str
    tenant: str | None
    name: str
    scopes: list[Scope]
    is_valid: bool
    created_at: str
    created_by: str
    expires_at: str | None
    revoked_at: str | None


class MadeKey(KeyItem):
    """`key` is shown only here."""

    key: str


class KeyList(BaseModel):
    keys: list[KeyItem]


def key_item(key: StoredKey, now_s: float) -> KeyItem:
    return KeyItem(
        id=key.id,
        tenant=key.tenant or None,
        name=key.name,
        scopes=list(key.scopes),
        is_valid=key.is_valid(now_s),
        created_at=time_text(key.created_s),
        created_by=key.created_by,
        expires_at=None if key.expires_s is None else time_text(key.expires_s),
        revoked_at=None if key.revoked_s is None else time_text(key.revoked_s),
    )


def made_key(key: StoredKey, secret: str, now_s: float) -> MadeKey:
    return MadeKey(**key_item(key, now_s).model_dump(), key=secret)
