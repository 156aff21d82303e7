"""Decoder: computes hidden states and logits from token ids and a KV cache.

One parametric transformer for all families, built from a ModelSpec. All choices are made in
constructors; a forward pass does not branch on the architecture. Independent of checkpoint
formats, scheduling and sampling.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.model.inputs import ForwardInputs, Heads, Overlays
from engine.model.layers import (
    Build,
    Embedding,
    Head,
    Linear,
    LoraSite,
    LoraSlice,
    Part,
    RmsNorm,
    Scale,
    Unchanged,
)
from engine.model.rotary import RotaryTable
from engine.model.spec import ModelSpec

Rotation = tuple[Tensor, Tensor]  # cos and sin [N, R]


class Decoder(nn.Module):
    """Holds all layers of a model. Usable once every part of `parts()` has been stored."""

    def __init__(self, spec: ModelSpec, build: Build, max_model_len: int) -> None:
        super().__init__()
        self.spec, self.build = spec, build
        rotaries = list(dict.fromkeys(spec.rotaries))
        self.embedding = Embedding(
            build,
            "model.embed_tokens.weight",
            spec.vocab_size,
            spec.hidden_size,
            spec.embedding_scale,
        )
        self.rotary_tables = nn.ModuleList(
            RotaryTable(rotary, max_model_len, build.dtype, build.device) for rotary in rotaries
        )
        self.layers = nn.ModuleList(
            DecoderLayer(spec, build, i, rotaries.index(spec.rotaries[i]))
            for i in range(spec.num_layers)
        )
        self.norm = _norm(spec, build, "model.norm", spec.hidden_size)
        self.head = Head(build, spec.logit_scale, spec.logit_soft_cap)

    def forward(self, inputs: ForwardInputs, kv_cache: Tensor) -> Tensor:
        """Return hidden states [N, E] after the last norm; writes this step's keys and values."""
        x = self.embedding(inputs.token_ids, inputs.overlays)
        rotations = [table(inputs.positions) for table in self.rotary_tables]
        for i, layer in enumerate(self.layers):
            x = layer(x, inputs, rotations, kv_cache[:, i])
        return self.norm(x, inputs.overlays)

    def logits(self, hidden: Tensor, heads: Heads | None = None) -> Tensor:
        """Return the logits [M, V] of hidden [M, E], in float32; more if `heads` have more."""
        return self.head(hidden, heads)

    @property
    def lora_sites(self) -> tuple[LoraSite, ...]:
        return tuple(leaf.place for leaf in self.modules() if isinstance(leaf, Linear))

    def parts(self) -> Iterator[Part]:
        """Yield every checkpoint tensor that the model needs, each once."""
        for leaf in self.modules():
            if isinstance(leaf, Linear | Embedding | RmsNorm):
                yield from leaf.parts()
        if not self.spec.tied_embeddings:
            yield Part("lm_head.weight", self.embedding.shape, self.head.load)


class DecoderLayer(nn.Module):
    """Computes x += attention(norm(x)); x += mlp(norm(x)).

    The added terms may be normalised or scaled.
    """

    def __init__(self, spec: ModelSpec, build: Build, layer: int, rotary_index: int) -> None:
        super().__init__()
        norms = _layer_norms(spec, build, f"model.layers.{layer}")
        self.enter_attention, self.leave_attention, self.enter_mlp, self.leave_mlp = norms
        self.attention = Attention(spec, build, layer, rotary_index)
        self.mlp = Mlp(spec, build, layer)

    def forward(
        self, x: Tensor, inputs: ForwardInputs, rotations: list[Rotation], kv_layer: Tensor
    ) -> Tensor:
        own = inputs.overlays
        attended = self.attention(self.enter_attention(x, own), inputs, rotations, kv_layer)
        x = x + self.leave_attention(attended, own)
        return x + self.leave_mlp(self.mlp(self.enter_mlp(x, own), inputs), own)


class Attention(nn.Module):
    """Computes causal attention over the request's KV blocks, with rotary positions."""

    def __init__(self, spec: ModelSpec, build: Build, layer: int, rotary_index: int) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}.self_attn"
        self.num_heads, self.num_kv_heads = spec.num_heads, spec.num_kv_heads
        self.head_dim = spec.head_dim
        self.rotary_index = rotary_index
        self.scale = spec.attention_scale
        self.window = spec.windows[layer]
        self.soft_cap = spec.attention_soft_cap
        self.ops = build.torch_ops

        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        slices = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        if "qkv" in spec.fused_sites:
            slices = {"qkv_proj": q_size + 2 * kv_size}
        self.qkv = _linear(spec, build, layer, "qkv", spec.hidden_size, prefix, slices)
        o_slices = {"o_proj": spec.hidden_size}
        self.o = _linear(spec, build, layer, "o", q_size, prefix, o_slices)
        self.norm_heads = HeadNorms(spec, build, prefix) if spec.qk_norm else _no_head_norms

    def forward(
        self, x: Tensor, inputs: ForwardInputs, rotations: list[Rotation], kv_layer: Tensor
    ) -> Tensor:
        heads = self.qkv(x, inputs).view(x.shape[0], -1, self.head_dim)
        turned = self.norm_heads(heads[:, : self.num_heads + self.num_kv_heads], inputs.overlays)
        self.ops.apply_rotary(turned, *rotations[self.rotary_index])
        q, k = turned.split([self.num_heads, self.num_kv_heads], 1)
        v = heads[:, self.num_heads + self.num_kv_heads :]
        self.ops.store_kv(k, v, kv_layer, inputs.attention.slot_mapping)
        attended = self.ops.paged_attention(
            q,
            kv_layer,
            inputs.attention,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )
        return self.o(attended.flatten(1), inputs)


class Mlp(nn.Module):
    """Computes down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, build: Build, layer: int) -> None:
        super().__init__()
        prefix, width = f"model.layers.{layer}.mlp", spec.intermediate_size
        slices = {"gate_proj": width, "up_proj": width}
        if "gate_up" in spec.fused_sites:
            slices = {"gate_up_proj": 2 * width}
        self.gate_up = _linear(spec, build, layer, "gate_up", spec.hidden_size, prefix, slices)
        down_slices = {"down_proj": spec.hidden_size}
        self.down = _linear(spec, build, layer, "down", width, prefix, down_slices)
        self.activation = spec.activation
        self.activate = build.torch_ops.gated_activation[spec.activation]

    def forward(self, x: Tensor, inputs: ForwardInputs) -> Tensor:
        return self.down(self.activate(self.gate_up(x, inputs)), inputs)


class HeadNorms(nn.Module):
    """Normalises query and key heads [N, H + H_kv, D], each kind with its own weight."""

    def __init__(self, spec: ModelSpec, build: Build, prefix: str) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.q_norm = _norm(spec, build, f"{prefix}.q_norm", spec.head_dim)
        self.k_norm = _norm(spec, build, f"{prefix}.k_norm", spec.head_dim)

    def forward(self, heads: Tensor, overlays: Overlays | None = None) -> Tensor:
        q, k = heads[:, : self.num_heads], heads[:, self.num_heads :]
        return torch.cat([self.q_norm(q, overlays), self.k_norm(k, overlays)], 1)


def _no_head_norms(heads: Tensor, overlays: Overlays | None = None) -> Tensor:
    return heads


def _norm(spec: ModelSpec, build: Build, module: str, width: int) -> RmsNorm:
    return RmsNorm(build, f"{module}.weight", width, spec.norm_eps, spec.norm_offset)


def _layer_norms(spec: ModelSpec, build: Build, prefix: str) -> list[nn.Module]:
    """Return the norms before and after attention, before and after the mlp."""

    def norm(name: str) -> RmsNorm:
        return _norm(spec, build, f"{prefix}.{name}", spec.hidden_size)

    enter_attention, after_attention = norm("input_layernorm"), norm("post_attention_layernorm")
    if spec.sandwich_norm:
        enter_mlp = norm("pre_feedforward_layernorm")
        return [enter_attention, after_attention, enter_mlp, norm("post_feedforward_layernorm")]
    # Despite its checkpoint name, this norm follows the residual addition, not the attention
    enter_mlp, scale = after_attention, spec.residual_scale
    leave = Unchanged() if scale == 1.0 else Scale(scale)
    return [enter_attention, leave, enter_mlp, leave]


def _linear(
    spec: ModelSpec,
    build: Build,
    layer: int,
    site: str,
    in_features: int,
    prefix: str,
    slices: dict[str, int],
) -> Linear:
    parts = tuple(LoraSlice(f"{prefix}.{name}", rows) for name, rows in slices.items())
    return Linear(build, LoraSite(layer, site, in_features, parts), site in spec.biased_sites)
