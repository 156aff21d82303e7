"""Computes bytes and seconds of a model from its config.json alone, for `engine.plan`.

The decoder is built on torch's `meta` device, without memory, so that all counts are the same as
the loader's. A floor is the time that no implementation can beat, not the time of this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.model.decoder import Decoder
from engine.model.families import read_scheme, read_spec
from engine.model.formats import auto_output_layer, own_dtype
from engine.model.layers import Build
from engine.model.quantize import INT4_BLOCK, NF4_BLOCK, check_quantizable
from engine.model.quantized_checkpoint import weight_format
from engine.model.quantized_weight import BYTE_FORMATS
from engine.model.reference import TORCH_OPS, WEIGHT_OPS
from engine.model.spec import ModelSpec, kv_bytes_per_token

ATTENTION_SITES = ("qkv", "o")
SCALE_BYTES = 4  # a float32 per row (int8, fp8, int4), block (nf4) or group (GPTQ, AWQ)


@dataclass(frozen=True, slots=True)
class LinearShape:
    site: str
    in_features: int
    out_features: int
    module: str = ""

    @property
    def numel(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How the weights of linear layers and the output layer are stored; all else, KV and adapters
    are in `dtype`."""

    name: str
    dtype: torch.dtype
    quantization: str = "none"  # int8, nf4, fp8 or int4
    group_size: int | None = None  # inputs that share a scale; None: all
    has_zeros: bool = False  # each group has a zero point, as a scale
    has_multipliers: bool = False  # each group has one, a byte, and each row a scale
    is_reordered: bool = False  # each weight has an input order
    dense_modules: tuple[str, ...] = ()  # parts of the names of modules left in `dtype`
    output_layer: str = "model"  # in `dtype`; or int8

    def linear_bytes(self, linear: LinearShape) -> int:
        if self.quantization == "none" or self._is_dense(linear.module):
            return linear.numel * self.dtype.itemsize
        groups = -(-linear.numel // (self.group_size or linear.in_features))
        scales = groups * SCALE_BYTES
        if self.has_multipliers:
            scales = groups + linear.out_features * SCALE_BYTES
        if self.quantization in BYTE_FORMATS:
            return linear.numel + scales
        codes = -(-linear.numel // 2)
        order = 4 * linear.in_features if self.is_reordered and self.group_size else 0
        return codes + scales * (2 if self.has_zeros else 1) + order

    def _is_dense(self, module: str) -> bool:
        return any(f".{name}." in f".{module}." for name in self.dense_modules)


FORMATS = (
    WeightFormat("float32", torch.float32),
    WeightFormat("bfloat16", torch.bfloat16),
    WeightFormat("int8", torch.bfloat16, "int8"),
    WeightFormat("nf4", torch.bfloat16, "nf4", NF4_BLOCK),
    WeightFormat("int4", torch.bfloat16, "int4", INT4_BLOCK, has_multipliers=True),
    WeightFormat("fp8", torch.bfloat16, "fp8"),
)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts parameters by use. `num_head` is 0 if the head is tied."""

    spec: ModelSpec
    dtype: torch.dtype  # chosen by the engine's `auto`
    linears: tuple[LinearShape, ...]  # one per module that an adapter can name
    num_embedding: int
    num_head: int
    num_other: int  # norms and biases
    form: WeightFormat  # format in which the engine serves it
    output_layer: str = "model"  # auto, int8 or model, as it is configured

    @property
    def num_linear(self) -> int:
        return sum(linear.numel for linear in self.linears)

    @property
    def num_parameters(self) -> int:
        return self.num_linear + self.num_embedding + self.num_head + self.num_other


def read_model_size(
    folder: Path, quantization: str = "none", output_layer: str = "model"
) -> ModelSize:
    """Count a model's parameters. Raises ModelError if it cannot be served so quantized.

    `output_layer` is that of the engine's configuration, on a CPU.
    """
    spec = read_spec(folder, None)
    build = Build(WEIGHT_OPS, TORCH_OPS, torch.bfloat16, torch.device("meta"))
    decoder = Decoder(spec, build, max_model_len=1)
    total = sum(torch.Size(part.shape).numel() for part in decoder.parts())
    check_quantizable(quantization, decoder.lora_sites)
    linears = tuple(
        LinearShape(site.site, site.in_features, part.out_features, part.module)
        for site in decoder.lora_sites
        for part in site.slices
    )
    num_linear = sum(linear.numel for linear in linears)
    num_embedding = spec.vocab_size * spec.hidden_size
    num_head = 0 if spec.tied_embeddings else num_embedding
    dtype = own_dtype(folder)
    return ModelSize(
        spec,
        dtype,
        linears,
        num_embedding,
        num_head,
        total - num_linear - num_embedding - num_head,
        _own_format(folder, quantization, dtype, output_layer),
        output_layer,
    )


def _own_format(
    folder: Path, quantization: str, dtype: torch.dtype, output_layer: str
) -> WeightFormat:
    """Return the matching one of FORMATS with this output layer, else a new one."""
    scheme, known = read_scheme(folder), _with_output_layer(FORMATS, output_layer)
    kind = weight_format(folder, scheme, quantization)
    if scheme is None:
        alike = [form for form in known if form.quantization == kind]
        same = [form for form in alike if form.dtype == dtype]
        if same:
            return same[0]
        return replace(alike[0], name=f"{kind}/f32", dtype=dtype, output_layer="model")
    own = WeightFormat(
        kind,
        dtype,
        kind,
        scheme.group_size,
        has_zeros=kind == "int4",
        is_reordered=scheme.is_reordered,
        dense_modules=scheme.dense_modules,
    )
    (own,) = _with_output_layer((own,), output_layer)
    return own if own in known else replace(own, name="as stored")


def _with_output_layer(forms: Sequence[WeightFormat], output_layer: str) -> list[WeightFormat]:
    """Resolve `output_layer` as the engine does on a CPU (engine.settle)."""

    def chosen(form: WeightFormat) -> str:
        if output_layer == "auto":
            return auto_output_layer(form.quantization, form.dtype)
        return output_layer if form.dtype == torch.bfloat16 else "model"

    return [replace(form, output_layer=chosen(form)) for form in forms]


# ==== bytes ====


def formats(size: ModelSize) -> tuple[WeightFormat, ...]:
    """List the formats that a plan compares: FORMATS, and the model's own if it is another."""
    known = tuple(_with_output_layer(FORMATS, size.output_layer))
    return known if size.form in known else (*known, size.form)


def weight_bytes(size: ModelSize, form: WeightFormat) -> int:
    rest = size.num_embedding + size.num_other
    linears = sum(map(form.linear_bytes, size.linears))
    return linears + rest * form.dtype.itemsize + _head_bytes(size, form)


def _head_bytes(size: ModelSize, form: WeightFormat) -> int:
    """Return the bytes of the output layer; 0 if it is the embedding itself."""
    if form.output_layer == "model":
        return size.num_head * form.dtype.itemsize
    return size.num_embedding + size.spec.vocab_size * SCALE_BYTES


def kv_bytes(size: ModelSize, dtype: torch.dtype, num_tokens: int, block_size: int) -> int:
    """Return the bytes of the blocks of one sequence of `num_tokens`."""
    num_blocks = -(-num_tokens // block_size)
    return num_blocks * block_size * kv_bytes_per_token(size.spec, dtype)


def adapter_values(size: ModelSize, *, attention_only: bool = False) -> int:
    """Count values per unit of rank: a row of A and a column of B for every module."""
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
    """Memory, context and adapter rank of a plan. Adapters are on all linear modules."""

    memory_bytes: int
    context: int
    lora_rank: int
    block_size: int = 16
    kv_dtype: torch.dtype | None = None  # None: the format's dtype

    def sequence_bytes(self, size: ModelSize, form: WeightFormat) -> int:
        """Return the bytes of the KV blocks of one sequence."""
        return kv_bytes(size, self.kv_dtype or form.dtype, self.context, self.block_size)


def largest_batch(size: ModelSize, form: WeightFormat, load: Load, num_adapters: int) -> int:
    """Count sequences of `context` tokens that fit besides weights and `num_adapters` adapters."""
    taken = weight_bytes(size, form) + num_adapters * adapter_bytes(
        size, form.dtype, load.lora_rank
    )
    room = load.memory_bytes - taken
    return max(room, 0) // load.sequence_bytes(size, form)


def largest_distinct_batch(size: ModelSize, form: WeightFormat, load: Load) -> int:
    """Count sequences that fit besides the weights if each uses a different adapter."""
    each = load.sequence_bytes(size, form)
    each += adapter_bytes(size, form.dtype, load.lora_rank)
    return max(load.memory_bytes - weight_bytes(size, form), 0) // each


# ==== time ====


@dataclass(frozen=True, slots=True)
class Machine:
    bytes_per_s: float
    flops_per_s: float
    source: str  # where the two come from, to be printed


@dataclass(frozen=True, slots=True)
class Floor:
    """Lower bounds on a decode step: no step is shorter than either."""

    read_s: float
    compute_s: float

    @property
    def step_s(self) -> float:
        return max(self.read_s, self.compute_s)


def step_floor(
    size: ModelSize, load: Load, machine: Machine, batch: int, num_adapters: int
) -> Floor:
    """Bound the step that decodes one token for each of `batch` sequences of `context` tokens.

    In the model's own format. Every weight, key, value and adapter in use is read once. Each row
    is multiplied by the weights and, if there are adapters, by its own adapter.
    """
    form, spec = size.form, size.spec
    read = weight_bytes(size, form) + num_adapters * adapter_bytes(size, form.dtype, load.lora_rank)
    if _head_bytes(size, form):  # the embedding is not read whole, only a row per token
        read -= size.num_embedding * form.dtype.itemsize
    read += batch * load.context * kv_bytes_per_token(spec, load.kv_dtype or form.dtype)
    multiplied = size.num_linear + (size.num_head or size.num_embedding)
    multiplied += 2 * spec.num_layers * spec.num_heads * spec.head_dim * load.context
    if num_adapters:
        multiplied += load.lora_rank * adapter_values(size)
    return Floor(read / machine.bytes_per_s, 2 * batch * multiplied / machine.flops_per_s)
