"""`reef describe`: says what is known of one version of an adapter."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from reef.store_options import tenant_option, with_store_to_read

if TYPE_CHECKING:
    from adapter_store.manifest import AdapterManifest
    from adapter_store.names import AdapterRecord
    from adapter_store.store import AdapterStore


@click.command()
@click.argument("name")
@tenant_option
@with_store_to_read
def describe(store: "AdapterStore", name: str, tenant: str) -> None:
    """Say what is known of NAME, NAME@VERSION or NAME@ALIAS.

    A version that is retired or deleted is found by its number.
    """
    from adapter_store.errors import ObjectNotFound
    from adapter_store.listing import version_of

    store.check_is_store()
    record = version_of(store, tenant, name)
    for line in _lines_of(record):
        click.echo(line)
    try:
        manifest = store.manifest(record.digest)
    except ObjectNotFound:
        click.echo("files      were removed")
        return
    for line in _contents(manifest):
        click.echo(line)


def _lines_of(record: "AdapterRecord") -> Iterator[str]:
    when = datetime.fromtimestamp(record.published_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    verdict = record.verdict
    proof = "none yet" if verdict is None else f"{verdict.outcome} {verdict.reason}".strip()
    yield f"version    {record.tenant}/{record.name}@{record.version}, {record.state}"
    yield f"aliases    {' '.join(record.aliases) or 'none'}"
    yield f"digest     {record.digest}"
    yield f"base       {record.base}"
    yield f"published  {when} by {record.published_by or 'unknown'}"
    yield f"proof      {proof}"


def _contents(manifest: "AdapterManifest") -> Iterator[str]:
    if manifest.conversion is not None:
        yield f"converted  from {manifest.conversion.source}"
    for name, entry in sorted(manifest.files.items()):
        yield f"file       {name}, {entry.nbytes} bytes"
    kinds: dict[tuple[int, float, str], list[str]] = {}
    for name, module in manifest.modules.items():
        kind = (module.lora_rank, module.scaling, module.dtype)
        kinds.setdefault(kind, []).append(name.rpartition(".")[2])
    for (lora_rank, scaling, dtype), names in sorted(kinds.items()):
        listed = ", ".join(sorted(set(names)))
        yield f"modules    {len(names)} of rank {lora_rank}, scaling {scaling:g}, {dtype}: {listed}"
