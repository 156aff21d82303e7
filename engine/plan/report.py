"""Reports the plan of a model: bytes of weights, KV cache and adapters, and the step floor.

The numbers come from `engine.sizes`, those of the machine from `machine`. Reads no weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.byte_size import format_byte_size
from engine.model.formats import auto_quantization, own_dtype
from engine.model.quantize import INT4_BLOCK, NF4_BLOCK
from engine.model.spec import KV_SCALE_BYTES, ModelError, kv_bytes_per_token
from engine.plan.machine import given_or_measured
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


@dataclass(frozen=True, slots=True)
class Plan:
    """A model, its load, and the machine that it runs on."""

    size: ModelSize
    load: Load
    machine: Machine


def make_plan(
    folder: Path,
    *,
    memory_bytes: int,
    context: int,
    lora_rank: int,
    quantization: str = "none",
    output_layer: str = "auto",
    kv_dtype: str = "auto",
    bandwidth: float | None = None,  # GB/s
    flops: float | None = None,  # TFLOP/s
) -> Plan:
    """Make the plan; measures the machine if not given. Raises ModelError or OSError."""
    cell = torch.int8 if kv_dtype == "int8" else None
    load = Load(memory_bytes, context, lora_rank, kv_dtype=cell)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if output_layer == "auto" and device.type != "cpu":
        output_layer = "model"
    if quantization == "auto":
        quantization = auto_quantization(folder, own_dtype(folder), device)
    size = read_model_size(folder, quantization, output_layer)
    if not context <= size.spec.max_position:
        raise ModelError(
            f"--context {context} is outside 1..{size.spec.max_position}, the positions "
            "that the model was made for"
        )
    if cell is not None and size.dtype != torch.bfloat16:
        raise ModelError(f"--kv-dtype int8 is only for bfloat16, not {_name(size.dtype)}")
    return Plan(size, load, given_or_measured(size.dtype, bandwidth, flops))


def report(plan: Plan) -> Iterator[str]:
    """Yield the whole text, line by line."""
    yield from _parameters(plan.size)
    yield from _weights(plan.size)
    yield from _kv(plan.size, plan.load)
    yield from _adapters(plan.size, plan.load)
    yield from _batches(plan.size, plan.load)
    yield from _floors(plan.size, plan.load, plan.machine)


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
        yield f"  {form.name:<9} {nbytes:>16,} bytes  {format_byte_size(nbytes):>10}{own}"
    yield (
        "  int8 and fp8 have a float32 scale per output row, nf4 a float32 absmax per "
        f"{NF4_BLOCK} values, int4 a scale per output row and a byte per {INT4_BLOCK} values;"
    )
    yield "  all leave embeddings, norms and biases in bfloat16;"
    yield f"  {_output_layers(size)}"
    if size.form.has_zeros:
        group = size.form.group_size or "row"
        yield f"  as stored: 4-bit integers, a float32 scale and zero per group of {group};"
        yield f"  all else in {_name(size.dtype)}."


def _output_layers(size: ModelSize) -> str:
    names = [form.name for form in formats(size) if form.output_layer == "int8"]
    small = f"; in {', '.join(names)} it is int8, a copy if it is tied" if names else ""
    return f"lm_head is in bfloat16{small}."


def _kv(size: ModelSize, load: Load) -> Iterator[str]:
    spec, dtype = size.spec, load.kv_dtype or size.dtype
    scale = f", and {KV_SCALE_BYTES} bytes of scale per head" if dtype == torch.int8 else ""
    head = (
        f"{spec.head_dim} x {dtype.itemsize}"
        if not scale
        else f"({spec.head_dim} + {KV_SCALE_BYTES})"
    )
    yield f"\nKV cache in {_name(dtype)}"
    yield f"  2 (K and V) x layers x KV heads x head dim x bytes per value, per token{scale}:"
    yield (
        f"  2 x {spec.num_layers} x {spec.num_kv_heads} x {head}"
        f" = {kv_bytes_per_token(spec, dtype):,} bytes"
    )
    yield (
        f"  a sequence of {load.context} tokens, in blocks of {load.block_size}: "
        f"{format_byte_size(load.sequence_bytes(size, size.form))}"
    )


def _adapters(size: ModelSize, load: Load) -> Iterator[str]:
    yield f"\nOne adapter of rank {load.lora_rank} in {_name(size.dtype)}"
    yield "  rank x sum over modules of (in + out) x bytes per value:"
    for name, attention_only in (("all linear modules", False), ("attention only", True)):
        values = adapter_values(size, attention_only=attention_only)
        nbytes = adapter_bytes(size, size.dtype, load.lora_rank, attention_only=attention_only)
        yield (
            f"  {name:<19} {load.lora_rank} x {values:,} x {size.dtype.itemsize}"
            f" = {nbytes:,} bytes  {format_byte_size(nbytes)}"
        )


def _batches(size: ModelSize, load: Load) -> Iterator[str]:
    yield (
        f"\nLargest batch in {format_byte_size(load.memory_bytes)}: "
        f"sequences of {load.context} tokens beside the weights"
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
