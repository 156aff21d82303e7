"""`reef tune`: searches the parameters of an autoscaling policy in simulations."""

from pathlib import Path

import click

from reef.progress import progress
from reef.refusal import refusing


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--trials", type=click.IntRange(1, 100_000), default=100, show_default=True)
@click.option("--seeds", type=click.IntRange(1, 100), default=2, show_default=True, help="A trial.")
@click.option("--seed", default=0, show_default=True, help="The first one, and the search's own.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(["reef", "ray"]),
    default=["reef"],
    show_default=True,
    help="Several times: to compare them; ray is Ray Serve's own.",
)
@click.option("--processes", type=click.IntRange(1), help="[default: as many as processors]")
@click.option("--picture", type=click.Path(path_type=Path), help="Write a .svg or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each policy.")
def tune(
    file: Path,
    trials: int,
    seeds: int,
    seed: int,
    policies: tuple[str, ...],
    processes: int | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Search the cheapest autoscaling policy.

    Simulates FILE, as `reef simulate` reads it, and prints the policy with the fewest GPU-hours
    that keeps the objective, ready for a Serve config. Its figures are of seeds that the search
    has not seen.
    """
    import msgspec

    from deployments.simulator.config import InvalidSimulation, read_simulation
    from deployments.simulator.picture import draw_frontier
    from deployments.simulator.pool import Pool
    from deployments.simulator.space import SPACES
    from deployments.simulator.tuning import num_simulations, report, row, search

    with refusing(InvalidSimulation, ImportError, OSError):
        simulation = read_simulation(file)
        total = len(policies) * num_simulations(trials, seeds)
        with progress("tuning", total, " simulations") as advance, Pool(processes) as pool:
            searches = [
                search(
                    simulation,
                    SPACES[name],
                    trials=trials,
                    seeds=range(seed, seed + seeds),
                    pool=pool,
                    watch=advance,
                    seed=seed,
                )
                for name in policies
            ]
        if as_json:
            lines = [msgspec.json.encode(row(each)).decode() for each in searches]
        else:
            lines = list(report(simulation, searches))
        click.echo("\n".join(lines))
        if picture is not None:
            points = [each.points for each in searches]
            draw_frontier(points, simulation.objective.attained, picture)
