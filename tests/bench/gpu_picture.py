"""Draws decode steps by batch: the time of the bytes they must read, and the time beyond that.

    python -m tests.bench.gpu_picture rows.jsonl -o steps.svg

Needs only the rows. In dark mode, text and lines are light.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from engine.plan.picture import COLOURS
from tests.bench.gpu_report import read_records

PARTS = {
    "weights_ms": ("weights", COLOURS["weights"]),
    "kv_ms": ("KV cache", COLOURS["KV cache"]),
    "lora_ms": ("adapters", COLOURS["adapters"]),
    "beyond_ms": ("beyond the roofline", "#a9a9a9"),
}
NAMES = {"none": "bfloat16", "nf4": "NF4", "fp8": "FP8"}
BAR, GAP, BETWEEN, LEFT, TOP, HEIGHT, BELOW = 34, 12, 44, 52, 46, 240, 64
STYLE = (
    "text{font:12px sans-serif;fill:#24292f}line{stroke:#8c959f}"
    "@media(prefers-color-scheme:dark){text{fill:#d0d7de}line{stroke:#6e7681}}"
)


@dataclass(frozen=True, slots=True)
class Bar:
    """A step of `batch` requests: its `floor` by part of PARTS, and its time; milliseconds."""

    form: str
    batch: int
    floor: Mapping[str, float]
    step_ms: float

    @property
    def parts(self) -> dict[str, float]:
        """Parts from the bottom up. If a step beats the floor, the part beyond it is 0."""
        beyond = max(0.0, self.step_ms - sum(self.floor.values()))
        return {**self.floor, "beyond_ms": beyond}


def bars_of(records: Iterable[Mapping[str, Any]], traffic: str = "distinct") -> list[Bar]:
    """Make the bars of steps with this traffic, sorted by format and batch."""
    bars: list[Bar] = []
    for record in records:
        numbers = record["numbers"]
        if numbers.get("traffic") == traffic and record["value"] is not None:
            floor = {name: float(numbers[name]) for name in PARTS if name in numbers}
            bars.append(Bar(numbers["format"], int(numbers["batch"]), floor, record["value"]))
    order = list(NAMES)
    return sorted(bars, key=lambda bar: (order.index(bar.form), bar.batch))


def draw(bars: Sequence[Bar], title: str) -> str:
    """Return an SVG. Raises ValueError if there are no bars."""
    if not bars:
        raise ValueError("no row of a decode step is among these")
    highest = max(sum(bar.parts.values()) for bar in bars)
    lefts = _lefts(bars)
    width = max(lefts[-1] + BAR + 16, 560)
    shapes = [*_axis(highest, width), *_legend(title)]
    for bar, left in zip(bars, lefts, strict=True):
        shapes += _bar(bar, left, HEIGHT / highest)
    shapes += _forms(bars, lefts)
    size = f"{width} {TOP + HEIGHT + BELOW}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{width}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *shapes, "</svg>"]) + "\n"


def _lefts(bars: Sequence[Bar]) -> list[int]:
    lefts: list[int] = []
    left, form = LEFT + GAP, bars[0].form
    for bar in bars:
        left += BETWEEN if bar.form != form else 0
        lefts.append(left)
        left, form = left + BAR + GAP, bar.form
    return lefts


def _bar(bar: Bar, left: int, scale: float) -> list[str]:
    shapes: list[str] = []
    bottom = float(TOP + HEIGHT)
    for name, milliseconds in bar.parts.items():
        height = milliseconds * scale
        bottom -= height
        shapes.append(
            f'<rect x="{left}" y="{bottom:.1f}" width="{BAR}" height="{height:.1f}" '
            f'fill="{PARTS[name][1]}"/>'
        )
    middle = left + BAR // 2
    share = sum(bar.floor.values()) / bar.step_ms
    shapes.append(_text(middle, bottom - 4, f"{share:.0%}"))
    shapes.append(_text(middle, TOP + HEIGHT + 16, str(bar.batch)))
    return shapes


def _forms(bars: Sequence[Bar], lefts: Sequence[int]) -> list[str]:
    shapes: list[str] = []
    for form in dict.fromkeys(bar.form for bar in bars):
        mine = [left for bar, left in zip(bars, lefts, strict=True) if bar.form == form]
        middle = (mine[0] + mine[-1] + BAR) // 2
        shapes.append(_text(middle, TOP + HEIGHT + 34, NAMES[form]))
    middle = (lefts[0] + lefts[-1] + BAR) // 2
    shapes.append(_text(middle, TOP + HEIGHT + 54, "requests in a step, each with its own adapter"))
    return shapes


def _axis(highest: float, width: int) -> list[str]:
    bottom = TOP + HEIGHT
    shapes = [f'<line x1="{LEFT}" y1="{bottom}" x2="{width - 8}" y2="{bottom}"/>']
    for tick in _ticks(highest):
        y = bottom - HEIGHT * tick / highest
        shapes.append(_text(LEFT - 8, y + 4, f"{tick:g}", "end"))
        shapes.append(f'<line x1="{LEFT - 4}" y1="{y:.1f}" x2="{LEFT}" y2="{y:.1f}"/>')
    return shapes


def _ticks(highest: float) -> list[float]:
    """Return four to nine round numbers, from 0 on."""
    power = 10 ** math.floor(math.log10(highest))
    step = next(step * power for step in (0.1, 0.2, 0.5, 1, 2) if highest / (step * power) < 9)
    return [round(i * step, 9) for i in range(math.floor(highest / step + 1e-9) + 1)]


def _legend(title: str) -> list[str]:
    shapes = [
        _text(8, 16, f"ms per decode step; above a bar, its share of the roofline{title}", "start")
    ]
    left = LEFT + GAP
    for name, colour in PARTS.values():
        shapes.append(f'<rect x="{left}" y="24" width="12" height="12" fill="{colour}"/>')
        shapes.append(_text(left + 16, 34, name, "start"))
        left += 36 + 7 * len(name)
    return shapes


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    records = read_records(options.rows)
    machines = sorted({str(record["machine"]) for record in records if "machine" in record})
    title = f" ({', '.join(machines)})" if machines else ""
    try:
        picture = draw(bars_of(records), title)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    options.output.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
