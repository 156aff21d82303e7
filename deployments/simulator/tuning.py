"""Searches an autoscaling policy's parameters: the fewest GPU-hours that keep the objective.

Trials are simulated with some seeds. A trial that misses the objective is worse than every one that
keeps it, by as much as it misses. The best of many trials has been lucky with its seeds, so the
cheapest ones are tried again with twice as many others, and the first that keeps the objective
there, too, wins. What is reported of it comes from seeds that had no part in any of this.

Optuna's tree of Parzen estimators proposes, several trials at a time; the first ones are the
policy's defaults, values that follow the load at once, and some between the two.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from deployments.simulator.checked import InvalidSimulation
from deployments.simulator.config import Simulation
from deployments.simulator.pool import Pool
from deployments.simulator.simulate import Summary
from deployments.simulator.space import Space

HELD_OUT = 1_000_000  # added to a seed that no trial sees
CONFIRMING = 500_000  # to one with which only the cheapest trials are tried again
MOST_CONFIRMED = 6  # trials, before the one of them that missed least is taken
FIRST = (0.0, 1.0, 0.5, 0.75)  # parts of the way from the defaults to values that follow the load
BATCH = 4  # trials that are proposed together, whatever the processes: the same search everywhere


@dataclass(frozen=True, slots=True)
class Outcome:
    """What some seeds give: the worst attainment, and the mean GPU-hours."""

    attained: float
    gpu_hours: float
    cost: float

    def score(self, wanted: float, most_hours: float) -> float:
        """Return the hours; above all possible ones where the objective is missed."""
        if self.attained >= wanted:
            return self.gpu_hours
        return most_hours * (1 + wanted - self.attained)


@dataclass(frozen=True, slots=True)
class Search:
    """The trials in order, the winner, and how it and the defaults do with other seeds."""

    space: Space
    trials: list[tuple[Mapping[str, float], Outcome]]
    winner: Mapping[str, float]
    held_out: Outcome
    defaults: Outcome  # held out, too
    keeps: bool  # whether the winner has kept the objective, with all seeds of the search

    @property
    def points(self) -> tuple[str, list[tuple[float, float]], tuple[float, float]]:
        """Return the name, (attained, GPU-hours) of all trials, and those of the winner."""
        trials = [(outcome.attained, outcome.gpu_hours) for _, outcome in self.trials]
        best = self.trials[[values for values, _ in self.trials].index(self.winner)][1]
        return self.space.name, trials, (best.attained, best.gpu_hours)


def outcome_of(runs: Sequence[Summary]) -> Outcome:
    count = len(runs)
    return Outcome(
        min(run.attained for run in runs),
        sum(run.gpu_hours for run in runs) / count,
        sum(run.cost for run in runs) / count,
    )


def search(
    simulation: Simulation,
    space: Space,
    *,
    trials: int,
    seeds: Sequence[int],
    pool: Pool,
    watch: Callable[[int], object] = lambda _: None,
    seed: int = 0,
) -> Search:
    """Run so many trials, each with all seeds; `watch` is called with 1 for each simulation.

    Raises ImportError without Optuna, InvalidSimulation if the policy has nothing to decide.
    """
    scaling = simulation.fleet.scaling
    if scaling.min == scaling.max:
        raise InvalidSimulation(
            f"fleet.scaling.min and max are both {scaling.min}: there is nothing to tune"
        )
    study = _study(seed)
    for part in FIRST:
        study.enqueue_trial(space.between(simulation, part))
    wanted, most_hours = simulation.objective.attained, _most_hours(simulation)
    found: list[tuple[Mapping[str, float], Outcome]] = []
    while len(found) < trials:
        asked = [study.ask() for _ in range(min(BATCH, trials - len(found)))]
        proposed = [_proposed(trial, space) for trial in asked]
        outcomes = _run(simulation, space, proposed, seeds, pool, watch)
        for trial, outcome in zip(asked, outcomes, strict=True):
            study.tell(trial, outcome.score(wanted, most_hours))
        found += zip(proposed, outcomes, strict=True)
    ranked = sorted(found, key=lambda each: each[1].score(wanted, most_hours))
    keeping = [values for values, outcome in ranked if outcome.attained >= wanted]
    winner, keeps = ranked[0][0], False
    if keeping:
        winner, confirmed = _confirm(
            simulation, space, keeping[:MOST_CONFIRMED], seeds, pool, watch
        )
        keeps = confirmed.attained >= wanted
    others = [HELD_OUT + seed for seed in seeds]
    held_out, of_defaults = _run(simulation, space, [winner, space.defaults], others, pool, watch)
    return Search(space, found, winner, held_out, of_defaults, keeps)


def _confirm(
    simulation: Simulation,
    space: Space,
    best: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
    pool: Pool,
    watch: Callable[[int], object],
) -> tuple[Mapping[str, float], Outcome]:
    """Return the first of the best that keeps the objective with other seeds, too; if none does,
    the one that misses it least."""
    fresh = [CONFIRMING + seed for seed in (*seeds, *(each + CONFIRMING // 10 for each in seeds))]
    tried: list[tuple[Mapping[str, float], Outcome]] = []
    for values in best:
        (outcome,) = _run(simulation, space, [values], fresh, pool, watch)
        tried.append((values, outcome))
        if outcome.attained >= simulation.objective.attained:
            return tried[-1]
    return max(tried, key=lambda each: each[1].attained)


def num_simulations(trials: int, num_seeds: int) -> int:
    """Return how often `search` calls `watch`, at most."""
    return (trials + 2 * MOST_CONFIRMED + 2) * num_seeds


def _study(seed: int) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the search needs Optuna: pip install 'reef[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)
    return optuna.create_study(sampler=sampler, direction="minimize")


def _proposed(trial: Any, space: Space) -> dict[str, float]:
    return {
        name: trial.suggest_float(name, r.least, r.most, log=r.is_log)
        for name, r in space.ranges.items()
    }


def _run(
    simulation: Simulation,
    space: Space,
    proposed: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
    pool: Pool,
    watch: Callable[[int], object],
) -> list[Outcome]:
    jobs = [(space.place(simulation, values), seed) for values in proposed for seed in seeds]
    runs, count = pool.run(jobs, watch), len(seeds)
    return [outcome_of(runs[i : i + count]) for i in range(0, len(runs), count)]


def _most_hours(simulation: Simulation) -> float:
    fleet = simulation.fleet
    return 10 * fleet.scaling.max * max(fleet.gpus, 1e-9) * simulation.duration_s / 3600


def row(found: Search) -> dict[str, Any]:
    """Return a search as plain data."""
    return {
        "policy": found.space.name,
        "autoscaling": found.space.block(found.winner),
        "keeps_objective": found.keeps,
        "held_out": msgspec.to_builtins(found.held_out),
        "defaults_held_out": msgspec.to_builtins(found.defaults),
        "trials": [
            {"values": dict(values), **msgspec.to_builtins(outcome)}
            for values, outcome in found.trials
        ],
    }


def report(simulation: Simulation, searches: Sequence[Search]) -> Iterator[str]:
    """Write what was found, and the blocks to paste."""
    wanted = simulation.objective.attained
    yield f"objective kept for {wanted:.2%} of the requests; held-out seeds:"
    yield "policy          kept  GPU-hours      cost"
    for found in searches:
        for name, outcome in (("", found.held_out), (" defaults", found.defaults)):
            yield (
                f"{found.space.name + name:14}{outcome.attained:7.2%}{outcome.gpu_hours:11.3f}"
                f"{outcome.cost:10.2f}"
            )
    for found in searches:
        yield ""
        if not found.keeps:
            yield f"# no trial of {found.space.name} keeps the objective with all seeds; nearest:"
        yield from _block(found)


def _block(found: Search) -> Iterator[str]:
    is_ours = found.space.name == "reef"
    yield "autoscaling:" if is_ours else "autoscaling_config:  # Ray Serve's own"
    values = found.space.block(found.winner)
    yield from [f"  {key}: {value:g}" for key, value in values.items()] or ["  {}  # the defaults"]
