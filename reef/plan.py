"""`reef plan`: estimates a model's memory and speed before it starts."""

import math
from pathlib import Path

import click

from engine.byte_size import parse_byte_size
from engine.config import KV_DTYPES, OUTPUT_LAYERS, QUANTIZATIONS
from reef.refusal import refusing


def byte_size(text: str) -> int:
    try:
        size = parse_byte_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None
    if size <= 0:
        raise click.BadParameter(f"{text!r} is not above 0.")
    return size


def rate(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise click.BadParameter(f"{text!r} is not a number above 0.")
    return number


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--memory", type=byte_size, default="24GiB", show_default=True, help="Of the device.")
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, help="Tokens.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True, help="Of adapters.")
@click.option("--quantization", type=click.Choice(QUANTIZATIONS), default="none", show_default=True)
@click.option("--output-layer", type=click.Choice(OUTPUT_LAYERS), default="auto", show_default=True)
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), default="auto", show_default=True)
@click.option("--bandwidth", type=rate, help="GB/s.  [default: measured]")
@click.option("--flops", type=rate, help="TFLOP/s.  [default: measured]")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Write a .svg or .png; needs matplotlib."
)
def plan(
    folder: Path,
    memory: int,
    context: int,
    rank: int,
    quantization: str,
    output_layer: str,
    kv_dtype: str,
    bandwidth: float | None,
    flops: float | None,
    picture: Path | None,
) -> None:
    """Say what a model needs before it starts.

    For the model in FOLDER: bytes of weights, KV and adapters, the largest batches, and the step
    floor. Reads no weights. Of the machine, what is not given is measured.
    """
    from engine.model.spec import ModelError
    from engine.plan.report import make_plan, report

    with refusing(ModelError, ImportError, OSError):
        planned = make_plan(
            folder,
            memory_bytes=memory,
            context=context,
            lora_rank=rank,
            quantization=quantization,
            output_layer=output_layer,
            kv_dtype=kv_dtype,
            bandwidth=bandwidth,
            flops=flops,
        )
        click.echo("\n".join(report(planned)))
        if picture is not None:
            from engine.plan.picture import draw  # matplotlib is optional

            draw(planned.size, planned.load, planned.machine, picture)
