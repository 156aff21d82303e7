"""What a model costs before it is started: bytes of weights, KV and adapters, and the step floor.

    python -m engine.plan <model folder> [--memory 24GiB] [--context 2048] [--rank 16]
                          [--quantization int8] [--kv-dtype int8]
                          [--bandwidth GB/s] [--flops TFLOP/s] [--picture out.svg]

The command line and its text; the numbers come from `arithmetic`. Reads no weights.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.backends.kv_cache import SCALE_BYTES, kv_bytes_per_token
from engine.config import KV_DTYPES, QUANTIZATIONS
from engine.model.quantize import NF4_BLOCK
from engine.model.spec import ModelError
from engine.plan.machine import measure
from engine.sizes import (
    Load,
    Machine,
    ModelSize,
    adapter_bytes,
    adapter_values,
    formats,
    largest_batch,
    largest_distinct_batch,
    read_model_size,
    step_floor,
    weight_bytes,
)

NUM_ADAPTERS = (0, 1, 8, 32, 128)
BATCHES = (1, 8, 32, 128)
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    kv_dtype = torch.int8 if options.kv_dtype == "int8" else None
    load = Load(options.memory, options.context, options.rank, kv_dtype=kv_dtype)
    try:
        size = read_model_size(options.folder, options.quantization)
        if not load.context <= size.spec.max_position:
            raise ModelError(
                f"--context {load.context} is outside 1..{size.spec.max_position}, the positions "
                "that the model was made for"
            )
        if kv_dtype is not None and size.dtype != torch.bfloat16:
            raise ModelError(f"--kv-dtype int8 is only for bfloat16, not {_name(size.dtype)}")
        machine = _machine(size.dtype, options.bandwidth, options.flops)
        print("\n".join(report(size, load, machine)))
        if options.picture is not None:
            from engine.plan.picture import draw  # matplotlib is optional

            draw(size, load, machine, options.picture)
    except (ModelError, ImportError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 1
    return 0


def report(size: ModelSize, load: Load, machine: Machine) -> Iterator[str]:
    """The whole text, line by line."""
    yield from _parameters(size)
    yield from _weights(size)
    yield from _kv(size, load)
    yield from _adapters(size, load)
    yield from _batches(size, load)
    yield from _floors(size, load, machine)


# ==== sections ====


def _parameters(size: ModelSize) -> Iterator[str]:
    tied = "also the output layer (tied)" if not size.num_head else ""
    yield "Parameters"
    yield f"  linear layers    {size.num_linear:>16,}"
    yield f"  embeddings       {size.num_embedding:>16,}  {tied}".rstrip()
    yield f"  lm_head          {size.num_head:>16,}"
    yield f"  norms and biases {size.num_other:>16,}"
    yield f"  total            {size.num_parameters:>16,}"


def _weights(size: ModelSize) -> Iterator[str]:
    yield "\nWeights"
    for form in formats(size):
        nbytes = weight_bytes(size, form)
        own = "  how the engine serves it" if form == size.form else ""
        yield f"  {form.name:<9} {nbytes:>16,} bytes  {_size(nbytes):>10}{own}"
    yield (
        "  int8 and fp8 have a float32 scale per output row, nf4 a float32 absmax per "
        f"{NF4_BLOCK} values;"
    )
    yield "  all leave embeddings, lm_head, norms and biases in bfloat16."
    if size.form.quantization == "int4":
        group = size.form.group_size or "row"
        yield f"  as stored: 4-bit integers, a float32 scale and zero per group of {group};"
        yield f"  all else in {_name(size.dtype)}."


def _kv(size: ModelSize, load: Load) -> Iterator[str]:
    spec, dtype = size.spec, load.kv_dtype or size.dtype
    scale = f", and {SCALE_BYTES} bytes of scale per head" if dtype == torch.int8 else ""
    head = (
        f"{spec.head_dim} x {dtype.itemsize}" if not scale else f"({spec.head_dim} + {SCALE_BYTES})"
    )
    yield f"\nKV cache in {_name(dtype)}"
    yield f"  2 (K and V) x layers x KV heads x head dim x bytes per value, per token{scale}:"
    yield (
        f"  2 x {spec.num_layers} x {spec.num_kv_heads} x {head}"
        f" = {kv_bytes_per_token(spec, dtype):,} bytes"
    )
    yield (
        f"  a sequence of {load.context} tokens, in blocks of {load.block_size}: "
        f"{_size(load.sequence_bytes(size, size.form))}"
    )


def _adapters(size: ModelSize, load: Load) -> Iterator[str]:
    yield f"\nOne adapter of rank {load.lora_rank} in {_name(size.dtype)}"
    yield "  rank x sum over modules of (in + out) x bytes per value:"
    for name, attention_only in (("all linear modules", False), ("attention only", True)):
        values = adapter_values(size, attention_only=attention_only)
        nbytes = adapter_bytes(size, size.dtype, load.lora_rank, attention_only=attention_only)
        yield (
            f"  {name:<19} {load.lora_rank} x {values:,} x {size.dtype.itemsize}"
            f" = {nbytes:,} bytes  {_size(nbytes)}"
        )


def _batches(size: ModelSize, load: Load) -> Iterator[str]:
    yield (
        f"\nLargest batch in {_size(load.memory_bytes)}: sequences of {load.context} tokens beside "
        "the weights"
    )
    yield f"and that many adapters of rank {load.lora_rank} on all linear modules"
    yield "  adapters   " + "".join(f"{form.name:>10}" for form in formats(size))
    for count in NUM_ADAPTERS:
        cells = (largest_batch(size, form, load, count) for form in formats(size))
        yield f"  {count:<11}" + "".join(f"{cell:>10,}" for cell in cells)
    cells = (largest_distinct_batch(size, form, load) for form in formats(size))
    yield "  one for each" + "".join(f"{cell:>10,}" for cell in cells).removeprefix(" ")


def _floors(size: ModelSize, load: Load, machine: Machine) -> Iterator[str]:
    name = size.form.name
    yield f"\nDecode step floor in {name}, every sequence {load.context} tokens long"
    yield (
        f"  max(bytes read / {machine.bytes_per_s / 1e9:.1f} GB/s, "
        f"operations / {machine.flops_per_s / 1e12:.3f} TFLOP/s), {machine.source}"
    )
    yield "  batch           base model         one adapter       one for each"
    for batch in BATCHES:
        cells = (_floor(size, load, machine, batch, count) for count in (0, 1, batch))
        yield f"  {batch:<6}" + "".join(f"{cell:>19}" for cell in cells)
    yield "  ms per step and what bounds it: m memory, c computing"


def _floor(size: ModelSize, load: Load, machine: Machine, batch: int, num_adapters: int) -> str:
    floor = step_floor(size, load, machine, batch, num_adapters)
    bound = "m" if floor.read_s >= floor.compute_s else "c"
    return f"{1e3 * floor.step_s:,.2f} ms {bound}"


# ==== arguments ====


def _machine(dtype: torch.dtype, bandwidth: float | None, flops: float | None) -> Machine:
    """What is not given is measured."""
    if bandwidth is not None and flops is not None:
        return Machine(bandwidth * 1e9, flops * 1e12, "as given")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = measure(device, dtype)
    if bandwidth is not None:
        machine = replace(machine, bytes_per_s=bandwidth * 1e9)
        return replace(machine, source=f"the first as given, the second {machine.source}")
    if flops is not None:
        machine = replace(machine, flops_per_s=flops * 1e12)
        return replace(machine, source=f"the second as given, the first {machine.source}")
    return machine


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.plan",
        description="What a model needs: bytes of weights, KV and adapters, and the step floor.",
    )
    parser.add_argument("folder", type=Path, help="a local Hugging Face model folder")
    parser.add_argument("--memory", type=_bytes, default=24 * 2**30, help="default 24GiB")
    parser.add_argument("--context", type=_positive_int, default=2048, help="default %(default)s")
    parser.add_argument("--rank", type=_positive_int, default=16, help="default %(default)s")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto")
    parser.add_argument("--bandwidth", type=_positive, help="GB/s (default: measured)")
    parser.add_argument("--flops", type=_positive, help="TFLOP/s (default: measured)")
    parser.add_argument("--picture", type=Path, help="write a .svg or .png; needs matplotlib")
    return parser.parse_args(arguments)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", text)
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        units = ", ".join(unit for unit in UNITS if unit)
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: a number, then one of {units}")
    return int(float(match[1]) * UNITS[match[2]])


def _positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _size(nbytes: int) -> str:
    unit = next((u for u in ("GiB", "MiB") if nbytes >= UNITS[u]), "KiB")
    return f"{nbytes / UNITS[unit]:,.2f} {unit}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
