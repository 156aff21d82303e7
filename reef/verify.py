"""`reef verify`: hashes the content of the adapter store, and lists all damage."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import click

from reef.progress import progress
from reef.store_options import with_store_to_read

if TYPE_CHECKING:
    from adapter_store.names import AdapterRecord
    from adapter_store.store import AdapterStore

DAMAGED = 1


@click.command()
@click.argument("name", required=False)
@click.option("--tenant", help="Only this tenant's.  [default: all]")
@with_store_to_read
def verify(store: "AdapterStore", name: str | None, tenant: str | None) -> None:
    """Hash all that is stored again.

    That is every live version, or those of NAME, and the log of names. Without NAME and --tenant
    the descriptions of the bases are read too. Ends with status 1 and a line on stderr for
    everything that is damaged.
    """
    records = _records(store, tenant, name)
    damage = [store.damage] if store.damage is not None else []
    damage += _damaged_adapters(store, records)
    if name is None and tenant is None:
        damage += _damaged_bases(store)
    for line in damage:
        click.echo(f"reef: {line}", err=True)
    if damage:
        raise click.exceptions.Exit(DAMAGED)
    count = len({record.digest for record in records})
    click.echo(f"verified {count} adapter{'' if count == 1 else 's'}")


def _records(
    store: "AdapterStore", tenant: str | None, name: str | None
) -> Sequence["AdapterRecord"]:
    from adapter_store.errors import AdapterNotFound
    from adapter_store.names import check_name

    records = store.list(tenant)
    if name is None:
        return records
    found = [record for record in records if record.name == check_name("adapter", name)]
    if not found:
        raise AdapterNotFound(f"there is no live adapter {name!r}")
    return found


def _damaged_adapters(
    store: "AdapterStore", records: Sequence["AdapterRecord"]
) -> Generator[str, None, None]:
    """Yield a line for each damaged adapter; hash each content once, even if it has many names."""
    by_digest: dict[str, list[AdapterRecord]] = {}
    for record in records:
        by_digest.setdefault(record.digest, []).append(record)
    num_bytes = sum(same[0].nbytes for same in by_digest.values())
    with progress("hashing", num_bytes) as on_bytes:
        for same in by_digest.values():
            names = ", ".join(f"{record.tenant}/{record.name}@{record.version}" for record in same)
            for problem in store.verify(same[:1], on_bytes):
                yield f"{names}: {problem}"


def _damaged_bases(store: "AdapterStore") -> Generator[str, None, None]:
    from adapter_store.errors import ObjectNotFound, StoreCorrupt

    for fingerprint in store.bases():
        try:
            store.base_model(fingerprint)
        except (ObjectNotFound, StoreCorrupt) as error:
            yield f"base {fingerprint[:12]}: {error}"
