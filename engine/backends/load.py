"""From a settled configuration to a model that is ready to run, by the best kernels there are.

CPU     native kernels (bfloat16), else torch
CUDA    Triton's, with decode steps in CUDA graphs, else torch
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.backends.kv_cache import allocate_kv_cache
from engine.backends.native import structs
from engine.backends.native.build import BuildError
from engine.backends.native.forward import NativeForward
from engine.backends.native.kv import KvLayout, check_heads, check_rotary
from engine.backends.native.library import Context
from engine.backends.runner import Runner
from engine.backends.sync_runner import ForwardPass, SyncRunner
from engine.backends.torch.forward import TorchForward
from engine.config import ConfigError, EngineConfig
from engine.lora.host_cache import HostAdapter
from engine.lora.weights import BLayout, LoraWeights
from engine.model.decoder import Decoder, LoraSite
from engine.model.loader import load_decoder, weight_bytes
from engine.model.ops import Ops, native_ops, select_ops
from engine.settle import Settled, is_interpreting

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    make_runner: Callable[[Callable[[str], Any]], Runner]  # given HostAdapters by digest
    pack_adapter: Callable[[LoraWeights], HostAdapter]  # by any thread
    lora_sites: tuple[LoraSite, ...]
    b_layout: BLayout  # of the weights that `pack_adapter` takes
    weight_bytes: int
    kernels: str  # what computes: native-avx512, native-avx2, triton or torch
    max_adapters: int | None = None  # on the device at a time


def load_model(config: EngineConfig, settled: Settled, *, progress: bool = False) -> LoadedModel:
    """Reads the weights. Raises ModelError or ConfigError where that cannot be done."""
    if _wants_triton(config, settled):
        from engine.backends.cuda.load import load_triton

        return load_triton(config, settled, progress=progress)
    context = _open_native(config, settled)
    if context is not None:
        return _load_native(config, settled, context, progress)
    return _load_torch(config, settled, progress)


def read_decoder(config: EngineConfig, settled: Settled, ops: Ops, progress: bool) -> Decoder:
    return load_decoder(
        Path(config.source),
        dtype=settled.dtype,
        device=settled.device,
        max_model_len=settled.max_model_len,
        quantization=config.quantization,
        ops=ops,
        progress=progress,
    )


# ==== torch ====


def _load_torch(config: EngineConfig, s: Settled, progress: bool) -> LoadedModel:
    decoder = read_decoder(config, s, select_ops(s.device, s.dtype), progress)
    kv_cache = allocate_kv_cache(s.num_blocks, config.block_size, s.spec, s.dtype, s.device)
    forward = TorchForward(decoder, kv_cache, config.block_size)
    return _computed_at_once(forward, decoder, s, "rank_major", "torch")


def _computed_at_once(
    forward: ForwardPass, decoder: Decoder, s: Settled, b_layout: BLayout, kernels: str
) -> LoadedModel:
    return LoadedModel(
        make_runner=partial(SyncRunner, forward),
        pack_adapter=_as_it_is,
        lora_sites=decoder.lora_sites,
        b_layout=b_layout,
        weight_bytes=weight_bytes(decoder, s.dtype),
        kernels=kernels,
    )


def _as_it_is(weights: LoraWeights) -> LoraWeights:
    return weights


# ==== native kernels ====


def _load_native(config: EngineConfig, s: Settled, context: Context, progress: bool) -> LoadedModel:
    torch.set_num_threads(1)  # the rest is small, and its threads would fight the kernels'
    ops = native_ops(context, int8_activations=config.activations == "int8")
    decoder = read_decoder(config, s, ops, progress)
    layout, rows = _kv_layout(config, s), s.max_num_batched_tokens
    forward = NativeForward(decoder, context, layout, s.num_blocks, s.max_model_len, rows)
    return _computed_at_once(forward, decoder, s, "panels", f"native-{context.isa}")


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


# ==== Triton's kernels ====


def _wants_triton(config: EngineConfig, settled: Settled) -> bool:
    """Says so where torch has to do on a GPU."""
    if settled.device.type != "cuda" and not (config.kernels == "triton" and is_interpreting()):
        return False
    try:
        if config.kernels == "torch":
            raise ImportError("kernels='torch' is configured")
        from engine.backends.cuda.load import self_test

        self_test(config, settled)
    except Exception as error:  # whatever a compiler or a driver raises
        if config.kernels == "triton" or settled.weight_format == "fp8":
            raise ConfigError(
                f"Triton's kernels do not run on {settled.device}: {error}"
            ) from error
        log.warning(
            "computing with torch, without CUDA graphs, and quantized weights in %s: %s",
            settled.dtype,
            error,
        )
        return False
    return True
