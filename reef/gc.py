"""`reef gc`: removes from the adapter store what it needs no more."""

from typing import TYPE_CHECKING

import click

from reef.duration import Duration
from reef.progress import progress
from reef.store_options import with_store_to_read

if TYPE_CHECKING:
    from adapter_store.garbage import Garbage
    from adapter_store.store import AdapterStore


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--grace",
    type=Duration(),
    default="24h",
    show_default=True,
    help="How long something must have been unneeded.",
)
@with_store_to_read
def gc(store: "AdapterStore", dry_run: bool, grace: int) -> None:
    """Remove what the store needs no more.

    That is the files of adapters that no live version has, and those log records and snapshots that
    two newer snapshots stand for. Publishing and serving may go on meanwhile.
    """
    store.check_is_store()
    garbage = store.find_garbage(grace)
    if not dry_run:
        with progress("removing", len(garbage.objects), unit=" objects") as on_objects:
            garbage = store.remove_garbage(garbage, on_objects)
    click.echo(f"{'would remove' if dry_run else 'removed'} {_summary(garbage)}")


def _summary(garbage: "Garbage") -> str:
    files = f"{_count(len(garbage.files), 'file')} of {_count(len(garbage.places), 'adapter')}"
    records = _count(len(garbage.records), "log record")
    snapshots = _count(len(garbage.snapshots), "snapshot")
    total = f"{_count(len(garbage.objects), 'object')}, {_count(garbage.nbytes, 'byte')}"
    return f"{total}: {files}, {records}, {snapshots}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
