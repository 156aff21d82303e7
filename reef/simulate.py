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
@click.option("--processes", type=click.IntRange(1), help="[default: as many as processors]")
def simulate(
    file: Path,
    seed: int,
    routers: tuple[str, ...],
    as_json: bool,
    picture: Path | None,
    processes: int | None,
) -> None:
    """Simulate the fleet and the traffic that FILE describes.

    Time is virtual; the scheduler, the router and the autoscaling policy are those that serve.
    """
    import msgspec

    from deployments.simulator.config import InvalidSimulation, read_simulation, with_router
    from deployments.simulator.pool import Pool
    from deployments.simulator.report import report
    from deployments.simulator.simulate import run

    with refusing(InvalidSimulation):
        simulation = read_simulation(file)
        simulations = [with_router(simulation, router) for router in routers] or [simulation]
        if len(simulations) == 1:
            with progress("simulating", int(simulation.duration_s), "s") as advance:
                found = [run(simulations[0], seed, watch=advance)]
        else:
            jobs = [(each, seed) for each in simulations]
            with progress("simulating", len(jobs), " runs") as advance, Pool(processes) as pool:
                found = pool.results(jobs, advance)
    results = [(each.fleet.router, r) for each, r in zip(simulations, found, strict=True)]
    summaries = [(name, result.summary) for name, result in results]
    if as_json:
        rows = [{"router": name, "seed": seed, **msgspec.to_builtins(s)} for name, s in summaries]
        lines = [msgspec.json.encode(row).decode() for row in rows]
    else:
        lines = report(summaries)
    click.echo("\n".join(lines))
    if picture is not None:
        from deployments.simulator.picture import draw_runs

        with refusing(ImportError, OSError):
            draw_runs(results, simulation.objective, picture)
