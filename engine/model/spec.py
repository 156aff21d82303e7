"""ModelSpec: describes an architecture; the decoder is built from it.

Names no family and reads no file: `families` translates a checkpoint's config into it.
"""

from dataclasses import dataclass

import torch

from engine.model.rotary import Rotary

KV_SCALE_BYTES = 4  # int8 keys and values have a float32 scale per position and head


class ModelError(ValueError):
    """A checkpoint cannot be served; the message names the file or key and what is wrong."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Describes one decoder-only transformer. Sites are `qkv`, `o`, `gate_up` and `down`."""

    # Sizes
    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # the longest sequence the checkpoint was made for

    # Linear layers
    biased_sites: tuple[str, ...]  # sites whose linear layer has a bias
    fused_sites: tuple[str, ...]  # sites that the checkpoint itself stores as one matrix
    tied_embeddings: bool  # the output layer is the embedding matrix
    activation: str  # silu, gelu or gelu_tanh

    # Norms
    norm_eps: float
    norm_offset: float  # added to every stored norm weight
    sandwich_norm: bool  # also normalise the outputs of attention and mlp
    qk_norm: bool  # normalise each query and key head

    # Attention; tuples have one entry per layer
    attention_scale: float
    attention_soft_cap: float | None
    windows: tuple[int | None, ...]  # keys a query may see, itself included; None: all
    rotaries: tuple[Rotary, ...]

    # Scales of the residual stream
    embedding_scale: float
    residual_scale: float  # factor on what attention and mlp add
    logit_scale: float
    logit_soft_cap: float | None


def kv_bytes_per_token(spec: ModelSpec, dtype: torch.dtype) -> int:
    """2 (K and V) x layers x KV heads x bytes per head; `dtype` is that of keys and values."""
    head_bytes = spec.head_dim * dtype.itemsize
    if dtype == torch.int8:
        head_bytes += KV_SCALE_BYTES
    return 2 * spec.num_layers * spec.num_kv_heads * head_bytes
