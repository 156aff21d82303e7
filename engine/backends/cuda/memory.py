"""Divides a GPU's memory before anything is loaded.

free  =  weights  +  buffers of a step  +  reserve  +  arena of KV blocks and adapters
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.backends.cuda.flashinfer import workspace_bytes
from engine.config import ConfigError
from engine.lora.vocabulary import MAX_NEW_ROWS
from engine.model.spec import ModelSpec
from engine.settle import Demand
from engine.sizes import FORMATS, ModelSize, read_model_size, weight_bytes

# For CUDA graphs, libraries' workspaces and fragmentation of the allocator's memory
RESERVE_BYTES = 3 * 2**29
RESERVE_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of everything on the device that is not the arena."""

    weights: int
    buffers: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.buffers + self.reserve


def memory_bytes(demand: Demand) -> int:
    """Return the bytes left for the arena of KV blocks and adapters besides the weights."""
    config = demand.config
    size = read_model_size(Path(config.source), config.quantization)
    free, total = torch.cuda.mem_get_info(demand.device)
    needed = needs(
        weight_bytes(size, size.form),
        demand.spec,
        demand.max_num_batched_tokens,
        config.max_num_seqs,
        demand.dtype,
        total,
        _scratch_bytes(size, demand.dtype) + _flashinfer_bytes(demand),
        is_fp8=size.form.quantization == "fp8",
    )
    return arena_bytes(free, needed, config.memory_bytes, demand.least_bytes, _advice(size))


def needs(
    weights: int,
    spec: ModelSpec,
    max_rows: int,
    max_num_seqs: int,
    dtype: torch.dtype,
    device: int,
    scratch: int = 0,
    *,
    is_fp8: bool = False,
) -> Needs:
    """Memory that must stay outside the arena, for these weights on this device.

    `weights` and `device` are bytes, `device` of the whole device; `scratch` is memory that
    low-bit layers and libraries use in turn.
    """
    row_bytes = _activation_width(spec) * dtype.itemsize + (_rounded_bytes(spec) if is_fp8 else 0)
    activations = max_rows * row_bytes
    width = spec.vocab_size + MAX_NEW_ROWS  # an adapter may have so many token ids more
    logits = 3 * max_num_seqs * width * 4  # the logits, their logarithms, and a copy
    buffers = activations + logits + scratch
    return Needs(weights, buffers, int(RESERVE_BYTES + RESERVE_SHARE * device))


def arena_bytes(free: int, needs: Needs, asked: int | None, least: int, advice: str) -> int:
    """Return the bytes for KV blocks and adapters: `asked`, or all that is left if it is None.

    Raises ConfigError, with the bytes needed, available and possible, if less is left than asked
    for, or than `least`. `advice`: what else the user can do, for its message.
    """
    room = free - needs.total
    wanted = least if asked is None else max(asked, least)
    if wanted <= room:
        return room if asked is None else asked
    there = (
        f"the device has {_gib(free)} free; weights take {_gib(needs.weights)}, a step's buffers "
        f"{_gib(needs.buffers)}, and {_gib(needs.reserve)} are kept for graphs and libraries"
    )
    what = "one sequence of max_model_len" if asked is None else f"memory_bytes={asked}"
    if room >= least:
        raise ConfigError(f"{what} needs {_gib(wanted)}: {there}; memory_bytes={room} would fit")
    missing = _gib(least - room)
    raise ConfigError(f"{what} needs {_gib(wanted)}: {there}; {missing} are missing: {advice}")


def _advice(size: ModelSize) -> str:
    advice = "lower max_num_batched_tokens or max_model_len"
    if size.form.quantization != "none":
        return advice
    nf4 = weight_bytes(size, next(form for form in FORMATS if form.name == "nf4"))
    return f"quantization='nf4' takes {nf4 / 2**30:.2f} GiB for the weights, or {advice}"


def _flashinfer_bytes(demand: Demand) -> int:
    if demand.config.flashinfer == "off":
        return 0
    return workspace_bytes(len(set(demand.spec.windows)))


def _scratch_bytes(size: ModelSize, dtype: torch.dtype) -> int:
    """Return the bytes of the largest layer that is dequantized to multiply it with many rows."""
    if size.form.quantization in ("none", "fp8"):
        return 0
    numel: dict[str, int] = {}
    for linear in size.linears:
        numel[linear.site] = numel.get(linear.site, 0) + linear.numel
    return max(numel.values()) // size.spec.num_layers * dtype.itemsize


def _activation_width(spec: ModelSpec) -> int:
    """Count the values per row of all buffers of a forward pass, and of its output."""
    q_size = spec.num_heads * spec.head_dim
    qkv = q_size + 2 * spec.num_kv_heads * spec.head_dim
    return 5 * spec.hidden_size + qkv + 2 * q_size + 3 * spec.intermediate_size


def _rounded_bytes(spec: ModelSpec) -> int:
    """Return the bytes per row of FP8 layers' inputs: one per value, and a float32 for each of the
    four inputs."""
    q_size = spec.num_heads * spec.head_dim
    return spec.hidden_size + 2 * q_size + spec.intermediate_size + 4 * 4


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
