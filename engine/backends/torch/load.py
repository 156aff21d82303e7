"""Loads a model that torch computes, on any device that it supports."""

from functools import partial

from engine.announcer import Announcer
from engine.backends.kv_cache import allocate_kv_cache
from engine.backends.loaded import LoadedModel, read_decoder
from engine.backends.sync_runner import SyncRunner
from engine.backends.torch.forward import TorchForward
from engine.backends.torch.ops import torch_build
from engine.config import EngineConfig
from engine.lora.kinds import ALL_KINDS
from engine.lora.weights import LoraWeights
from engine.model.loader import weight_bytes
from engine.settle import Settled


def load_torch(config: EngineConfig, s: Settled, *, announcer: Announcer) -> LoadedModel:
    """Read the weights and allocate the KV blocks. Raises ModelError."""
    decoder = read_decoder(config, s, torch_build(s.device, s.dtype), announcer)
    kv_cache = allocate_kv_cache(s.num_blocks, config.block_size, s.spec, s.dtype, s.device)
    return LoadedModel(
        make_runner=partial(SyncRunner, TorchForward(decoder, kv_cache, config.block_size)),
        pack_adapter=_as_it_is,
        decoder=decoder,
        weight_bytes=weight_bytes(decoder, s.dtype),
        kernels="torch",
        kinds=ALL_KINDS,
    )


def _as_it_is(weights: LoraWeights) -> LoraWeights:
    return weights
