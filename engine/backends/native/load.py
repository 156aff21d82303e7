"""A model that the native kernels compute, on a CPU in bfloat16."""

from functools import partial

import torch

from engine.backends.loaded import LoadedModel, read_decoder
from engine.backends.native import structs
from engine.backends.native.forward import NativeForward
from engine.backends.native.kv import KvLayout, check_heads, check_rotary
from engine.backends.native.library import Context
from engine.backends.native.panels import pack_adapter
from engine.backends.native.weight_ops import native_build
from engine.backends.sync_runner import SyncRunner
from engine.config import EngineConfig
from engine.model.loader import weight_bytes
from engine.settle import Settled


def open_native(config: EngineConfig, settled: Settled) -> Context:
    """The kernels for this model. Raises BuildError where there are none, else ValueError."""
    _kv_layout(config, settled)
    return Context(threads=config.num_threads)


def load_native(
    config: EngineConfig, s: Settled, context: Context, *, progress: bool
) -> LoadedModel:
    """Reads the weights and takes the KV blocks. Raises ModelError."""
    torch.set_num_threads(1)  # the rest is small, and its threads would fight the kernels'
    build = native_build(context, int8_activations=config.activations == "int8")
    decoder = read_decoder(config, s, build, progress)
    layout, rows = _kv_layout(config, s), s.max_num_batched_tokens
    forward = NativeForward(decoder, context, layout, s.num_blocks, s.max_model_len, rows)
    return LoadedModel(
        make_runner=partial(SyncRunner, forward),
        pack_adapter=pack_adapter,
        lora_sites=decoder.lora_sites,
        weight_bytes=weight_bytes(decoder, s.dtype),
        kernels=f"native-{context.isa}",
    )


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
