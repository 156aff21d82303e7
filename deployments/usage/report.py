"""Writes sums of usage: as a table, CSV, lines of JSON, or Parquet."""

import csv
import json
from collections.abc import Sequence
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from deployments.usage.prices import add_costs
from deployments.usage.sums import COUNTS, Sum

COST_PLACES = Decimal("0.000001")
TOTAL = "total"


class MissingExtra(Exception):
    """A package that is not installed is needed."""


def write_report(
    form: str,
    by: Sequence[str],
    rows: Sequence[Sum],
    currency: str,
    file: TextIO,
    path: Path | None,
) -> None:
    """Write to the file, and Parquet to the path. Raises OSError, MissingExtra."""
    has_cost = any(row.cost is not None for row in rows)
    names = [*by, *COUNTS, *(["cost"] if has_cost else [])]
    if form == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(_cells(row) for row in rows)
    elif form == "json":
        for row in rows:
            file.write(json.dumps(dict(zip(names, _cells(row), strict=True))) + "\n")
    elif form == "parquet":
        assert path is not None, "Parquet is written to a file"
        _write_parquet(path, by, rows, has_cost)
    else:
        _write_table(file, by, rows, currency if has_cost else None)


def exact(cost: Decimal) -> str:
    """Write all digits, without an exponent."""
    text = f"{cost:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _cells(row: Sum) -> list[Any]:
    cost = [] if row.cost is None else [exact(row.cost)]
    return [*row.group, *row.counts, *cost]


def _write_table(
    file: TextIO, by: Sequence[str], rows: Sequence[Sum], currency: str | None
) -> None:
    heads = [*by, *(name.removesuffix("_tokens") for name in COUNTS)]
    if currency is not None:
        heads.append(f"cost {currency}".strip())
    lines = [[*map(str, row.group), *_figures(row.counts, row.cost)] for row in rows]
    totals = tuple(map(sum, zip(*(row.counts for row in rows), strict=True)))
    cost = None if currency is None else add_costs(row.cost or Decimal(0) for row in rows)
    if rows:
        lines.append([TOTAL, *[""] * (len(by) - 1), *_figures(totals, cost)])
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    for line in [heads, *lines]:
        cells = [
            cell.ljust(width) if at < len(by) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        file.write("  ".join(cells).rstrip() + "\n")


def _figures(counts: Sequence[int], cost: Decimal | None) -> list[str]:
    return [*map(str, counts), *([] if cost is None else [f"{cost.quantize(COST_PLACES):f}"])]


def _write_parquet(path: Path, by: Sequence[str], rows: Sequence[Sum], has_cost: bool) -> None:
    try:
        pa: Any = import_module("pyarrow")
        pq: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtra(
            "Parquet needs pyarrow: pip install 'reef[usage]', or use --format csv"
        ) from None
    columns: dict[str, Any] = {}
    for at, name in enumerate(by):
        columns[name] = [row.group[at] for row in rows]
    for at, name in enumerate(COUNTS):
        columns[name] = pa.array([row.counts[at] for row in rows], pa.int64())
    if has_cost:
        costs = [(row.cost or Decimal(0)).quantize(COST_PLACES) for row in rows]
        columns["cost"] = pa.array(costs, pa.decimal128(38, 6))
    pq.write_table(pa.table(columns), path)
