"""The options of `reef publish` that convert what is no PEFT LoRA folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

if TYPE_CHECKING:
    from adapter_store.conversion.options import ConversionOptions
    from adapter_store.manifest import AdapterManifest

F = TypeVar("F", bound=Callable[..., Any])


class ConvertFlags(TypedDict):
    """What the options below give to the command."""

    convert: bool
    convert_rank: int | None
    max_residual: float | None
    initial_adapter: str | None


def convert_options(command: F) -> F:
    """Add the options to a command."""
    for option in (
        click.option(
            "--initial-adapter",
            metavar="FOLDER",
            help="The adapter before its training, for PiSSA, OLoRA, CorDA and LoRA-GA.",
        ),
        click.option(
            "--max-residual",
            type=float,
            help="The part of a module's change that factors may miss.  [default: 0.05]",
        ),
        click.option(
            "--convert-rank",
            type=int,
            help="The largest rank of a module.  [default: 64, or 256 if it is exact]",
        ),
        click.option("--convert", is_flag=True, help="Convert what is no PEFT LoRA folder."),
    ):
        command = option(command)
    return command


def conversion_options(
    base_folder: Path | None,
    convert: bool,
    convert_rank: int | None,
    max_residual: float | None,
    initial_adapter: str | None,
) -> "ConversionOptions | None":
    """Make the store's options of the command's; None without --convert. Raises UsageError."""
    from adapter_store.conversion.options import (
        DEFAULT_MAX_RESIDUAL,
        ConversionOptions,
    )

    chosen = (convert_rank, max_residual, initial_adapter)
    if not convert:
        if any(value is not None for value in chosen):
            raise click.UsageError(
                "--convert-rank, --max-residual and --initial-adapter need --convert"
            )
        return None
    try:
        return ConversionOptions(
            lora_rank=convert_rank,
            max_residual=DEFAULT_MAX_RESIDUAL if max_residual is None else max_residual,
            base_folder=base_folder,
            initial_folder=None if initial_adapter is None else Path(initial_adapter),
        )
    except ValueError as error:
        raise click.UsageError(f"--convert: {error}") from error


def upload_bytes(upload: Path) -> int:
    """Count the bytes of the weights in a folder, for a bar of progress."""
    if upload.is_file():
        return upload.stat().st_size
    files = [*upload.glob("*.safetensors"), *upload.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def note_conversion(manifest: "AdapterManifest") -> None:
    """Say on stderr what a conversion made of the upload."""
    record = manifest.conversion
    if record is None:
        click.echo("note: it is a PEFT LoRA adapter already; nothing was converted", err=True)
    elif not record.residuals:
        click.echo(f"note: converted from {record.source}, exactly", err=True)
    else:
        module = max(record.residuals, key=lambda name: record.residuals[name])
        click.echo(
            f"note: converted from {record.source} at rank {manifest.lora_rank}; factors miss "
            f"{record.max_residual:.2g} of the change of {module}, and less of the others",
            err=True,
        )
