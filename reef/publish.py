"""`reef publish`: what lies in a folder, on S3 or on a hub, or a version, gets a name."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from reef.author import author
from reef.byte_size import byte_size
from reef.convert_options import (
    ConvertFlags,
    conversion_options,
    convert_options,
    note_conversion,
    upload_bytes,
)
from reef.progress import progress
from reef.prove import prove_ref
from reef.store_options import DEFAULT_TENANT, tenant_option, with_store

if TYPE_CHECKING:
    from adapter_store.conversion.options import ConversionOptions
    from adapter_store.names import AdapterRef
    from adapter_store.own_files import OwnFiles
    from adapter_store.store import AdapterStore


@click.command()
@click.argument("source")
@click.option("--name", required=True, help="The adapter's name.")
@click.option("--base", help="A model folder, or the first digits of a fingerprint.")
@tenant_option
@click.option(
    "--prove",
    "is_proven",
    is_flag=True,
    help="Prove that it acts, as `reef prove` does; --base must be a folder.",
)
@click.option(
    "--max-download",
    type=byte_size,
    default="8GiB",
    show_default=True,
    help="Of s3:// and hf://: more is refused before it is fetched.",
)
@convert_options
@with_store
def publish(
    store: "AdapterStore",
    source: str,
    name: str,
    base: str | None,
    tenant: str,
    is_proven: bool,
    max_download: int,
    **conversion: Unpack[ConvertFlags],
) -> None:
    """Store an adapter as a name's next version.

    SOURCE is a PEFT folder, s3://bucket/prefix, hf://organisation/name@revision, or a version that
    is there: name@3, tenant/name@alias. Of a version no byte is copied.

    With --convert, a folder may also hold an adapter of MLX or llama.cpp, of another method of
    PEFT, or a model that was trained as a whole.
    """
    from adapter_store.bases import CONFIG_NAME

    base_folder = None
    if base is not None and (Path(base) / CONFIG_NAME).is_file():
        base_folder = Path(base)
    if is_proven and base_folder is None:
        raise click.UsageError("--prove needs the base's folder as --base")
    options = conversion_options(base_folder, **conversion)
    if is_version(source):
        if options is not None or (base is not None and not is_proven):
            raise click.UsageError(f"{source} has its base and is converted: leave options out")
        ref = store.publish_again(_place_of(source), tenant, name, by=author())
    else:
        base = base if base_folder is None else _register(store, base_folder)
        with _at_hand(store, source, options, max_download) as folder:
            ref = _publish(store, folder, tenant, name, base, options)
    click.echo(f"published {ref.tenant}/{ref.name}@{ref.version} as {ref.digest}")
    if options is not None:
        note_conversion(store.manifest(ref))
    _note_own_files(store.own_files(ref))
    if is_proven and base_folder is not None:
        prove_ref(store, ref, base_folder)


def is_version(source: str) -> bool:
    """Tell name@version from a folder; one that is there counts first."""
    return "://" not in source and "@" in source and not Path(source).exists()


def _place_of(source: str) -> tuple[str, str]:
    tenant, slash, full_name = source.partition("/")
    return (tenant, full_name) if slash else (DEFAULT_TENANT, source)


@contextmanager
def _at_hand(
    store: "AdapterStore", source: str, options: "ConversionOptions | None", max_bytes: int
) -> Generator[Path, None, None]:
    """Yield the folder; one in another place is on this disk during the block."""
    from adapter_store.object_store import Reading
    from adapter_store.open_store import endpoint_from
    from adapter_store.sources import remote_folder

    if "://" not in source:
        yield Path(source)
        return
    endpoint = None
    if source.startswith("s3://"):
        endpoint = store.endpoint_url or endpoint_from(os.environ, source)
    remote = remote_folder(source, endpoint, max_bytes, options is not None)
    with store.scratch() as folder:
        with progress("downloading", remote.nbytes) as on_bytes:
            remote.fetch(folder, Reading(on_bytes))
        yield folder


def _publish(
    store: "AdapterStore",
    folder: Path,
    tenant: str,
    name: str,
    base: str | None,
    options: "ConversionOptions | None",
) -> "AdapterRef":
    with progress("checking and copying", 3 * upload_bytes(folder)) as on_bytes:
        return store.publish(folder, tenant, name, base, on_bytes, conversion=options, by=author())


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
