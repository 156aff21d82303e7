"""From a settled configuration to a model that is ready to run, by the best kernels there are."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import ConfigError, EngineConfig
from engine.kernels.cpu import structs
from engine.kernels.cpu.build import BuildError
from engine.kernels.cpu.kv import KvLayout, check_heads, check_rotary
from engine.kernels.cpu.library import Context
from engine.kernels.dispatch import native_ops, select_ops
from engine.lora.weights import BLayout
from engine.model.decoder import LoraSite
from engine.model.loader import load_decoder, weight_bytes
from engine.runner.kv_cache import allocate_kv_cache
from engine.runner.model_runner import ForwardPass
from engine.runner.native_forward import NativeForward
from engine.runner.torch_forward import TorchForward
from engine.settle import Settled

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    forward: ForwardPass
    lora_sites: tuple[LoraSite, ...]
    b_layout: BLayout  # in which `forward` wants an adapter's B
    weight_bytes: int
    kernels: str  # what computes: native-avx512, native-avx2 or torch


def load_model(config: EngineConfig, settled: Settled, *, progress: bool = False) -> LoadedModel:
    """Reads the weights. Raises ModelError or ConfigError where that cannot be done."""
    context = _open_native(config, settled)
    s = settled
    if context is None:
        ops = select_ops(s.device, s.dtype)
    else:
        torch.set_num_threads(1)  # the rest is small, and its threads would fight the kernels'
        ops = native_ops(context, int8_activations=config.activations == "int8")
    decoder = load_decoder(
        Path(config.source),
        dtype=s.dtype,
        device=s.device,
        max_model_len=s.max_model_len,
        quantization=config.quantization,
        ops=ops,
        progress=progress,
    )
    forward: ForwardPass
    if context is None:
        kv_cache = allocate_kv_cache(s.num_blocks, config.block_size, s.spec, s.dtype, s.device)
        forward = TorchForward(decoder, kv_cache, config.block_size)
    else:
        layout, rows = _kv_layout(config, s), config.max_num_batched_tokens
        forward = NativeForward(decoder, context, layout, s.num_blocks, s.max_model_len, rows)
    return LoadedModel(
        forward,
        decoder.lora_sites,
        "rank_major" if context is None else "panels",
        weight_bytes(decoder, s.dtype),
        "torch" if context is None else f"native-{context.isa}",
    )


def _open_native(config: EngineConfig, settled: Settled) -> Context | None:
    """The native kernels, or None where torch has to do; says so where that costs much."""
    if settled.device.type != "cpu" or settled.dtype != torch.bfloat16:
        return None  # the native kernels compute in bfloat16
    try:
        if config.kernels == "torch":
            raise BuildError("kernels='torch' is configured")
        _kv_layout(config, settled)
        context = Context(threads=config.num_threads)
    except (BuildError, ValueError) as error:
        if settled.kv_dtype == torch.int8:
            raise ConfigError(f"kv_dtype='int8' needs the native kernels: {error}") from error
        log.warning(
            "computing with torch, which takes two to five times as long per token, and keeps "
            "quantized weights in %s: %s",
            settled.dtype,
            error,
        )
        return None
    log.info("native kernels: %s, %d threads", context.isa, context.threads)
    return context


def _kv_layout(config: EngineConfig, settled: Settled) -> KvLayout:
    """Raises ValueError for a shape of attention that the native kernels cannot do."""
    spec, is_int8 = settled.spec, settled.kv_dtype == torch.int8
    check_heads(spec.num_heads, spec.num_kv_heads)
    for rotary in spec.rotaries:
        check_rotary(rotary.dim, spec.head_dim)
    return KvLayout(
        structs.KV_INT8 if is_int8 else structs.KV_BF16,
        config.block_size,
        spec.num_kv_heads,
        spec.head_dim,
    )
