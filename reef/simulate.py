"""`reef simulate`: a fleet in virtual time."""

from pathlib import Path

import click

from reef.progress import progress
from reef.refusal import refusing


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Of the arrivals and of all choices.")
@click.option(
    "--router",
    "routers",
    multiple=True,
    help="Instead of the file's; several times: to compare them on the same requests.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each router.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Write a .svg or .png; needs matplotlib."
)
def simulate(
    file: Path, seed: int, routers: tuple[str, ...], as_json: bool, picture: Path | None
) -> None:
    """Simulate the fleet and the traffic that FILE describes.

    Time is virtual; the scheduler, the router and the autoscaling policy are those that serve.
    """
    import msgspec

    from deployments.simulator.config import InvalidSimulation, read_simulation, with_router
    from deployments.simulator.report import report
    from deployments.simulator.simulate import run

    with refusing(InvalidSimulation):
        simulation = read_simulation(file)
        simulations = [with_router(simulation, router) for router in routers] or [simulation]
        seconds = len(simulations) * int(simulation.duration_s)
        with progress("simulating", seconds, "s") as advance:
            results = [(each.fleet.router, run(each, seed, watch=advance)) for each in simulations]
    if picture is not None:
        from deployments.simulator.picture import draw_runs

        with refusing(ImportError, OSError):
            draw_runs(results, simulation.objective, picture)
    summaries = [(name, result.summary) for name, result in results]
    if not as_json:
        click.echo("\n".join(report(summaries)))
        return
    for name, summary in summaries:
        row = {"router": name, "seed": seed, **msgspec.to_builtins(summary)}
        click.echo(msgspec.json.encode(row).decode())
