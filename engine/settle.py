"""Resolves the defaults of an EngineConfig, once, from the checkpoint and the machine.

Backends know what a device can compute and hold: `settle` is given their ArenaBytes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from engine.config import ConfigError, EngineConfig
from engine.model.families import read_scheme, read_spec
from engine.model.formats import auto_output_layer, auto_quantization, own_dtype
from engine.model.quantized_checkpoint import weight_format
from engine.model.spec import ModelSpec, kv_bytes_per_token

DEFAULT_MAX_MODEL_LEN = 8192
# Larger pieces hardly compute prompts faster, and decoding requests wait for a whole piece.
DEFAULT_NUM_BATCHED_TOKENS = {"cpu": 128, "cuda": 512}


@dataclass(frozen=True, slots=True)
class Settled:
    spec: ModelSpec
    dtype: torch.dtype
    kv_dtype: torch.dtype  # int8: with scales
    quantization: str  # applied at load: none, int8, nf4, int4 or fp8
    weight_format: str  # of the linear layers: none, int8, nf4, fp8 or int4
    activations: str  # of linear layers in nf4 and int4: bf16 or int8
    output_layer: str  # model: in dtype; or int8
    device: torch.device
    max_num_batched_tokens: int
    max_model_len: int
    memory_bytes: int  # for KV blocks and adapters
    block_bytes: int
    num_blocks: int  # if KV blocks took all memory; adapters leave fewer


@dataclass(frozen=True, slots=True)
class Demand:
    """The demands of a model on its device, settled before the device's memory is divided."""

    config: EngineConfig
    spec: ModelSpec
    dtype: torch.dtype
    weight_format: str
    device: torch.device
    max_num_batched_tokens: int
    least_bytes: int  # of KV blocks for one sequence of max_model_len


class ArenaBytes(Protocol):
    def __call__(self, demand: Demand) -> int:
        """Return the bytes for KV blocks and adapters together.

        Raises ConfigError if the device cannot compute the model or has too little memory.
        """
        ...


def settle(config: EngineConfig, arena_bytes: ArenaBytes) -> Settled:
    """Settle from the model's config files, not its weights. Raises ConfigError or ModelError."""
    folder = Path(config.source)
    spec = read_spec(folder, config.max_model_len)
    dtype, device = _dtype(config, folder), _device(config)
    if config.quantization == "auto":
        config = replace(config, quantization=auto_quantization(folder, dtype, device))
    kv_dtype, form = _kv_dtype(config, dtype, device), _weight_format(config, folder, device)
    block_bytes = config.block_size * kv_bytes_per_token(spec, kv_dtype)
    least = _num_blocks(config.max_model_len or 2, config) * block_bytes
    rows = _max_num_batched_tokens(config, device)
    memory_bytes = arena_bytes(Demand(config, spec, dtype, form, device, rows, least))
    max_model_len = _max_model_len(config, spec, memory_bytes, block_bytes)
    if config.max_model_len is None:
        spec = read_spec(folder, max_model_len)
    return Settled(
        spec=spec,
        dtype=dtype,
        kv_dtype=kv_dtype,
        quantization=config.quantization,
        weight_format=form,
        activations=_activations(config, form, dtype, device),
        output_layer=_output_layer(config, form, dtype, device),
        device=device,
        max_num_batched_tokens=rows,
        max_model_len=max_model_len,
        memory_bytes=memory_bytes,
        block_bytes=block_bytes,
        num_blocks=memory_bytes // block_bytes,
    )


def _max_num_batched_tokens(config: EngineConfig, device: torch.device) -> int:
    """Choose a default that leaves half to prompts while max_num_seqs requests decode."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    return max(DEFAULT_NUM_BATCHED_TOKENS[device.type], 2 * config.max_num_seqs)


def _max_model_len(
    config: EngineConfig, spec: ModelSpec, memory_bytes: int, block_bytes: int
) -> int:
    room = memory_bytes // block_bytes * config.block_size
    wanted = config.max_model_len
    if wanted is None:
        beside = _bytes_beside_adapters(config, memory_bytes) // block_bytes * config.block_size
        wanted = min(spec.max_position, DEFAULT_MAX_MODEL_LEN, beside)
    if wanted > spec.max_position:
        raise ConfigError(
            f"max_model_len={wanted} is longer than the {spec.max_position} positions that the "
            f"model was made for"
        )
    if wanted < 2 or wanted > room:
        raise ConfigError(
            f"memory_bytes={memory_bytes} has room for {room} tokens of KV cache; "
            f"max_model_len={wanted} needs memory_bytes of at least "
            f"{_num_blocks(max(wanted, 2), config) * block_bytes}"
        )
    return wanted


def _num_blocks(num_tokens: int, config: EngineConfig) -> int:
    return -(-num_tokens // config.block_size)


def _bytes_beside_adapters(config: EngineConfig, memory_bytes: int) -> int:
    """Return the KV bytes if max_model_len is not set: adapters keep a quarter of the arena."""
    quarter, most = memory_bytes // 4, config.adapter_memory_bytes
    return memory_bytes - (quarter if most is None else min(quarter, most))


def _dtype(config: EngineConfig, folder: Path) -> torch.dtype:
    """Resolve auto: a float32 checkpoint stays float32, any other is computed in bfloat16."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            config.dtype
        ]
    return own_dtype(folder)


def _kv_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if config.kv_dtype == "auto":
        return dtype
    if device.type != "cpu" or dtype != torch.bfloat16:
        raise ConfigError(
            f"kv_dtype={config.kv_dtype!r} is only for bfloat16 on a CPU, not {dtype} on "
            f"{device.type}; use 'auto'"
        )
    return torch.int8


def _weight_format(config: EngineConfig, folder: Path, device: torch.device) -> str:
    form = weight_format(folder, read_scheme(folder), config.quantization)
    if config.quantization == "int4" and device.type != "cpu":
        raise ConfigError(f"quantization='int4' is only for a CPU, not {device}; use 'nf4'")
    return form


def _activations(config: EngineConfig, form: str, dtype: torch.dtype, device: torch.device) -> str:
    """Resolve auto, the same for any number of rows, lest a row depend on its batch mates."""
    if config.activations == "int8":
        _check_int8_activations(form, device)
        return "int8"
    is_auto = config.activations == "auto"
    is_gain = form in ("nf4", "int4") and device.type == "cpu" and dtype == torch.bfloat16
    return "int8" if is_auto and is_gain else "bf16"


def _check_int8_activations(form: str, device: torch.device) -> None:
    if form not in ("int8", "nf4", "int4"):
        raise ConfigError(
            f"activations='int8' is only for linear layers in nf4 or int4 (int8 has them anyway), "
            f"not {'dense ones' if form == 'none' else form}; use 'auto'"
        )
    if device.type != "cpu":
        raise ConfigError(f"activations='int8' is only for a CPU, not {device}; use 'auto'")


def _output_layer(config: EngineConfig, form: str, dtype: torch.dtype, device: torch.device) -> str:
    """Resolve auto, which is the model's own where no CPU computes."""
    is_served = device.type == "cpu" and dtype == torch.bfloat16 and config.kernels != "triton"
    if config.output_layer == "auto":
        return auto_output_layer(form, dtype) if is_served else "model"
    if config.output_layer == "int8" and not is_served:
        raise ConfigError(
            f"output_layer='int8' is only for bfloat16 on a CPU, not {dtype} on {device.type}"
            f"{' with Triton' if config.kernels == 'triton' else ''}; use 'auto' or 'model'"
        )
    return config.output_layer


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no CUDA device; use 'cpu' or 'auto'")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
