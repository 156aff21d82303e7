"""Reads checkpoints whose linear layers are already quantized (bitsandbytes, GPTQ, AWQ).

A Scheme is read from config.json's `quantization_config`; it names the tensors of a module and
turns them into a QuantizedWeight. It does not handle layers that a checkpoint leaves dense.
Settings that cannot be reproduced exactly are errors that name the key or the tensor.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from engine.model.checkpoint import Checkpoint
from engine.model.config_keys import ConfigKeys
from engine.model.quantized_weight import NF4_VALUES, QuantizedWeight, pack_pairs, unpack_pairs
from engine.model.spec import ModelError

KEY = "quantization_config"
GROUP_MULTIPLE = 32  # inputs: the kernels read no smaller groups
HALVES = (torch.float16, torch.bfloat16, torch.float32)


class Scheme(Protocol):
    """One way of storing a linear layer's weight low-bit."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str:
        """Format of the resulting QuantizedWeight."""
        ...

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None: a whole row."""
        ...

    @property
    def is_reordered(self) -> bool:
        """Whether weights may have an input order."""
        ...

    @property
    def dense_modules(self) -> tuple[str, ...]:
        """Parts of the names of modules that the config excludes from quantization."""
        ...

    def keys_of(self, checkpoint: Checkpoint, module: str) -> list[str]:
        """List the tensors that a quantized module must have; empty if it is dense."""
        ...

    def read(
        self, checkpoint: Checkpoint, module: str, out_features: int, in_features: int
    ) -> QuantizedWeight: ...


def parse_scheme(config: ConfigKeys) -> Scheme | None:
    """Read the quantization in config.json; None if there is none. Raises ModelError."""
    raw = config.mapping(KEY)
    if raw is None:
        return None
    keys = ConfigKeys(raw, f"{config.where}: {KEY}")
    method = keys.text("quant_method")
    if method not in _METHODS:
        raise keys.error("quant_method", method, f"one of {', '.join(_METHODS)}")
    return _METHODS[method](keys)


def weight_format(folder: Path, scheme: Scheme | None, quantization: str) -> str:
    """Return the format in which the linear layers are served. Raises ModelError.

    One of none, int8, nf4, fp8 or int4.
    """
    if scheme is None:
        return quantization
    if quantization != "none":
        raise ModelError(
            f"quantization={quantization!r} cannot be applied to {folder}, whose weights are "
            f"already quantized ({scheme.name}); it must be 'none'"
        )
    return scheme.format


def _group_size(size: int, in_features: int) -> str | None:
    """Describe what is wrong with groups of this size; None if nothing."""
    if size % GROUP_MULTIPLE or in_features % size:
        return (
            f"groups of {size} inputs; they must be a multiple of {GROUP_MULTIPLE} and divide "
            f"the {in_features} input features"
        )
    return None


def _finite(checkpoint: Checkpoint, key: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise checkpoint.error(key, "holds values that are not finite")
    return values.float()


# ==== bitsandbytes ====


@dataclass(frozen=True, slots=True)
class BnbNf4:
    """NF4 in blocks of the flattened weight, two codes in a byte, the even one in the high half.

    With double quantization the blocks' scales are themselves quantized, in blocks too.
    """

    is_nested: bool
    dense_modules: tuple[str, ...] = ()
    name = "bitsandbytes nf4"
    format = "nf4"
    group_size = 64  # the library's default; each tensor states its own
    is_reordered = False

    def keys_of(self, checkpoint: Checkpoint, module: str) -> list[str]:
        suffixes = ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"]
        nested = ["nested_absmax", "nested_quant_map"]
        if not any(f"{module}.weight.{suffix}" in checkpoint for suffix in suffixes + nested):
            return []
        suffixes += nested if self.is_nested else []
        return [f"{module}.weight", *(f"{module}.weight.{suffix}" for suffix in suffixes)]

    def read(
        self, checkpoint: Checkpoint, module: str, out_features: int, in_features: int
    ) -> QuantizedWeight:
        key = f"{module}.weight"
        state = _quant_state(checkpoint, key, out_features, in_features)
        block = _integer(checkpoint, key, state, "blocksize")
        wrong = _group_size(block, in_features)
        if wrong:
            raise checkpoint.error(_state_key(key), f"has {wrong}")
        half = out_features * in_features // 2
        packed = checkpoint.tensor(key, (half, 1), (torch.uint8,), "the config")
        _check_values(checkpoint, f"{key}.quant_map")
        scales = self._scales(checkpoint, key, state, 2 * half // block)
        codes = (packed << 4 | packed >> 4).view(out_features, in_features // 2)
        return QuantizedWeight("nf4", codes, scales.view(out_features, -1), group_size=block)

    def _scales(
        self, checkpoint: Checkpoint, key: str, state: dict[str, Any], num_blocks: int
    ) -> Tensor:
        asker, absmax, outer = "the config", f"{key}.absmax", f"{key}.nested_absmax"
        if not self.is_nested:
            scales = checkpoint.tensor(absmax, (num_blocks,), (torch.float32,), asker)
            return _finite(checkpoint, absmax, scales)
        size = _integer(checkpoint, key, state, "nested_blocksize")
        offset = state.get("nested_offset")
        if type(offset) not in (int, float) or not abs(cast("float", offset)) < float("inf"):
            raise checkpoint.error(_state_key(key), f"has nested_offset={offset!r}, not a number")
        num_outer = -(-num_blocks // size)
        codes = checkpoint.tensor(absmax, (num_blocks,), (torch.uint8,), asker)
        scales = checkpoint.tensor(outer, (num_outer,), (torch.float32,), asker)
        table_key = f"{key}.nested_quant_map"
        table = checkpoint.tensor(table_key, (256,), (torch.float32,), "8-bit scales")
        values = _finite(checkpoint, table_key, table)[codes.long()]
        wide = _finite(checkpoint, outer, scales).repeat_interleave(size)[:num_blocks]
        return values * wide + torch.tensor(offset, dtype=torch.float32)


def _state_key(key: str) -> str:
    return f"{key}.quant_state.bitsandbytes__nf4"


def _quant_state(
    checkpoint: Checkpoint, key: str, out_features: int, in_features: int
) -> dict[str, Any]:
    """Read the JSON object that describes the tensor."""
    state_key = _state_key(key)
    text = bytes(checkpoint.vector(state_key, torch.uint8).tolist())
    try:
        state = json.loads(text)
    except ValueError as error:
        raise checkpoint.error(state_key, f"is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise checkpoint.error(state_key, "is not a JSON object")
    for name, wanted in (("quant_type", "nf4"), ("shape", [out_features, in_features])):
        if state.get(name) != wanted:
            found = state.get(name)
            raise checkpoint.error(state_key, f"has {name}={found!r}; it must be {wanted!r}")
    return state


def _integer(checkpoint: Checkpoint, key: str, state: dict[str, Any], name: str) -> int:
    value = state.get(name)
    if type(value) is not int or value < 1:
        raise checkpoint.error(_state_key(key), f"has {name}={value!r}, not a positive integer")
    return value


def _check_values(checkpoint: Checkpoint, key: str) -> None:
    values = checkpoint.tensor(key, (16,), (torch.float32,), "4-bit codes")
    if not torch.allclose(values, torch.tensor(NF4_VALUES), rtol=0.0, atol=1e-6):
        raise checkpoint.error(key, "is not the table of nf4")


@dataclass(frozen=True, slots=True)
class BnbInt8:
    """int8 rows, with each row's largest magnitude. Outlier columns are not split off."""

    dense_modules: tuple[str, ...] = ()
    name = "bitsandbytes int8"
    format = "int8"
    group_size = None
    is_reordered = False

    def keys_of(self, checkpoint: Checkpoint, module: str) -> list[str]:
        weight, largest, layout = (f"{module}.{k}" for k in ("weight", "SCB", "weight_format"))
        if largest not in checkpoint and layout not in checkpoint:
            return []
        return [weight, largest, *([layout] if layout in checkpoint else [])]

    def read(
        self, checkpoint: Checkpoint, module: str, out_features: int, in_features: int
    ) -> QuantizedWeight:
        asker, key, layout = "the config", f"{module}.SCB", f"{module}.weight_format"
        if layout in checkpoint:
            order = checkpoint.tensor(layout, (), (torch.uint8,), "one number")
            if order.item() != 0:
                raise checkpoint.error(layout, f"is {order.item()}, not 0: rows as they are")
        shape = (out_features, in_features)
        codes = checkpoint.tensor(f"{module}.weight", shape, (torch.int8,), asker)
        largest = checkpoint.tensor(key, (out_features,), (torch.float32,), asker)
        scales = _finite(checkpoint, key, largest)[:, None] / 127
        return QuantizedWeight("int8", codes.clone(), scales, group_size=in_features)


def _parse_bitsandbytes(keys: ConfigKeys) -> Scheme:
    is_int8, is_int4 = keys.flag("load_in_8bit", False), keys.flag("load_in_4bit", False)
    if is_int8 == is_int4:
        raise keys.error("load_in_8bit", is_int8, "the opposite of load_in_4bit")
    kind = keys.text("bnb_4bit_quant_type", "fp4")
    if is_int4 and kind != "nf4":
        raise keys.error("bnb_4bit_quant_type", kind, "'nf4': there is no kernel for others")
    is_nested = keys.flag("bnb_4bit_use_double_quant", False)
    dense = _names(keys, "llm_int8_skip_modules")
    keys.finish({"bnb_4bit_quant_storage": ("uint8",)}, _BNB_IRRELEVANT)
    return BnbInt8(dense) if is_int8 else BnbNf4(is_nested, dense)


# Keys for how the library computes with the weights; they do not change the weights
_BNB_COMPUTING = """
_load_in_4bit _load_in_8bit bnb_4bit_compute_dtype llm_int8_enable_fp32_cpu_offload
llm_int8_has_fp16_weight llm_int8_threshold
"""
_BNB_IRRELEVANT = frozenset(_BNB_COMPUTING.split())


# ==== GPTQ ====


@dataclass(frozen=True, slots=True)
class Gptq:
    """qweight int32 [in / 8, out], eight inputs per word; g_idx holds the group of every input."""

    row_group: int  # -1: a whole row
    zero_offset: int  # added to stored zeros; the first version of the format stores them minus 1
    is_reordered: bool
    name = "gptq"
    format = "int4"
    dense_modules: tuple[str, ...] = ()

    @property
    def group_size(self) -> int | None:
        return None if self.row_group == -1 else self.row_group

    def keys_of(self, checkpoint: Checkpoint, module: str) -> list[str]:
        keys = _int4_keys(checkpoint, module)
        order = f"{module}.g_idx"
        has_order = self.is_reordered or order in checkpoint
        return [*keys, order] if keys and has_order else keys

    def read(
        self, checkpoint: Checkpoint, module: str, out_features: int, in_features: int
    ) -> QuantizedWeight:
        group = in_features if self.row_group == -1 else self.row_group
        _check_int4_sizes(checkpoint, module, group, out_features, in_features)
        shape = (in_features // 8, out_features)
        words = checkpoint.tensor(f"{module}.qweight", shape, (torch.int32,), "the config")
        codes = _little_endian(words.T)  # byte by byte the order of QuantizedWeight
        order = self._order(checkpoint, module, group, in_features)
        if order is not None:
            codes = pack_pairs(unpack_pairs(codes)[:, order])
        num_groups = in_features // group
        packed_zeros = _int4_zeros(checkpoint, module, num_groups, out_features)
        zeros = unpack_pairs(_little_endian(packed_zeros)) + self.zero_offset & 15
        return QuantizedWeight(
            "int4",
            codes,
            _int4_scales(checkpoint, module, num_groups, out_features),
            group_size=group,
            zeros=zeros.T.float().contiguous(),
            input_order=None if order is None else order.to(torch.int32),
        )

    def _order(
        self, checkpoint: Checkpoint, module: str, group: int, in_features: int
    ) -> Tensor | None:
        """Return the inputs sorted by group; None if they already are."""
        key = f"{module}.g_idx"
        if key not in checkpoint:
            return None
        groups = checkpoint.tensor(key, (in_features,), (torch.int32,), "the config").long()
        num_groups = in_features // group
        low, high = int(groups.min()), int(groups.max())
        if low < 0 or high >= num_groups:
            raise checkpoint.error(key, f"names groups {low}..{high}, outside 0..{num_groups - 1}")
        sizes = groups.bincount(minlength=num_groups)
        if (sizes != group).any():
            odd = int((sizes != group).nonzero()[0])
            raise checkpoint.error(
                key, f"puts {int(sizes[odd])} inputs into group {odd}; it must be {group}"
            )
        order = groups.argsort(stable=True)
        return None if torch.equal(order, torch.arange(in_features)) else order


def _parse_gptq(keys: ConfigKeys) -> Scheme:
    _check_bits(keys)
    group = keys.integer("group_size", low=-1)
    if group != -1 and (group == 0 or group % GROUP_MULTIPLE):
        raise keys.error("group_size", group, f"-1 or a multiple of {GROUP_MULTIPLE}")
    layout = keys.text("checkpoint_format", keys.text("format", "gptq"))
    offsets = {"gptq": 1, "gptq_v2": 0}
    if layout not in offsets:
        raise keys.error("checkpoint_format", layout, f"one of {', '.join(offsets)}")
    is_reordered = keys.flag("desc_act", False)
    keys.finish(_INT4_NEUTRAL | {"lm_head": (False,)}, _INT4_IRRELEVANT)
    return Gptq(group, offsets[layout], is_reordered)


# ==== AWQ ====


@dataclass(frozen=True, slots=True)
class Awq:
    """qweight int32 [in, out / 8], eight outputs per word, interleaved (`_AWQ_NIBBLES`)."""

    group_size: int
    dense_modules: tuple[str, ...] = ()
    name = "awq"
    format = "int4"
    is_reordered = False

    def keys_of(self, checkpoint: Checkpoint, module: str) -> list[str]:
        return _int4_keys(checkpoint, module)

    def read(
        self, checkpoint: Checkpoint, module: str, out_features: int, in_features: int
    ) -> QuantizedWeight:
        _check_int4_sizes(checkpoint, module, self.group_size, out_features, in_features)
        shape = (in_features, out_features // 8)
        words = checkpoint.tensor(f"{module}.qweight", shape, (torch.int32,), "the config")
        num_groups = in_features // self.group_size
        zeros = _int4_zeros(checkpoint, module, num_groups, out_features)
        return QuantizedWeight(
            "int4",
            pack_pairs(_outputs_in_order(words).T.contiguous()),
            _int4_scales(checkpoint, module, num_groups, out_features),
            group_size=self.group_size,
            zeros=_outputs_in_order(zeros).T.float().contiguous(),
        )


# Nibble that holds output j of eight: the even outputs first, then the odd ones
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def _outputs_in_order(words: Tensor) -> Tensor:
    """Unpack int32 [rows, out / 8] to uint8 [rows, out], outputs in order."""
    nibbles = unpack_pairs(_little_endian(words)).view(len(words), -1, 8)
    return nibbles[..., list(_AWQ_NIBBLES)].flatten(1)


def _parse_awq(keys: ConfigKeys) -> Scheme:
    _check_bits(keys)
    group = keys.integer("group_size", low=1)
    if group % GROUP_MULTIPLE:
        raise keys.error("group_size", group, f"a multiple of {GROUP_MULTIPLE}")
    if not keys.flag("zero_point", True):
        raise keys.error("zero_point", False, "true")
    version = keys.text("version", keys.text("format", "gemm"))
    if version.lower() != "gemm":
        raise keys.error("version", version, "'gemm'")
    dense = _names(keys, "modules_to_not_convert")
    neutral = _INT4_NEUTRAL | {"do_fuse": (False,), "desc_act": (False,)}
    keys.finish(neutral, _INT4_IRRELEVANT)
    return Awq(group, dense)


# ==== shared by GPTQ and AWQ ====

_INT4_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dynamic": ({},),
    "is_marlin_format": (False,),
    "pack_dtype": ("int32",),
}
# Keys for how the codes were found and how other programs compute with them
_INT4_MAKING = """
act_group_aware adapter backend batch_size block_name_to_quantize cache_block_outputs
damp_auto_increment damp_percent dataset disable_exllama exllama_config format fuse_max_seq_len
max_input_length meta model_file_base_name model_name_or_path model_seqlen
module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse mse
offload_to_disk pad_token_id static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama
"""
_INT4_IRRELEVANT = frozenset(_INT4_MAKING.split())


def _check_bits(keys: ConfigKeys) -> None:
    bits = keys.integer("bits")
    if bits != 4:
        raise keys.error("bits", bits, "4: there is no kernel for others")


def _names(keys: ConfigKeys, key: str) -> tuple[str, ...]:
    value = keys.take(key, None)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise keys.error(key, value, "a list of names")
    return tuple(value)


def _int4_keys(checkpoint: Checkpoint, module: str) -> list[str]:
    keys = [f"{module}.{name}" for name in ("qweight", "qzeros", "scales")]
    return keys if any(key in checkpoint for key in keys) else []


def _check_int4_sizes(
    checkpoint: Checkpoint, module: str, group: int, out_features: int, in_features: int
) -> None:
    wrong = _group_size(group, in_features)
    if out_features % 8:
        wrong = f"{out_features} outputs, not a multiple of 8"
    if wrong:
        raise checkpoint.error(f"{module}.qweight", f"has {wrong}")


def _int4_zeros(checkpoint: Checkpoint, module: str, num_groups: int, out_features: int) -> Tensor:
    shape = (num_groups, out_features // 8)
    return checkpoint.tensor(f"{module}.qzeros", shape, (torch.int32,), "the config")


def _int4_scales(checkpoint: Checkpoint, module: str, num_groups: int, out_features: int) -> Tensor:
    key, shape = f"{module}.scales", (num_groups, out_features)
    scales = checkpoint.tensor(key, shape, HALVES, "the config")
    return _finite(checkpoint, key, scales).T.contiguous()


def _little_endian(words: Tensor) -> Tensor:
    """View int32 [rows, n] as uint8 [rows, 4 n], the lowest byte first (little-endian memory)."""
    return words.contiguous().view(torch.uint8)


_METHODS: dict[str, Callable[[ConfigKeys], Scheme]] = {
    "bitsandbytes": _parse_bitsandbytes,
    "gptq": _parse_gptq,
    "awq": _parse_awq,
}
