"""Measures every way of a quantized linear layer, and prints the entries of crossovers.json.

    python -m tests.bench.gpu_crossovers --format nf4 > nf4.json     on a CUDA device
    TRITON_INTERPRET=1 python -m tests.bench.gpu_crossovers --tiny   here: does it run?

For the shapes of Llama-3-8B, in bfloat16, each weight cold: copies of it take turns. What was
measured goes to stderr, a line for each number of rows.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from engine.kernels.quantized import QuantizedWeight
from engine.kernels.triton import bitsandbytes_gemm
from engine.kernels.triton.crossovers import Choice, Tiles
from engine.kernels.triton.dequantize import multiply_dense
from engine.kernels.triton.fourbit import multiply, planes_size
from engine.kernels.triton.packed_weight import pack
from tests.bench.gpu_clock import Work, graph_s
from tests.bench.gpu_model import random_quantized

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # qkv, o, gate and up, down
ROWS = (4, 16, 32, 64, 128, 256, 512)
TILES = (
    *(Tiles(16, 64, 4, stages) for stages in (4, 6)),
    *(Tiles(16, 128, 4, stages) for stages in (4, 6)),
    Tiles(32, 64, 4, 4),
    Tiles(64, 64, 4, 4),
    *(Tiles(64, 128, 4, stages) for stages in (3, 4)),
    Tiles(64, 128, 8, 4),
    Tiles(128, 128, 8, 3),
)
SPLITS = (1, 2, 4, 8, 16)
COLD_BYTES = 2**28  # of weights between two uses of one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=("nf4", "int8"), default="nf4")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in the interpreter")
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    name = device.type if options.tiny else torch.cuda.get_device_name(device)
    shapes = ((128, 128),) if options.tiny else SHAPES
    rows = (4, 16) if options.tiny else ROWS
    entries = [_entry(options.format, *shape, rows, device) for shape in shapes]
    print(json.dumps({"devices": {name: entries}}, indent=1))


def _entry(
    form: str, out_features: int, in_features: int, all_rows: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    first = random_quantized(form, out_features, in_features, device, generator)
    copies = 1 if device.type == "cpu" else max(2, COLD_BYTES // first.codes.nbytes)
    weights = [first] + [replace(first, codes=first.codes.clone()) for _ in range(copies - 1)]
    fastest: list[Choice] = []
    for rows in all_rows:
        timed = {choice: graph_s(works, device) for choice, works in _works(weights, rows, device)}
        best = min(timed, key=lambda choice: timed[choice])
        fastest.append(best)
        line = f"{form} {out_features} x {in_features}, {rows} rows: {best.implementation}"
        print(f"{line} {best.tiles}, {timed[best] * 1e6:.2f} us", file=sys.stderr, flush=True)
    choices = [asdict(choice) for choice in [*_merged(fastest), Choice(None, "dequantize")]]
    shape = {"format": form, "out_features": out_features, "in_features": in_features}
    return shape | {"choices": [{k: v for k, v in c.items() if k != "tiles" or v} for c in choices]}


def _merged(fastest: list[Choice]) -> list[Choice]:
    """Without those that the next one, for more rows, repeats; and none that only dequantizes."""
    following = [*fastest[1:], Choice(None, "dequantize")]
    same = [
        replace(a, up_to_rows=None) == replace(b, up_to_rows=None)
        for a, b in zip(fastest, following, strict=True)
    ]
    return [choice for choice, repeated in zip(fastest, same, strict=True) if not repeated]


def _works(
    weights: list[QuantizedWeight], rows: int, device: torch.device
) -> Iterator[tuple[Choice, list[Work]]]:
    dtype = torch.bfloat16
    packed = [pack(weight, device) for weight in weights]
    out_features, in_features = packed[0].out_features, packed[0].in_features
    x = torch.randn(rows, in_features, device=device).to(dtype)
    out = torch.empty(rows, out_features, dtype=dtype, device=device)
    for base, split_k in product(TILES, SPLITS):
        tiles = replace(base, split_k=split_k)
        if tiles.rows <= 2 * max(rows, 32) and rows <= 4 * tiles.rows:
            size = planes_size(packed[0], rows, tiles)
            planes = torch.empty(size, device=device)
            yield (
                Choice(rows, "fused", tiles),
                [partial(multiply, x, weight, None, out, planes, tiles) for weight in packed],
            )
    dense = torch.empty(out_features, in_features, dtype=dtype, device=device)
    yield (
        Choice(rows, "dequantize"),
        [partial(multiply_dense, x, weight, None, out, dense) for weight in packed],
    )
    if rows <= 64 and bitsandbytes_gemm.takes(weights[0], device):
        theirs = [bitsandbytes_gemm.pack(weight, None, device) for weight in weights]
        yield Choice(rows, "bitsandbytes"), [partial(gemm, x) for gemm in theirs]


if __name__ == "__main__":
    main()
