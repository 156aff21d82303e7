"""`reef plan`: estimates a model's memory and speed before it starts."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.config import KV_DTYPES, OUTPUT_LAYERS, QUANTIZATIONS
from reef.byte_size import byte_size
from reef.progress import progress
from reef.refusal import refusing

if TYPE_CHECKING:
    from engine.plan.report import Plan


def rate(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise click.BadParameter(f"{text!r} is not a number above 0.")
    return number


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
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
@click.option(
    "--fleet",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A simulation's file: say how many replicas its traffic needs.",
)
@click.option("--most", type=click.IntRange(1, 4096), default=64, show_default=True)
@click.option("--seeds", type=click.IntRange(1, 100), default=2, show_default=True)
def plan(
    folder: Path | None,
    memory: int,
    context: int,
    rank: int,
    quantization: str,
    output_layer: str,
    kv_dtype: str,
    bandwidth: float | None,
    flops: float | None,
    picture: Path | None,
    fleet: Path | None,
    most: int,
    seeds: int,
) -> None:
    """Say what a model or a fleet needs.

    For the model in FOLDER: bytes of weights, KV and adapters, the largest batches, and the step
    floor. Reads no weights. Of the machine, what is not given is measured.

    With --fleet: the fewest replicas, up to --most, that keep the objective of the file, judged by
    --seeds simulations each. With FOLDER, the sizes of the file's replicas and adapters are those
    of the model with this memory and rank.
    """
    from engine.model.spec import ModelError
    from engine.plan.report import make_plan, report

    if folder is None and fleet is None:
        raise click.UsageError("Name a model's folder, or --fleet FILE.")
    planned = None
    with refusing(ModelError, ImportError, OSError):
        if folder is not None:
            planned = make_plan(
                folder,
                memory_bytes=memory,
                context=context,
                lora_rank=rank,
                quantization=quantization,
                output_layer=output_layer,
                kv_dtype=kv_dtype,
                bandwidth=bandwidth if fleet is None else 1.0,  # not asked for: not measured
                flops=flops if fleet is None else 1.0,
            )
        if fleet is not None:
            _plan_fleet(fleet, planned, most, seeds)
        elif planned is not None:
            click.echo("\n".join(report(planned)))
            if picture is not None:
                from engine.plan.picture import draw  # matplotlib is optional

                draw(planned.size, planned.load, planned.machine, picture)


def _plan_fleet(file: Path, planned: "Plan | None", most: int, seeds: int) -> None:
    from deployments.simulator.config import InvalidSimulation, read_simulation
    from deployments.simulator.planning import NotEnough, plan_fleet, report
    from deployments.simulator.pool import Pool
    from reef.fleet_size import sized

    with refusing(InvalidSimulation, NotEnough):
        simulation = read_simulation(file)
        if planned is not None:
            simulation = sized(simulation, planned)
        with progress("simulating", 0, " fleets") as advance, Pool() as pool:
            found = plan_fleet(simulation, range(seeds), most, pool, advance)
        click.echo("\n".join(report(simulation, found)))
