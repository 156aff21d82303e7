"""What an EngineConfig leaves open, settled once against the checkpoint and the machine."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import ConfigError, EngineConfig
from engine.kernels.fp8 import check_fp8
from engine.model.families import read_dtype, read_scheme, read_spec
from engine.model.quantized_checkpoint import weight_format
from engine.model.spec import ModelSpec
from engine.runner.kv_cache import kv_bytes_per_token

DEFAULT_MAX_MODEL_LEN = 8192


@dataclass(frozen=True, slots=True)
class Settled:
    spec: ModelSpec
    dtype: torch.dtype
    kv_dtype: torch.dtype  # int8: with scales
    weight_format: str  # of the linear layers: none, int8, nf4, fp8 or int4
    device: torch.device
    max_model_len: int
    block_bytes: int
    num_blocks: int  # of the whole memory; where adapters are, there are fewer


def settle(config: EngineConfig) -> Settled:
    """Raises ConfigError or ModelError; reads the model's config files but no weights."""
    folder = Path(config.source)
    spec = read_spec(folder, config.max_model_len)
    dtype, device = _dtype(config, folder), _device(config)
    kv_dtype, form = _kv_dtype(config, dtype, device), _weight_format(config, folder)
    if form == "fp8":
        _check_fp8(device, dtype)
    block_bytes = config.block_size * kv_bytes_per_token(spec, kv_dtype)
    num_blocks = config.memory_bytes // block_bytes
    room = num_blocks * config.block_size
    max_model_len = config.max_model_len
    if max_model_len is None:
        beside_adapters = _bytes_beside_adapters(config) // block_bytes * config.block_size
        max_model_len = min(spec.max_position, DEFAULT_MAX_MODEL_LEN, beside_adapters)
        spec = read_spec(folder, max_model_len) if max_model_len >= 2 else spec
    if max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len={max_model_len} is longer than the {spec.max_position} positions "
            f"that the model was made for"
        )
    if max_model_len < 2 or max_model_len > room:
        needed = -(-max(max_model_len, 2) // config.block_size) * block_bytes
        raise ConfigError(
            f"memory_bytes={config.memory_bytes} has room for {room} tokens of KV cache; "
            f"max_model_len={max_model_len} needs memory_bytes of at least {needed}"
        )
    return Settled(spec, dtype, kv_dtype, form, device, max_model_len, block_bytes, num_blocks)


def _bytes_beside_adapters(config: EngineConfig) -> int:
    """What a request may count on that nobody sized: a quarter is left for its adapter."""
    quarter, most = config.memory_bytes // 4, config.adapter_memory_bytes
    return config.memory_bytes - (quarter if most is None else min(quarter, most))


def _dtype(config: EngineConfig, folder: Path) -> torch.dtype:
    """auto: a float32 checkpoint stays float32, any other is computed in bfloat16."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            config.dtype
        ]
    return torch.float32 if read_dtype(folder) == torch.float32 else torch.bfloat16


def _kv_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if config.kv_dtype == "auto":
        return dtype
    if device.type != "cpu" or dtype != torch.bfloat16:
        raise ConfigError(
            f"kv_dtype={config.kv_dtype!r} is only for bfloat16 on a CPU, not {dtype} on "
            f"{device.type}; use 'auto'"
        )
    return torch.int8


def _weight_format(config: EngineConfig, folder: Path) -> str:
    form = weight_format(folder, read_scheme(folder), config.quantization)
    if config.activations == "int8" and form not in ("int8", "nf4"):
        raise ConfigError(
            f"activations='int8' is only for linear layers in nf4 (int8 has them anyway), not "
            f"{'dense ones' if form == 'none' else form}; use 'bf16'"
        )
    return form


def _check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    try:
        check_fp8(device, dtype)
    except ValueError as error:
        raise ConfigError(f"quantization='fp8': {error}") from None


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no CUDA device; use 'cpu' or 'auto'")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
