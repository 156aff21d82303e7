"""Chooses the implementation of a quantized linear layer, by its number of rows.

    fused         decode and multiply in one kernel: reads a quarter of the bytes, but decodes
                  them again for every tile of rows
    dequantize    the whole weight into scratch memory, then the library's product: for many rows
    bitsandbytes  its gemm_4bit, NF4 only; the layer then keeps a second copy of the codes

`crossovers.json` holds the measured choices, under the name of the device they were measured on:

    {"devices": {"NAME": [{"format": "nf4", "out_features": 4096, "in_features": 4096, "choices": [
      {"up_to_rows": 16, "implementation": "fused", "tiles": {"rows": 16, "outputs": 128,
       "num_warps": 4, "num_stages": 4, "split_k": 8}},
      {"up_to_rows": null, "implementation": "dequantize"}]}]}}

For every other device and shape `unmeasured` decides, by counting bytes, instructions and
processors alone.
"""

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("crossovers.json")
IMPLEMENTATIONS = ("fused", "dequantize", "bitsandbytes")
ROWS = (16, 32, 64, 128, 256)  # in a tile
OUTPUTS = (64, 128)

LARGEST_FUSED = 256  # rows
LARGEST_SPLIT = 16
BLOCKS_PER_PART = 8  # at least: each part fills and drains its pipeline once


@dataclass(frozen=True, slots=True)
class GemmTiles:
    """Tile sizes of the fused kernel. A row's bits depend on `rows` and `split_k`."""

    rows: int
    outputs: int
    num_warps: int
    num_stages: int
    split_k: int = 1

    def __post_init__(self) -> None:
        if self.rows not in ROWS or self.outputs not in OUTPUTS or self.split_k < 1:
            raise ValueError(
                f"{self}: allowed are rows {ROWS}, outputs {OUTPUTS} and split_k from 1 on"
            )


@dataclass(frozen=True, slots=True)
class Choice:
    up_to_rows: int | None  # None: any number
    implementation: str
    tiles: GemmTiles | None = None  # of fused


@dataclass(frozen=True, slots=True)
class Shape:
    format: str
    out_features: int
    in_features: int


# Not measured. In the compiled code, tiles of 64 rows cost the fewest instructions per weight, even
# for fewer rows; 128 are needed if decoding twice would cost more than idle tensor cores. The
# last number is how many programs a processor should get, if the inputs can be split that far.
_UNMEASURED = (
    (64, GemmTiles(64, 128, num_warps=4, num_stages=4), 2),
    (LARGEST_FUSED, GemmTiles(128, 128, num_warps=8, num_stages=3), 1),
)


def choices_for(
    shape: Shape, blocks: int, device_name: str, processors: int, table: Path = TABLE
) -> tuple[Choice, ...]:
    """List the choices by ascending rows; the last takes any number.

    Splits cut the inputs at multiples of a block; there are `blocks` of them. Raises ValueError if
    the table is not in the format above.
    """
    for entry in json.loads(table.read_text())["devices"].get(device_name, []):
        if shape == Shape(entry["format"], entry["out_features"], entry["in_features"]):
            return _read(entry["choices"])
    return unmeasured(shape, blocks, processors)


def unmeasured(shape: Shape, blocks: int, processors: int) -> tuple[Choice, ...]:
    """Choose fused up to LARGEST_FUSED rows, then dequantize."""
    choices = [Choice(None, "dequantize")]
    for up_to_rows, tiles, programs in reversed(_UNMEASURED):
        panels = -(-shape.out_features // tiles.outputs)
        split_k = _split(panels, blocks, programs * processors)
        choices.insert(0, Choice(up_to_rows, "fused", replace(tiles, split_k=split_k)))
    return tuple(choices)


def choose(choices: tuple[Choice, ...], rows: int) -> Choice:
    return next(c for c in choices if c.up_to_rows is None or rows <= c.up_to_rows)


def _split(panels: int, blocks: int, programs: int) -> int:
    """Return the smallest power of two that gives `programs` programs, if the inputs suffice."""
    split = 1
    while split < LARGEST_SPLIT and panels * split < programs:
        if blocks < 2 * split * BLOCKS_PER_PART:
            break
        split *= 2
    return split


def _read(entries: list[dict[str, Any]]) -> tuple[Choice, ...]:
    choices = tuple(_choice(**entry) for entry in entries)
    limits = [c.up_to_rows for c in choices]
    rising = all(a is not None and (b is None or a < b) for a, b in pairwise(limits))
    if not limits or limits[-1] is not None or not rising:
        raise ValueError(f"up_to_rows {limits}: expected rising numbers, and null at the end")
    return choices


def _choice(
    up_to_rows: int | None, implementation: str, tiles: dict[str, int] | None = None
) -> Choice:
    if implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation {implementation!r}: allowed are {allowed}")
    if (tiles is None) == (implementation == "fused"):
        raise ValueError(f"tiles {tiles}: expected for fused, and for nothing else")
    if tiles is not None and up_to_rows is None:
        raise ValueError("up_to_rows null of fused: expected a number, which its planes are for")
    return Choice(up_to_rows, implementation, None if tiles is None else GemmTiles(**tiles))
