"""`reef publish`, `list`, `retire`, `restore` and `delete`: adapters and their names.

Each success prints one line on stdout.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

import click

from reef.author import author
from reef.convert_options import (
    ConvertFlags,
    conversion_options,
    convert_options,
    note_conversion,
    upload_bytes,
)
from reef.progress import progress
from reef.prove import prove_ref
from reef.store_options import DEFAULT_TENANT, with_store, with_store_to_read

if TYPE_CHECKING:
    from adapter_store.names import AdapterRecord, State
    from adapter_store.own_files import OwnFiles
    from adapter_store.store import AdapterStore

PAGE = 1000

tenant_option = click.option(
    "--tenant", default=DEFAULT_TENANT, show_default=True, help="Whose adapter it is."
)


@click.command()
@click.argument("folder")
@click.option("--name", required=True, help="The adapter's name.")
@click.option("--base", help="A model folder, or the first digits of a fingerprint.")
@tenant_option
@click.option(
    "--prove",
    "is_proven",
    is_flag=True,
    help="Prove that it acts, as `reef prove` does; --base must be a folder.",
)
@convert_options
@with_store
def publish(
    store: "AdapterStore",
    folder: str,
    name: str,
    base: str | None,
    tenant: str,
    is_proven: bool,
    **conversion: Unpack[ConvertFlags],
) -> None:
    """Store a PEFT FOLDER as a name's next version.

    With --convert, FOLDER may also hold an adapter of MLX or llama.cpp, of another method of PEFT,
    or a model that was trained as a whole.
    """
    from adapter_store.bases import CONFIG_NAME

    base_folder = None
    if base is not None and (Path(base) / CONFIG_NAME).is_file():
        base_folder = Path(base)
        base = _register(store, base_folder)
    if is_proven and base_folder is None:
        raise click.UsageError("--prove needs the base's folder as --base")
    options = conversion_options(base_folder, **conversion)
    num_bytes = upload_bytes(Path(folder))
    with progress("checking and copying", 3 * num_bytes) as on_bytes:
        ref = store.publish(folder, tenant, name, base, on_bytes, conversion=options, by=author())
    click.echo(f"published {ref.tenant}/{ref.name}@{ref.version} as {ref.digest}")
    if options is not None:
        note_conversion(store.manifest(ref))
    _note_own_files(store.own_files(ref))
    if is_proven and base_folder is not None:
        prove_ref(store, ref, base_folder)


def _note_own_files(own: "OwnFiles") -> None:
    """Say on stderr what will be used that the folder brings beside the weights."""
    if own.template is not None:
        click.echo("note: its own chat template is used for chats", err=True)
    if own.tokenizer is not None:
        click.echo("note: its own tokenizer is used, which is not the base's", err=True)
    if own.generation is not None:
        click.echo("note: its own generation_config.json is used", err=True)


def _register(store: "AdapterStore", model_folder: Path) -> str:
    num_bytes = sum(path.stat().st_size for path in model_folder.glob("*.safetensors"))
    with progress("hashing the base", num_bytes) as on_bytes:
        return store.register_base(model_folder, on_bytes)


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
