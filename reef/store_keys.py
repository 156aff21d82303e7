"""`reef keys`: API keys in the adapter store."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from reef.author import author
from reef.duration import Duration
from reef.refusal import refusing
from reef.store_options import with_store, with_store_to_read

if TYPE_CHECKING:
    from adapter_store.store import AdapterStore
    from deployments.tenants.key_book import KeyBook
    from deployments.tenants.key_table import StoredKey

SCOPES = ("infer", "publish", "admin", "metrics")


@click.group()
def keys() -> None:
    """Make, list and end API keys in the adapter store.

    Servers with tenancy.keys_in_store see a change within five seconds. The store holds hashes; a
    key is printed once, on stdout.
    """


@keys.command()
@click.argument("tenant", required=False, default="")
@click.option("--name", required=True, help="Who gets it, as lists and the audit log say.")
@click.option(
    "--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help="[default: infer]"
)
@click.option("--expires", type=Duration(), help="After this time, such as 90d.  [default: never]")
@with_store
def create(
    store: "AdapterStore", tenant: str, name: str, scopes: Sequence[str], expires: int | None
) -> None:
    """Make a key, and print it once.

    infer and publish are for TENANT; admin and metrics are for all tenants, so without one.
    """
    expires_s = None if expires is None else time.time() + expires
    with _refusing():
        made, key = _book(store).create(tenant, name, scopes or ("infer",), expires_s, author())
    click.echo(f"key {made.id} is made; it is shown only here:", err=True)
    click.echo(key)


@keys.command(name="list")
@click.option("--tenant", help="Only this tenant's.  [default: all]")
@click.option("--all", "with_ended", is_flag=True, help="Also those that have ended.")
@with_store_to_read
def list_(store: "AdapterStore", tenant: str | None, with_ended: bool) -> None:
    """Show keys: id, state, tenant, name, scopes, when it was made and by whom."""
    now_s = time.time()
    for key in _book(store, may_write=False).list(tenant):
        if with_ended or key.is_valid(now_s):
            click.echo(_line(key, now_s))


@keys.command()
@click.argument("key_id")
@click.option(
    "--overlap",
    type=Duration(),
    default="24h",
    show_default=True,
    help="For how long the old key goes on.",
)
@with_store
def rotate(store: "AdapterStore", key_id: str, overlap: int) -> None:
    """Make a key for the same as KEY_ID, which ends after the overlap."""
    with _refusing():
        made, key = _book(store).rotate(key_id, overlap, author())
    click.echo(f"key {made.id} is made in place of {key_id}; it is shown only here:", err=True)
    click.echo(key)


@keys.command()
@click.argument("key_id")
@with_store
def revoke(store: "AdapterStore", key_id: str) -> None:
    """End a key at once and for good."""
    with _refusing():
        _book(store).revoke(key_id, author())
    click.echo(f"key {key_id} is revoked")


@keys.command()
@click.argument("key_id")
@click.argument("after", type=Duration())
@with_store
def expire(store: "AdapterStore", key_id: str, after: int) -> None:
    """Have a key end AFTER a time from now, such as 7d."""
    with _refusing():
        _book(store).expire(key_id, time.time() + after, author())
    click.echo(f"key {key_id} ends in {after} s")


def _book(store: "AdapterStore", may_write: bool = True) -> "KeyBook":
    from deployments.tenants.key_book import KeyBook

    return KeyBook(store.objects, may_write=may_write)


def _refusing() -> AbstractContextManager[None]:
    from adapter_store.errors import AdapterStoreError
    from deployments.tenants.key_book import KeyEnded, KeyNotFound

    return refusing(AdapterStoreError, KeyNotFound, KeyEnded, ValueError)


def _line(key: "StoredKey", now_s: float) -> str:
    whose = key.tenant or "all tenants"
    made = f"{_date(key.created_s)} by {key.created_by or 'unknown'}"
    return "  ".join((key.id, _state(key, now_s), whose, key.name, ",".join(key.scopes), made))


def _state(key: "StoredKey", now_s: float) -> str:
    if key.revoked_s is not None:
        return f"revoked {_date(key.revoked_s)}"
    if key.expires_s is None:
        return "valid"
    return f"{'valid until' if now_s < key.expires_s else 'expired'} {_date(key.expires_s)}"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
