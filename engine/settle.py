"""What an EngineConfig leaves open, settled once against the checkpoint and the machine."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.backends.cuda.flashinfer import workspace_bytes
from engine.backends.cuda.fp8 import check_fp8
from engine.backends.cuda.memory import arena_bytes, needs
from engine.backends.kv_cache import kv_bytes_per_token
from engine.config import ConfigError, EngineConfig
from engine.model.families import read_dtype, read_scheme, read_spec
from engine.model.quantized_checkpoint import weight_format
from engine.model.spec import ModelSpec
from engine.sizes import FORMATS, ModelSize, read_model_size, weight_bytes

DEFAULT_MAX_MODEL_LEN = 8192
DEFAULT_MEMORY_BYTES = 2 * 2**30  # on a CPU
# Prompts are computed at nearly the same rate in pieces of these, and streams wait for one piece.
DEFAULT_NUM_BATCHED_TOKENS = {"cpu": 128, "cuda": 512}


@dataclass(frozen=True, slots=True)
class Settled:
    spec: ModelSpec
    dtype: torch.dtype
    kv_dtype: torch.dtype  # int8: with scales
    weight_format: str  # of the linear layers: none, int8, nf4, fp8 or int4
    device: torch.device
    max_num_batched_tokens: int
    max_model_len: int
    memory_bytes: int  # for KV blocks and adapters
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
    _check_kernels(config, device)
    block_bytes = config.block_size * kv_bytes_per_token(spec, kv_dtype)
    least = _num_blocks(config.max_model_len or 2, config) * block_bytes
    memory_bytes = _memory_bytes(config, spec, dtype, device, least)
    max_model_len = _max_model_len(config, spec, memory_bytes, block_bytes)
    if config.max_model_len is None:
        spec = read_spec(folder, max_model_len)
    return Settled(
        spec=spec,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weight_format=form,
        device=device,
        max_num_batched_tokens=_max_num_batched_tokens(config, device),
        max_model_len=max_model_len,
        memory_bytes=memory_bytes,
        block_bytes=block_bytes,
        num_blocks=memory_bytes // block_bytes,
    )


def _max_num_batched_tokens(config: EngineConfig, device: torch.device) -> int:
    """By default half of it is left to prompts when as many requests decode as ever may."""
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
    """What a request may count on that nobody sized: a quarter is left for its adapter."""
    quarter, most = memory_bytes // 4, config.adapter_memory_bytes
    return memory_bytes - (quarter if most is None else min(quarter, most))


def _memory_bytes(
    config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device, least: int
) -> int:
    """On a GPU what is asked for must be there beside the weights; raises ConfigError."""
    if device.type != "cuda":
        return DEFAULT_MEMORY_BYTES if config.memory_bytes is None else config.memory_bytes
    size = read_model_size(Path(config.source), config.quantization)
    free, total = torch.cuda.mem_get_info(device)
    weights = weight_bytes(size, size.form)
    rows, seqs = _max_num_batched_tokens(config, device), config.max_num_seqs
    scratch = _scratch_bytes(size, dtype) + workspace_bytes(len(set(spec.windows)))
    is_fp8 = size.form.quantization == "fp8"
    needed = needs(weights, spec, rows, seqs, dtype, total, scratch, is_fp8=is_fp8)
    advice = "lower max_num_batched_tokens or max_model_len"
    if size.form.quantization == "none":
        nf4 = weight_bytes(size, next(form for form in FORMATS if form.name == "nf4"))
        advice = f"quantization='nf4' takes {nf4 / 2**30:.2f} GiB for the weights, or {advice}"
    return arena_bytes(free, needed, config.memory_bytes, least, advice)


def _scratch_bytes(size: ModelSize, dtype: torch.dtype) -> int:
    """Of the largest layer that is made dense for a multiplication with many rows."""
    if size.form.quantization in ("none", "fp8"):
        return 0
    numel: dict[str, int] = {}
    for linear in size.linears:
        numel[linear.site] = numel.get(linear.site, 0) + linear.numel
    return max(numel.values()) // size.spec.num_layers * dtype.itemsize


def _check_kernels(config: EngineConfig, device: torch.device) -> None:
    if config.kernels == "triton" and device.type != "cuda" and not is_interpreting():
        raise ConfigError(
            "kernels='triton' needs a CUDA device, or TRITON_INTERPRET=1 to try them on a CPU; "
            "use 'auto'"
        )


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


def is_interpreting() -> bool:
    """Whether Triton's kernels run on a CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no CUDA device; use 'cpu' or 'auto'")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
