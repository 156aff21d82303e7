"""Measures all implementations of a quantized linear layer; prints entries of crossovers.json.

    python -m tests.bench.gpu_crossovers --format nf4 > nf4.json     on a CUDA device
    TRITON_INTERPRET=1 python -m tests.bench.gpu_crossovers --tiny   here: does it run?

For the shapes of Llama-3-8B, in bfloat16, with cold weights: copies of a weight take turns. The
measurements are printed to stderr, a line for each number of rows.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from engine.backends.cuda.triton import bitsandbytes_gemm
from engine.backends.cuda.triton.crossovers import Choice, GemmTiles
from engine.backends.cuda.triton.dequantize import multiply_dense
from engine.backends.cuda.triton.fourbit import multiply, planes_size
from engine.backends.cuda.triton.packed_weight import PackedWeight, pack
from engine.model.quantized_weight import QuantizedWeight
from tests.bench.gpu_clock import Budget, Work, graphs_s, recorded, wake
from tests.bench.gpu_model import random_quantized

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # qkv, o, gate and up, down
ROWS = (1, 4, 8, 16, 32, 64, 128, 256)
TILES = (
    *(GemmTiles(16, 64, 4, stages) for stages in (4, 6)),
    *(GemmTiles(16, 128, 4, stages) for stages in (4, 6)),
    GemmTiles(32, 64, 4, 4),
    GemmTiles(64, 64, 4, 4),
    *(GemmTiles(64, 128, 4, stages) for stages in (3, 4)),
    GemmTiles(64, 128, 8, 4),
    GemmTiles(128, 128, 8, 3),
)
SPLITS = (1, 2, 4, 8, 16)
MOST_PROGRAMS = 1024  # of a split product: about eight for each of an H200's processors
COLD_BYTES = 2**28  # of weights used between two uses of one

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """The fastest choice at a number of rows, and the fastest time of each implementation."""

    choice: Choice
    seconds: float
    of_each: dict[str, float]


class OutOfTime(RuntimeError):
    """Raised if a shape was not measured at all numbers of rows, which its entry needs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in the interpreter")
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    name = device.type if options.tiny else torch.cuda.get_device_name(device)
    shapes = ((128, 128),) if options.tiny else SHAPES
    rows = (4, 16) if options.tiny else ROWS
    wake(device)
    entries: list[Entry] = []
    for shape in shapes:
        found = search(options.format, *shape, rows, device)
        entries.append(entry(options.format, *shape, found))
        for one in found:
            print(f"{options.format} {shape}: {described(one)}", file=sys.stderr, flush=True)
    print(json.dumps({"devices": {name: entries}}, indent=1))


def search(
    form: str,
    out_features: int,
    in_features: int,
    all_rows: Sequence[int],
    device: torch.device,
    budget: Budget | None = None,
) -> list[Found]:
    """Find the fastest choices, by ascending rows. Raises OutOfTime."""
    generator = torch.Generator(device).manual_seed(0)
    first = random_quantized(form, out_features, in_features, device, generator)
    copies = 1 if device.type == "cpu" else max(2, -(-COLD_BYTES // first.codes.nbytes))
    weights = [first] + [replace(first, codes=first.codes.clone()) for _ in range(copies - 1)]
    ways = _Ways(weights, device)
    found: list[Found] = []
    for rows in all_rows:
        if budget is not None and budget.is_spent:
            raise OutOfTime(f"{form} {out_features} x {in_features}: not at {rows} rows and more")
        found.append(_fastest(ways, rows, device))
    return found


def entry(form: str, out_features: int, in_features: int, found: Sequence[Found]) -> Entry:
    """Make the entry of a shape in crossovers.json."""
    fastest = [one.choice for one in found]
    choices = [asdict(choice) for choice in [*_merged(fastest), Choice(None, "dequantize")]]
    shape = {"format": form, "out_features": out_features, "in_features": in_features}
    return shape | {"choices": [{k: v for k, v in c.items() if k != "tiles" or v} for c in choices]}


def described(found: Found) -> str:
    choice, tiles = found.choice, found.choice.tiles
    way = choice.implementation
    if tiles is not None:
        way += f" {tiles.rows} x {tiles.outputs}, {tiles.num_warps} warps, "
        way += f"{tiles.num_stages} stages, split {tiles.split_k}"
    each = ", ".join(f"{name} {s * 1e6:.1f} us" for name, s in found.of_each.items())
    return f"{choice.up_to_rows} rows: {way}; {each}"


def _fastest(ways: "_Ways", rows: int, device: torch.device) -> Found:
    works = dict(ways.of(rows))
    timed = graphs_s(works, device, rounds=9)
    best = min(timed, key=lambda choice: timed[choice])
    of_each: dict[str, float] = {}
    for choice, seconds in timed.items():
        known = of_each.get(choice.implementation, seconds)
        of_each[choice.implementation] = min(known, seconds)
    return Found(best, timed[best], of_each)


def _merged(fastest: list[Choice]) -> list[Choice]:
    """Drop choices equal to the next one, for more rows, and trailing ones that dequantize."""
    following = [*fastest[1:], Choice(None, "dequantize")]
    same = [
        replace(a, up_to_rows=None) == replace(b, up_to_rows=None)
        for a, b in zip(fastest, following, strict=True)
    ]
    return [choice for choice, repeated in zip(fastest, same, strict=True) if not repeated]


def bitsandbytes_products(
    weights: Sequence[QuantizedWeight], dtype: torch.dtype, device: torch.device
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Return bitsandbytes' product with each weight; none if not installed or not working."""
    if not bitsandbytes_gemm.takes(weights[0], device):
        return []
    try:
        theirs = [bitsandbytes_gemm.pack(weight, None, device) for weight in weights]
        x = torch.randn(8, weights[0].in_features, device=device).to(dtype)
        recorded([partial(theirs[0], x)], device)()
        torch.cuda.synchronize(device)
    except Exception as error:
        print(f"bitsandbytes is left out: {error}", file=sys.stderr, flush=True)
        return []
    return theirs


class _Ways:
    """Holds copies of one weight, packed once for every implementation."""

    def __init__(self, weights: list[QuantizedWeight], device: torch.device) -> None:
        self._device, self._dtype = device, torch.bfloat16
        self._packed = [pack(weight, device) for weight in weights]
        size = self._packed[0].out_features, self._packed[0].in_features
        self._dense = torch.empty(size, dtype=self._dtype, device=device)
        self._theirs = bitsandbytes_products(weights, self._dtype, device)

    def of(self, rows: int) -> Iterator[tuple[Choice, list[Work]]]:
        first = self._packed[0]
        x = torch.randn(rows, first.in_features, device=self._device).to(self._dtype)
        out = torch.empty(rows, first.out_features, dtype=self._dtype, device=self._device)
        for tiles in _tiles_for(rows, first):
            planes = torch.empty(planes_size(first, rows, tiles), device=self._device)
            works = [partial(multiply, x, w, None, out, planes, tiles) for w in self._packed]
            yield Choice(rows, "fused", tiles), works
        dense = [partial(multiply_dense, x, w, None, out, self._dense) for w in self._packed]
        yield Choice(rows, "dequantize"), dense
        if self._theirs and rows <= 64:
            yield Choice(rows, "bitsandbytes"), [partial(gemm, x) for gemm in self._theirs]


def _tiles_for(rows: int, weight: PackedWeight) -> Iterator[GemmTiles]:
    """Yield tiles of sizes near the number of rows, without splits that cannot pay off."""
    for base, split_k in product(TILES, SPLITS):
        programs = -(-rows // base.rows) * (weight.out_padded // base.outputs) * split_k
        fits = base.rows <= 2 * max(rows, 32) and rows <= 4 * base.rows
        if fits and (split_k == 1 or (programs <= MOST_PROGRAMS and weight.blocks >= split_k)):
            yield replace(base, split_k=split_k)


if __name__ == "__main__":
    main()
