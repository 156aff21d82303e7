"""Rows of the GPU benchmark: a number, what it is measured against, and whether that is enough."""

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.environment import append_row


@dataclass(frozen=True, slots=True)
class Goal:
    """`share` must be at least, or at most, `bound`; what a share is of, `of` says."""

    share: float
    of: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_bounded(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    def verdict(self) -> str:
        if self.at_least is not None and self.share < self.at_least:
            return f"MISSED: {self.share:.2f} of {self.of}, at least {self.at_least}"
        if self.at_most is not None and self.share > self.at_most:
            return f"MISSED: {self.share:.2f} of {self.of}, at most {self.at_most}"
        bound = f", at least {self.at_least}" if self.at_least is not None else ""
        bound += f", at most {self.at_most}" if self.at_most is not None else ""
        return f"{self.share:.2f} of {self.of}{bound}"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; `value` None: not measured, and `note` says why."""

    name: str
    value: float | None
    unit: str
    goal: Goal | None = None
    note: str = ""

    def __str__(self) -> str:
        number = "not measured" if self.value is None else f"{self.value:.4g} {self.unit}"
        parts = [self.name, number]
        parts += [self.goal.verdict()] if self.goal and self.value is not None else []
        parts += [self.note] if self.note else []
        return " | ".join(parts)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the benchmark that can be run by itself."""

    name: str
    run: Callable[[], Iterable[Row]]


def report(parts: Iterable[Part], rows_file: Path | None, *, is_judged: bool) -> list[Row]:
    """Runs the parts, printing each row as it comes; a part that fails leaves one that says so.

    Where the speed means nothing, no row is judged."""
    rows: list[Row] = []
    for part in parts:
        try:
            for row in part.run():
                kept = row if is_judged else _unjudged(row)
                append_row(rows_file, str(kept))
                rows.append(kept)
        except Exception as error:
            traceback.print_exc()
            failed = Row(part.name, None, "", note=f"failed: {type(error).__name__}: {error}")
            append_row(rows_file, str(failed).replace("\n", " "))
            rows.append(failed)
    return rows


def _unjudged(row: Row) -> Row:
    goal = row.goal and replace(row.goal, at_least=None, at_most=None)
    return replace(row, goal=goal)


def table(rows: Iterable[Row]) -> str:
    """What has a goal, the missed ones first."""
    judged = [row for row in rows if row.value is None or (row.goal and row.goal.is_bounded)]
    judged.sort(key=lambda row: row.goal is not None and "MISSED" not in row.goal.verdict())
    return "\n".join(str(row) for row in judged)
