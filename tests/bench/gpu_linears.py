"""Measures linear layers of each weight format against bfloat16 and bitsandbytes."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from engine.backends.cuda.triton import crossovers
from engine.backends.cuda.triton.weight_only import WeightOnlyLinear
from engine.model.quantized_weight import QuantizedWeight
from tests.bench.gpu_clock import Work, graphs_s
from tests.bench.gpu_crossovers import (
    ROWS,
    SHAPES,
    Entry,
    OutOfTime,
    bitsandbytes_products,
    described,
    entry,
    search,
)
from tests.bench.gpu_model import random_quantized
from tests.bench.gpu_report import Goal, Row, attempt, missing
from tests.bench.gpu_setting import Setting

MOST_BITSANDBYTES_ROWS = 128
SITES = {"qkv": SHAPES[0], "o": SHAPES[1], "gate_up": SHAPES[2], "down": SHAPES[3]}


def linears(setting: Setting) -> Iterator[Row]:
    """Measure the implementations that the dispatcher chooses with the current table."""
    sites = setting.pick(SITES, SITES, {"qkv": (256, 128), "down": (128, 256)})
    all_rows = setting.pick((8, 16, 32, 64, 1, 4, 128, 256, 512), (1, 16, 64), (1, 3))
    if setting.device.type == "cuda" and not _has_bitsandbytes(setting):
        why = "bitsandbytes is not installed, or does not run"
        yield missing("NF4 beside bitsandbytes", why, "4")
    for rows in all_rows:
        for site, size in sites.items():
            if setting.budget.is_spent:
                return
            yield from attempt(f"linear {site}, {rows} rows", _rows(setting, site, size, rows))


def _has_bitsandbytes(setting: Setting) -> bool:
    weight = random_quantized("nf4", *SITES["o"], setting.device, _generator(setting))
    return bool(bitsandbytes_products([weight], setting.dtype, setting.device))


def _rows(setting: Setting, site: str, size: tuple[int, int], rows: int) -> Iterator[Row]:
    out_features, in_features = size
    x = setting.noise(rows, in_features)
    out = torch.empty(rows, out_features, dtype=setting.dtype, device=setting.device)
    works = {"bf16": _dense(setting, size, x, out)}
    for form in ("nf4", "int8"):
        works |= _quantized(setting, form, size, x, out)
    times = graphs_s(works, setting.device, rounds=setting.rounds)
    for name, seconds in times.items():
        yield _row(setting, f"{name} {site}, {rows} rows", name, seconds, size, times["bf16"])
    if "bitsandbytes" in times and 8 <= rows <= 64:
        share = times["nf4"] / times["bitsandbytes"]
        goal = Goal(share, "bitsandbytes' time", at_most=1.0, target="4")
        name = f"nf4 {site}, {rows} rows, beside bitsandbytes"
        yield Row(name, times["nf4"] * 1e6, "us", goal)
    if 8 <= rows <= 64:
        goal = Goal(times["nf4"] / times["bf16"], "bf16's time", at_most=1.0, target="4")
        yield Row(f"nf4 {site}, {rows} rows, beside bf16", times["nf4"] * 1e6, "us", goal)


def _row(
    setting: Setting, what: str, name: str, seconds: float, size: tuple[int, int], dense_s: float
) -> Row:
    width = {"bf16": 2.0, "int8": 1.0}.get(name, 0.5 + 4 / 64)
    num_bytes = size[0] * size[1] * width
    share = num_bytes / setting.roofline.bytes_per_s / seconds
    note = f"{dense_s / seconds:.2f} x bf16's speed"
    return Row(what, seconds * 1e6, "us", Goal(share, "its weight's bytes at copy speed"), note)


def _dense(
    setting: Setting, size: tuple[int, int], x: torch.Tensor, out: torch.Tensor
) -> list[Work]:
    copies = setting.copies(size[0] * size[1] * setting.dtype.itemsize)
    weights = [setting.noise(*size).mul_(0.02) for _ in range(copies)]
    return [partial(torch.mm, x, w.T, out=out) for w in weights]


def _quantized(
    setting: Setting, form: str, size: tuple[int, int], x: torch.Tensor, out: torch.Tensor
) -> dict[str, list[Work]]:
    copies = setting.copies(size[0] * size[1] // (2 if form == "nf4" else 1))
    first = random_quantized(form, *size, setting.device, _generator(setting))
    weights = [first] + [_other(first) for _ in range(copies - 1)]
    layers = [WeightOnlyLinear(w, None, setting.device, setting.dtype) for w in weights]
    works: dict[str, list[Work]] = {form: [partial(layer.into, x, out) for layer in layers]}
    if len(x) <= MOST_BITSANDBYTES_ROWS:
        theirs = bitsandbytes_products(weights, setting.dtype, setting.device)
        works |= {"bitsandbytes": [partial(gemm, x) for gemm in theirs]} if theirs else {}
    return works


def _other(weight: QuantizedWeight) -> QuantizedWeight:
    """Make a weight of equal codes in another order, which no cache holds."""
    return QuantizedWeight(
        weight.format, weight.codes.flip(0).contiguous(), weight.scales, weight.group_size
    )


def _generator(setting: Setting) -> torch.Generator:
    return torch.Generator(setting.device).manual_seed(0)


# ==== the table of crossovers ====


def fill_table(setting: Setting, file: Path | None) -> Iterator[Row]:
    """Measure all implementations of an NF4 layer, and fill the table of crossovers.

    Each shape's entry is written at once, to the table that the dispatcher reads and to `file`, so
    that later parts use it.
    """
    shapes = setting.pick(SHAPES, SHAPES[:1], ((128, 128),))
    all_rows = setting.pick(ROWS, (16, 256), (4,))
    entries: list[Entry] = []
    for size in shapes:
        try:
            found = search("nf4", *size, all_rows, setting.device, setting.budget)
        except OutOfTime as error:
            yield missing(f"crossovers of {size[0]} x {size[1]}", str(error))
            return
        entries.append(entry("nf4", *size, found))
        if setting.is_judged:
            write_table(torch.cuda.get_device_name(setting.device), entries, file)
        for one in found:
            name = f"fastest NF4 {size[0]} x {size[1]}, {one.choice.up_to_rows} rows"
            yield Row(name, one.seconds * 1e6, "us", note=described(one))


def write_table(device_name: str, entries: list[Entry], file: Path | None) -> None:
    """Write the entries to the table; those of other devices, formats and shapes are kept."""
    devices = json.loads(crossovers.TABLE.read_text())["devices"]
    ours = [_shape_of(e) for e in entries]
    kept = [e for e in devices.get(device_name, []) if _shape_of(e) not in ours]
    text = json.dumps({"devices": devices | {device_name: [*kept, *entries]}}, indent=2) + "\n"
    for path in [crossovers.TABLE, *([file] if file else [])]:
        path.write_text(text)


def _shape_of(entry: Entry) -> tuple[str, int, int]:
    return entry["format"], entry["out_features"], entry["in_features"]
