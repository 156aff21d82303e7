"""`reef audit`: lists who has changed what in the adapter store."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from reef.store_options import with_store_to_read

if TYPE_CHECKING:
    from adapter_store.audit import AuditEntry
    from adapter_store.store import AdapterStore

PAGE = 1000
SHOWN = (
    "version",
    "versions",
    "alias",
    "digest",
    "generation",
    "outcome",
    "because",
)  # of an entry's details


@click.command()
@click.option("--tenant", help="Only this tenant's.  [default: all]")
@click.option("--last", type=click.IntRange(min=1), default=50, show_default=True, help="How many.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each, with all of it.")
@with_store_to_read
def audit(store: "AdapterStore", tenant: str | None, last: int, as_json: bool) -> None:
    """Show who has changed what, the newest first."""
    store.check_is_store()
    num_shown, before = 0, None
    while num_shown < last:
        page = store.audit(before, PAGE, tenant)
        for entry in page.entries[: last - num_shown]:
            click.echo(_as_json(entry) if as_json else _as_line(entry))
            num_shown += 1
        if page.next_before is None:
            return
        before = page.next_before


def _as_line(entry: "AuditEntry") -> str:
    when = datetime.fromtimestamp(entry.at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    what = [f"{name} {entry.details[name]}" for name in SHOWN if name in entry.details]
    whose = f"{entry.tenant}/{entry.name}" if entry.name else ""
    by = f"by {entry.by or 'unknown'}"
    return "  ".join(
        part for part in (str(entry.number), when, entry.kind, whose, *what, by) if part
    )


def _as_json(entry: "AuditEntry") -> str:
    from dataclasses import asdict

    return json.dumps(asdict(entry))
