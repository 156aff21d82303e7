"""Bytes and seconds of a model, from its config.json alone: pure functions for `engine.plan`.

The decoder is laid out on torch's `meta` device, without memory, so that every count is the
loader's own. A floor says what no implementation can be faster than, not how fast this one is.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.kernels.dispatch import reference_ops
from engine.model.decoder import Decoder
from engine.model.families import read_dtype, read_spec
from engine.model.layers import Build
from engine.model.spec import ModelSpec
from engine.runner.kv_cache import kv_bytes_per_token

ATTENTION_SITES = ("qkv", "o")
NF4_BLOCK = 64  # values that share one absmax
SCALE_BYTES = 4  # a float32 per row (int8) or per block (nf4)


@dataclass(frozen=True, slots=True)
class LinearShape:
    site: str
    in_features: int
    out_features: int

    @property
    def numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts of parameters by what they are for. `num_head` is 0 where the head is tied."""

    spec: ModelSpec
    dtype: torch.dtype  # that the engine's `auto` picks
    linears: tuple[LinearShape, ...]  # one per module that an adapter can name
    num_embedding: int
    num_head: int
    num_other: int  # norms and biases

    @property
    def num_linear(self) -> int:
        return sum(linear.numel for linear in self.linears)

    @property
    def num_parameters(self) -> int:
        return self.num_linear + self.num_embedding + self.num_head + self.num_other


def read_model_size(folder: Path) -> ModelSize:
    """Raises ModelError where the model cannot be served."""
    spec = read_spec(folder, None)
    build = Build(reference_ops(), torch.bfloat16, torch.device("meta"))
    decoder = Decoder(spec, build, max_model_len=1)
    total = sum(torch.Size(part.shape).numel() for part in decoder.parts())
    linears = tuple(
        LinearShape(site.site, site.in_features, part.out_features)
        for site in decoder.lora_sites
        for part in site.slices
    )
    num_linear = sum(linear.numel for linear in linears)
    num_embedding = spec.vocab_size * spec.hidden_size
    num_head = 0 if spec.tied_embeddings else num_embedding
    return ModelSize(
        spec,
        torch.float32 if read_dtype(folder) == torch.float32 else torch.bfloat16,
        linears,
        num_embedding,
        num_head,
        total - num_linear - num_embedding - num_head,
    )


# ==== bytes ====


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How linear weights are stored; all else, KV and adapters are in `dtype`."""

    name: str
    dtype: torch.dtype

    def linear_bytes(self, linear: LinearShape) -> int:
        if self.name == "int8":
            return linear.numel + linear.out_features * SCALE_BYTES
        if self.name == "nf4":
            return -(-linear.numel // 2) + -(-linear.numel // NF4_BLOCK) * SCALE_BYTES
        return linear.numel * self.dtype.itemsize


FORMATS = (
    WeightFormat("float32", torch.float32),
    WeightFormat("bfloat16", torch.bfloat16),
    WeightFormat("int8", torch.bfloat16),
    WeightFormat("nf4", torch.bfloat16),
)


def own_format(size: ModelSize) -> WeightFormat:
    """The one in which the engine serves the checkpoint as it is."""
    return next(f for f in FORMATS if f.dtype == size.dtype)


def weight_bytes(size: ModelSize, form: WeightFormat) -> int:
    rest = size.num_embedding + size.num_head + size.num_other
    return sum(map(form.linear_bytes, size.linears)) + rest * form.dtype.itemsize


def kv_bytes(size: ModelSize, dtype: torch.dtype, num_tokens: int, block_size: int) -> int:
    """Whole blocks for one sequence of `num_tokens`."""
    num_blocks = -(-num_tokens // block_size)
    return num_blocks * block_size * kv_bytes_per_token(size.spec, dtype)


def adapter_values(size: ModelSize, *, attention_only: bool = False) -> int:
    """Values per unit of rank: a column of A and a row of B for every module."""
    return sum(
        linear.in_features + linear.out_features
        for linear in size.linears
        if linear.site in ATTENTION_SITES or not attention_only
    )


def adapter_bytes(
    size: ModelSize, dtype: torch.dtype, lora_rank: int, *, attention_only: bool = False
) -> int:
    return lora_rank * adapter_values(size, attention_only=attention_only) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Load:
    """What a plan is made for. Adapters are on all linear modules."""

    memory_bytes: int
    context: int
    lora_rank: int
    block_size: int = 16


def largest_batch(size: ModelSize, form: WeightFormat, load: Load, num_adapters: int) -> int:
    """Sequences of `context` tokens beside the weights and `num_adapters`; 0: none fits."""
    taken = weight_bytes(size, form) + num_adapters * adapter_bytes(
        size, form.dtype, load.lora_rank
    )
    room = load.memory_bytes - taken
    return max(room, 0) // kv_bytes(size, form.dtype, load.context, load.block_size)


def largest_distinct_batch(size: ModelSize, form: WeightFormat, load: Load) -> int:
    """The same when every sequence brings an adapter of its own."""
    each = kv_bytes(size, form.dtype, load.context, load.block_size)
    each += adapter_bytes(size, form.dtype, load.lora_rank)
    return max(load.memory_bytes - weight_bytes(size, form), 0) // each


# ==== time ====


@dataclass(frozen=True, slots=True)
class Machine:
    bytes_per_s: float
    flops_per_s: float
    source: str  # where the two come from, for people


@dataclass(frozen=True, slots=True)
class Floor:
    """No decode step can be shorter than either."""

    read_s: float
    compute_s: float

    @property
    def step_s(self) -> float:
        return max(self.read_s, self.compute_s)


def step_floor(
    size: ModelSize, load: Load, machine: Machine, batch: int, num_adapters: int
) -> Floor:
    """One token for each of `batch` sequences of `context` tokens, in the model's own format.

    Every weight, key, value and adapter in use is read once. Each row is multiplied by the
    weights and, if there are adapters, by its own one.
    """
    form, spec = own_format(size), size.spec
    read = weight_bytes(size, form) + num_adapters * adapter_bytes(size, form.dtype, load.lora_rank)
    if size.num_head:  # of an embedding that is not the head, a row per token
        read -= size.num_embedding * form.dtype.itemsize
    read += batch * load.context * kv_bytes_per_token(spec, form.dtype)
    multiplied = size.num_linear + (size.num_head or size.num_embedding)
    multiplied += 2 * spec.num_layers * spec.num_heads * spec.head_dim * load.context
    if num_adapters:
        multiplied += load.lora_rank * adapter_values(size)
    return Floor(read / machine.bytes_per_s, 2 * batch * multiplied / machine.flops_per_s)
