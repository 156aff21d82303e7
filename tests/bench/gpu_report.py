"""Reports rows of the GPU benchmark: a number, its reference, and whether its goal is met.

    python -m tests.bench.gpu_report rows-1.jsonl rows-2.jsonl    goals met, missed, not measured

A file of rows has one JSON object per line, written as soon as it is measured, with all conditions
of the number: every row is complete in itself.
"""

import argparse
import json
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

TARGETS = {
    "1": "decode steps beside the roofline",
    "2": "what adapters add to a step",
    "3": "mixed ranks beside uniform ones",
    "4": "NF4 products of 8 to 64 rows beside bitsandbytes and bfloat16",
    "5": "attention beside copies and FlashAttention",
    "6": "beside peft, and vLLM's LoRA kernels",
    "7": "the device never waits for the host",
    "8": "adapters load while others decode",
    "9": "prefill with an adapter; start",
}
MOST_CHARACTERS = 11_500  # in a summary

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on `share`, a ratio to the reference that `of` describes.

    The share must reach `at_least` or stay within `at_most`; without either there is no demand.
    """

    share: float
    of: str
    at_least: float | None = None
    at_most: float | None = None
    target: str = ""  # one of TARGETS

    @property
    def is_bounded(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    @property
    def is_met(self) -> bool:
        """Whether the share is within its bounds; NaN never is."""
        return (self.at_least is None or self.share >= self.at_least) and (
            self.at_most is None or self.share <= self.at_most
        )

    def __str__(self) -> str:
        share = f"{self.share:.3f} of {self.of}"
        if not self.is_bounded:
            return share
        bound = f"at least {self.at_least}" if self.at_least is not None else ""
        bound += f"at most {self.at_most}" if self.at_most is not None else ""
        return f"{'met' if self.is_met else 'MISSED'}: {share}, {bound}"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. If `value` is None it was not measured, and `note` gives the reason."""

    name: str
    value: float | None
    unit: str
    goal: Goal | None = None
    note: str = ""
    numbers: Mapping[str, float | str] = field(default_factory=dict[str, float | str])

    def __str__(self) -> str:
        number = "not measured" if self.value is None else f"{self.value:.4g} {self.unit}"
        parts = [self.name, number]
        parts += [str(self.goal)] if self.goal and self.value is not None else []
        parts += [self.note] if self.note else []
        return " | ".join(parts).replace("\n", " ")


def measured(row: Row) -> Row:
    """Return the row, or one marked as not measured if its value or share is NaN."""
    numbers = [row.value, row.goal.share if row.goal else 0.0]
    if row.value is None or not any(n is not None and math.isnan(n) for n in numbers):
        return row
    goal = row.goal and replace(row.goal, share=math.nan)
    return replace(row, value=None, goal=goal, note=f"not a number; {row.note}")


def missing(name: str, why: str, target: str = "") -> Row:
    goal = Goal(math.nan, "", target=target) if target else None
    return Row(name, None, "", goal, note=why)


def attempt(name: str, rows: Iterable[Row], target: str = "") -> Iterator[Row]:
    """Yield the rows; an exception ends them with a row that reports it, and is not raised."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        yield missing(name, f"failed: {type(error).__name__}: {text}", target)


class Rows:
    """Prints every row and writes it to the file, before the next one is measured."""

    def __init__(self, file: Path | None, context: Mapping[str, Any], *, is_judged: bool) -> None:
        self._file, self._context, self._is_judged = file, context, is_judged
        self.has_failed = False

    def add(self, part: str, row: Row) -> None:
        row = measured(row)
        self.has_failed |= row.value is None and row.note.startswith("failed")
        print(row if self._is_judged else _unjudged(row), flush=True)
        if self._file is not None:
            line = json.dumps(as_record(part, row, self._is_judged) | dict(self._context))
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _unjudged(row: Row) -> Row:
    goal = row.goal and replace(row.goal, at_least=None, at_most=None)
    return replace(row, goal=goal)


def as_record(part: str, row: Row, is_judged: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"part": part, "row": row.name, "value": row.value, "unit": row.unit}
    if row.goal:
        record |= {"target": row.goal.target}
        if row.value is not None:
            record |= {"share": row.goal.share, "of": row.goal.of}
        if row.goal.is_bounded:
            record |= {"at_least": row.goal.at_least, "at_most": row.goal.at_most}
            record |= {"met": row.goal.is_met} if is_judged and row.value is not None else {}
    return record | {"note": row.note, "numbers": dict(row.numbers)}


def read_records(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the rows of all files; of a part's rows with equal names, only the last counts.

    Lines that a killed process left incomplete are skipped.
    """
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            records.pop((record["part"], record["row"]), None)
            records[record["part"], record["row"]] = record
    return list(records.values())


# ==== the summary ====


def summary(records: Iterable[Record], most: int = MOST_CHARACTERS) -> str:
    """Format a line per target, then missed, failed and met goals, within `most` characters."""
    kept = list(records)
    lines = [_target_line(target, kept) for target in TARGETS]
    judged = [r for r in kept if "met" in r]
    lines += [_line("MISSED", r) for r in judged if not r["met"]]
    lines += [_line("-", r) for r in kept if r["value"] is None]
    lines += [_line("met", r) for r in judged if r["met"]]
    return _cut(lines, most)


def _target_line(target: str, records: list[Record]) -> str:
    mine = [r for r in records if r.get("target") == target]
    met = sum(r.get("met") is True for r in mine)
    missed = sum(r.get("met") is False for r in mine)
    absent = sum(r["value"] is None for r in mine)
    verdict = "not measured"
    if missed or met:
        verdict = "MISSED" if missed else "met"
    counts = f"{met} met, {missed} missed, {absent} not measured"
    return f"target {target} | {verdict} | {counts} | {TARGETS[target]}"


def _line(verdict: str, record: Record) -> str:
    name = f"{record.get('target', '')} {record['row']}".strip()
    if record["value"] is None:
        return f"{verdict} | {name} | {record['note'][:160]}"
    at_least = record.get("at_least")
    bound = f">= {at_least}" if at_least is not None else f"<= {record.get('at_most')}"
    share = f"{record['share']:.3f} of {record['of']} ({bound})"
    return f"{verdict} | {name} | {record['value']:.4g} {record['unit']} | {share}"


def _cut(lines: list[str], most: int) -> str:
    kept: list[str] = []
    size = 0
    for i, line in enumerate(lines):
        more = f"... and {len(lines) - i} more lines"
        if size + len(line) + 1 + len(more) > most:
            return "\n".join([*kept, more])
        kept.append(line)
        size += len(line) + 1
    return "\n".join(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="+", type=Path)
    print(summary(read_records(parser.parse_args().rows)))


if __name__ == "__main__":
    main()
