"""Loads a model that the native kernels compute, on a CPU in bfloat16."""

from functools import partial

import torch

from engine.announcer import Announcer
from engine.backends.loaded import LoadedModel, read_decoder
from engine.backends.native import structs
from engine.backends.native.forward import NativeForward
from engine.backends.native.kv import KvLayout, check_heads, check_rotary
from engine.backends.native.library import Context
from engine.backends.native.panels import pack_adapter
from engine.backends.native.plain_layers import PlainLayers
from engine.backends.native.weight_ops import native_build
from engine.backends.sync_runner import SyncRunner
from engine.config import EngineConfig
from engine.lora.kinds import ALL_KINDS
from engine.model.loader import weight_bytes
from engine.settle import Settled


def open_native(config: EngineConfig, settled: Settled, shared: Context | None) -> Context:
    """Open the kernels, or take those of a model that never computes at the same time: threads of
    their own would wait for work where the others compute. Raises BuildError if there are none,
    ValueError if they lack this model."""
    _kv_layout(config, settled)
    return shared or Context(threads=config.num_threads)


def load_native(
    config: EngineConfig, s: Settled, context: Context, *, announcer: Announcer
) -> LoadedModel:
    """Read the weights and allocate the KV blocks. Raises ModelError."""
    torch.set_num_threads(1)  # torch has little to do, and its threads would slow the kernels'
    build = native_build(context, int8_activations=s.activations == "int8")
    decoder = read_decoder(config, s, build, announcer)
    layout, rows = _kv_layout(config, s), s.max_num_batched_tokens
    forward = NativeForward(decoder, context, layout, s.num_blocks, s.max_model_len, rows)
    return LoadedModel(
        make_runner=partial(SyncRunner, forward),
        pack_adapter=pack_adapter,
        decoder=decoder,
        weight_bytes=weight_bytes(decoder, s.dtype),
        kernels=f"native-{context.isa}",
        kinds=ALL_KINDS,
        plain_layers=PlainLayers(decoder, context),
        context=context,
    )


def _kv_layout(config: EngineConfig, settled: Settled) -> KvLayout:
    """Make the layout. Raises ValueError for attention shapes that the kernels do not support."""
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
