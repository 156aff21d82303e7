"""Loads the model of a settled configuration, with the best kernels that can run here.

CPU     native kernels (bfloat16), else torch
CUDA    Triton's, with decode steps in CUDA graphs, else torch
"""

import logging

import torch

from engine.announcer import COMPILE_PATIENCE_S, SILENT, Announcer
from engine.backends.cuda.checks import is_interpreting
from engine.backends.loaded import LoadedModel
from engine.backends.native.build import BuildError
from engine.backends.native.library import Context
from engine.backends.native.load import load_native, open_native
from engine.backends.torch.load import load_torch
from engine.config import ConfigError, EngineConfig
from engine.settle import Settled

log = logging.getLogger(__name__)


def load_model(
    config: EngineConfig,
    settled: Settled,
    *,
    announcer: Announcer = SILENT,
    beside: LoadedModel | None = None,
) -> LoadedModel:
    """Read the weights; `beside` is a model that the same thread computes. Raises ModelError or
    ConfigError if that cannot be done."""
    announcer.announce("compiling kernels", COMPILE_PATIENCE_S)
    if _wants_triton(config, settled):
        from engine.backends.cuda.load import load_triton  # imports Triton

        return load_triton(config, settled, announcer=announcer)
    context = _open_native(config, settled, None if beside is None else beside.context)
    if context is not None:
        return load_native(config, settled, context, announcer=announcer)
    return load_torch(config, settled, announcer=announcer)


def _open_native(config: EngineConfig, settled: Settled, shared: Context | None) -> Context | None:
    """Open the native kernels; None if torch must compute, with a warning if that is slow."""
    if settled.device.type != "cpu" or settled.dtype != torch.bfloat16:
        return None  # the native kernels compute in bfloat16
    try:
        if config.kernels == "torch":
            raise BuildError("kernels='torch' is configured")
        context = open_native(config, settled, shared)
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
    log.info(
        "native kernels: %s, %d threads; linear layers: %s%s, output layer: %s",
        context.isa,
        context.threads,
        settled.weight_format,
        " by int8 activations" if settled.activations == "int8" else "",
        settled.output_layer,
    )
    return context


def _wants_triton(config: EngineConfig, settled: Settled) -> bool:
    """Check if Triton's kernels are to compute; log a warning if torch must, on a GPU."""
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
