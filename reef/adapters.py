"""`reef list`, `retire`, `restore` and `delete`: adapters and their names.

Each success prints one line on stdout.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import click

from reef.author import author
from reef.store_options import tenant_option, with_store, with_store_to_read

if TYPE_CHECKING:
    from adapter_store.names import AdapterRecord, State
    from adapter_store.store import AdapterStore

PAGE = 1000


@click.command(name="list")
@click.option("--tenant", default="", help="Only this tenant's.  [default: all]")
@click.option("--name", default="", help="Only these names; * and ? stand for any letters.")
@click.option("--base", default="", help="Only for this base: the first digits of a fingerprint.")
@click.option(
    "--state",
    type=click.Choice(["live", "retired", "deleted", "any"]),
    default="live",
    show_default=True,
    help="Only versions in this state.",
)
@with_store_to_read
def list_(store: "AdapterStore", tenant: str, name: str, base: str, state: "State | str") -> None:
    """Show versions, live ones if nothing else is asked for."""
    from adapter_store.listing import Wanted, page_of

    store.check_is_store()
    wanted = Wanted(tenant, name, base, None if state == "any" else cast("State", state))
    page = page_of(store, wanted, None, PAGE)
    while True:
        for record in page.records:
            click.echo(_as_line(record))
        if page.next_after is None:
            return
        page = page_of(store, wanted, page.next_after, PAGE)


def _as_line(record: "AdapterRecord") -> str:
    state = "" if record.state == "live" else f"{record.state}  "
    return (
        f"{record.tenant}/{record.name}@{record.version}  rank {record.lora_rank}  "
        f"{record.nbytes} bytes  digest {record.digest[:12]}  base {record.base[:12]}  "
        f"{state}{_proof_of(record)}  {' '.join(record.aliases)}".rstrip()
    )


def _proof_of(record: "AdapterRecord") -> str:
    """Say in a word or two whether an engine has seen the adapter act."""
    outcome = None if record.verdict is None else record.verdict.outcome
    return "not proven yet" if outcome is None else outcome.replace("_", " ")


@click.command()
@click.argument("name")
@tenant_option
@with_store
def retire(store: "AdapterStore", name: str, tenant: str) -> None:
    """Withdraw NAME@VERSION, or all versions of NAME."""
    _say("retired", tenant, name, store.retire(tenant, name, by=author()))


@click.command()
@click.argument("name")
@tenant_option
@with_store
def restore(store: "AdapterStore", name: str, tenant: str) -> None:
    """Bring a retired NAME@VERSION back.

    That works while its files are there: `reef gc` removes them after its --grace.
    """
    ref = store.restore(tenant, name, by=author())
    _say("restored", tenant, name, (ref.version,))


@click.command()
@click.argument("name")
@tenant_option
@with_store
def delete(store: "AdapterStore", name: str, tenant: str) -> None:
    """Withdraw NAME@VERSION, or all of NAME, for good.

    What is retired already can be deleted, too. `reef gc` frees the files after its --grace.
    """
    _say("deleted", tenant, name, store.delete(tenant, name, by=author()))


def _say(what: str, tenant: str, name: str, versions: Sequence[int]) -> None:
    listed = ", ".join(str(version) for version in versions)
    click.echo(f"{what} {tenant}/{name.partition('@')[0]}, version {listed}")
