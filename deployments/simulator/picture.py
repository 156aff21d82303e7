"""Draws simulations and searches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.simulator.config import Objective
from deployments.simulator.simulate import Result
from engine.figure import open_figure, save_figure

COLOURS = ("#2a6f97", "#e0874f", "#5b8c5a", "#8d5a97", "#b23a48", "#7a7a7a")


def draw_runs(results: Sequence[tuple[str, Result]], objective: Objective, path: Path) -> None:
    """Draw replicas and requests over time, and how many requests had how short a first token.

    Raises ImportError without matplotlib, OSError if the file cannot be written.
    """
    figure, (left, middle, right) = _figure(path, 3)
    for colour, (name, result) in zip(COLOURS * 9, results, strict=False):
        line = result.timeline
        left.plot(line.time_s, line.replicas, color=colour, label=name)
        middle.plot(line.time_s, line.requests, color=colour, linewidth=0.8)
        waits = sorted(result.outcomes.ttft_s)
        right.plot(waits, [(i + 1) / len(waits) for i in range(len(waits))], color=colour)
    right.axvline(objective.ttft_s, color="#999999", linestyle="--", linewidth=0.8)
    _label(left, "time (s)", "replicas")
    _label(middle, "time (s)", "requests at the replicas")
    _label(right, "time to the first token (s)", "part of the requests")
    right.set_xscale("log")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_frontier(
    searches: Sequence[tuple[str, Sequence[tuple[float, float]], tuple[float, float]]],
    wanted: float,
    path: Path,
) -> None:
    """Draw cost against the part of requests that were not served well, on a log scale.

    Each search has a name, a point (attained, GPU-hours) for every trial, and the winner's. Raises
    as `draw_runs`.
    """
    figure, (axes,) = _figure(path, 1)
    for colour, (name, trials, winner) in zip(COLOURS, searches, strict=False):
        axes.scatter(*_misses(trials), s=9, color=colour, alpha=0.35, linewidths=0)
        front = _frontier(trials)
        axes.plot(*_misses(front), color=colour, linewidth=1.2, label=name)
        axes.scatter(
            *_misses([winner]), s=70, marker="*", color=colour, edgecolors="black", zorder=3
        )
    axes.axvline(max(1 - wanted, LEAST_MISS), color="#999999", linestyle="--", linewidth=0.8)
    axes.set_xscale("log")
    _label(axes, "part of the requests that missed the objective", "GPU-hours")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


LEAST_MISS = 1e-4  # where nobody missed it


def _misses(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [max(1 - attained, LEAST_MISS) for attained, _ in points], [h for _, h in points]


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one is better than in both, by attainment."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p[0], p[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _figure(path: Path, count: int) -> tuple[Any, Any]:
    return open_figure(path, "simulator", count, figsize=(3.6 * count + 2, 3.4))


def _label(axes: Any, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
