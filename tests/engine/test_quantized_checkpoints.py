"""Tests quantized checkpoints: read as their formats define, or refused with the name.

bitsandbytes checkpoints are written by transformers with the library itself, whose dequantization
is the reference. GPTQ and AWQ checkpoints are packed here, nibble by nibble, by their definition.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapter_store.bases import describe_base
from adapter_store.conversion.model_weights import open_model
from engine import sizes as arithmetic
from engine.backends.needs import arena_bytes
from engine.backends.torch.ops import torch_build
from engine.config import EngineConfig
from engine.messages import GenerateRequest
from engine.model.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from engine.model.families import read_scheme, read_spec
from engine.model.layers import Linear, SideBySide
from engine.model.loader import load_decoder, weight_bytes
from engine.model.quantized_weight import QuantizedWeight, dequantize
from engine.model.spec import ModelError
from engine.settle import settle
from reef.__main__ import main
from tests.engine.support.driver import generate, make_engine, run, write_adapter
from tests.engine.support.driver import greedy as driver_greedy
from tests.engine.support.packed import awq_tensors, gptq_tensors, quantize
from tests.engine.support.tiny import (
    Tiny,
    greedy,
    load_reference,
    logits_in_chunks,
    random_prompt,
    reference_greedy,
    reference_logits,
)

MakeTiny = Callable[..., Tiny]
Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
WIDE = {"intermediate_size": 128}
GROUP = 32
UP = "model.layers.1.mlp.up_proj"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(folder, torch_build(CPU, dtype), max_model_len=256)


def read(folder: Path, module: str, out_features: int, in_features: int) -> QuantizedWeight:
    scheme = read_scheme(folder)
    assert scheme is not None
    with Checkpoint(folder) as checkpoint:
        return scheme.read(checkpoint, module, out_features, in_features)


def stored(folder: Path, module: str) -> torch.Tensor:
    """Return a weight as conversions of adapters read it."""
    return torch.from_numpy(open_model(folder).weight(module))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear modules of the layers, by name."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


def with_weights(folder: Path, weights: Tensors) -> Any:
    """Return transformers' model of the dense checkpoint with these weights in linear modules."""
    model = load_reference(folder, torch.float32)
    with torch.no_grad():
        for name, module in linears(model).items():
            if name in weights:
                module.weight.copy_(weights[name])
    return model


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of quantization_config; `...` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    keys = config["quantization_config"] | changes
    config["quantization_config"] = {k: v for k, v in keys.items() if v is not ...}
    path.write_text(json.dumps(config))


def copy_changed(source: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    shutil.copy(source / "config.json", folder)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def assert_same_model(folder: Path, oracle: Any) -> None:
    decoder, prompt = load(folder), random_prompt(11)
    found, expected = logits_in_chunks(decoder, prompt, 4), reference_logits(oracle, prompt)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-4)
    assert greedy(decoder, prompt, 12) == reference_greedy(oracle, prompt, 12)


# ==== bitsandbytes ====

BNB: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "mixed": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["lm_head", "down_proj", "k_proj"],
    },
}
MakeBnb = Callable[[str], Path]


@pytest.fixture(scope="module")
def dense(tiny_model: MakeTiny) -> Tiny:
    return tiny_model("qwen2", **WIDE)


@pytest.fixture(scope="module")
def make_bnb(dense: Tiny, tmp_path_factory: pytest.TempPathFactory) -> MakeBnb:
    """Save a checkpoint by transformers and bitsandbytes. Do not change its folder."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            quantization = BitsAndBytesConfig(**BNB[kind])
            model = AutoModelForCausalLM.from_pretrained(
                dense.folder, quantization_config=quantization, device_map="cpu", dtype="float32"
            )
            model.save_pretrained(made[kind])
        return made[kind]

    return make


def bnb_weights(folder: Path) -> Tensors:
    """Return the library's own dequantization of the quantized modules."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    found: Tensors = {}
    for name, module in linears(model).items():
        if isinstance(module, Linear4bit):
            found[name] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif module.weight.dtype == torch.int8:
            scales = load_file(folder / "model.safetensors")[f"{name}.SCB"]
            found[name] = bnb.int8_vectorwise_dequant(module.weight.data, scales)
    return found


@pytest.mark.parametrize("kind", ["nf4", "nested", "int8", "mixed"])
def test_bitsandbytes_weights_equal_the_librarys_dequantization(
    kind: str, make_bnb: MakeBnb
) -> None:
    folder = make_bnb(kind)
    expected = bnb_weights(folder)
    assert len(expected) == (15 if kind == "mixed" else 21)
    for name, weight in expected.items():
        found = dequantize(read(folder, name, *weight.shape))
        # The library multiplies by 1 / 127, here it is a division: one unit of float32
        tolerance = {"rtol": 1e-6, "atol": 0.0} if kind == "int8" else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(found, weight, **tolerance)
        torch.testing.assert_close(stored(folder, name), weight, **tolerance)


@pytest.mark.parametrize("kind", ["nf4", "nested", "int8", "mixed"])
def test_a_bitsandbytes_checkpoint_is_served_as_its_dequantized_model(
    kind: str, make_bnb: MakeBnb, dense: Tiny
) -> None:
    folder = make_bnb(kind)
    assert_same_model(folder, with_weights(dense.folder, bnb_weights(folder)))


@pytest.mark.parametrize("kind", ["nf4", "int8", "mixed"])
def test_adapters_may_be_published_for_a_bitsandbytes_checkpoint(
    kind: str, make_bnb: MakeBnb, dense: Tiny, tmp_path: Path
) -> None:
    expected = describe_base(dense.folder, tmp_path, lambda _: None)
    assert describe_base(make_bnb(kind), tmp_path, lambda _: None).modules == expected.modules


@pytest.mark.parametrize("blocksize", [32, 128])
def test_other_blocks_are_read_if_rows_are_whole_blocks(
    blocksize: int, make_bnb: MakeBnb, tmp_path: Path
) -> None:
    weight, key = torch.randn(64, 128), "model.layers.0.mlp.down_proj.weight"
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")

    def replace(tensors: Tensors) -> None:
        tensors[key] = packed
        for name, value in state.as_dict(packed=True).items():
            tensors[f"{key}.{name}"] = value

    folder = copy_changed(make_bnb("nf4"), tmp_path, replace)
    found = read(folder, key.removesuffix(".weight"), 64, 128)
    assert found.group_size == blocksize
    assert torch.equal(dequantize(found), bnb.dequantize_4bit(packed, state))


def test_blocks_that_straddle_rows_are_refused_by_name(make_bnb: MakeBnb, tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        _set_state(tensors, "blocksize", 256)

    with pytest.raises(ModelError, match=r"up_proj\.weight.* groups of 256 .*64 input features"):
        load(copy_changed(make_bnb("nf4"), tmp_path, widen))


# ==== GPTQ and AWQ, as their formats define them ====


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}


def write_quantized(
    source: Tiny,
    folder: Path,
    config: dict[str, Any],
    tensors_of: Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None],
) -> Tensors:
    """Replace weights by the tensors of `tensors_of`; return their meaning, by module."""
    tensors, meant = load_file(source.folder / "model.safetensors"), {}
    for name, module in linears(source.reference).items():
        made = tensors_of(name, module.weight.detach())
        if made is not None:
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{suffix}": t.contiguous() for suffix, t in made[0].items()}
            meant[name] = made[1]
    save_file(tensors, folder / "model.safetensors")
    keys = json.loads((source.folder / "config.json").read_text())
    keys["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(keys))
    return meant


def gptq(group: int = GROUP, zero_offset: int = 1) -> Callable[[str, torch.Tensor], Any]:
    def make(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes = quantize(weight, weight.shape[1] if group == -1 else group)
        return gptq_tensors(codes, zero_offset), codes.weight

    return make


def gptq_reordered(seed_of: Callable[[str], int]) -> Callable[[str, torch.Tensor], Any]:
    """Assign inputs to groups by a permutation that depends on the module's name."""

    def make(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed_of(name))
        groups = torch.randperm(weight.shape[1], generator=generator) // GROUP
        codes = quantize(weight, GROUP, groups)
        return gptq_tensors(codes), codes.weight

    return make


def awq(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes = quantize(weight, GROUP)
    return awq_tensors(codes), codes.weight


def awq_but_for_values(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
    return None if name.endswith("v_proj") else awq(name, weight)


FORMATS: dict[str, tuple[dict[str, Any], Callable[[str, torch.Tensor], Any]]] = {
    "gptq": (GPTQ_CONFIG, gptq()),
    "gptq_v2": (GPTQ_CONFIG | {"checkpoint_format": "gptq_v2"}, gptq(zero_offset=0)),
    "gptq rows": (GPTQ_CONFIG | {"group_size": -1}, gptq(-1)),
    "gptq in one order": (GPTQ_CONFIG | {"desc_act": True}, gptq_reordered(lambda name: 3)),
    "gptq in many orders": (GPTQ_CONFIG | {"desc_act": True}, gptq_reordered(lambda n: ord(n[-6]))),
    "awq": (AWQ_CONFIG, awq),
    "awq, mixed": (AWQ_CONFIG | {"modules_to_not_convert": ["v_proj"]}, awq_but_for_values),
}


@dataclass(frozen=True, slots=True)
class Written:
    folder: Path  # do not change it
    meant: Tensors  # the weights, by module


MakeWritten = Callable[[str], Written]


@pytest.fixture(scope="module")
def make_written(dense: Tiny, tmp_path_factory: pytest.TempPathFactory) -> MakeWritten:
    made: dict[str, Written] = {}

    def make(kind: str) -> Written:
        if kind not in made:
            folder = tmp_path_factory.mktemp("written")
            made[kind] = Written(folder, write_quantized(dense, folder, *FORMATS[kind]))
        return made[kind]

    return make


@pytest.mark.parametrize("kind", FORMATS)
def test_gptq_and_awq_weights_follow_their_format(
    kind: str, dense: Tiny, make_written: MakeWritten
) -> None:
    written = make_written(kind)
    for name, weight in written.meant.items():
        found = dequantize(read(written.folder, name, *weight.shape))
        torch.testing.assert_close(found, weight, rtol=0.0, atol=0.0)
        assert torch.equal(stored(written.folder, name), weight)
        original = linears(dense.reference)[name].weight
        assert (weight - original).abs().mean() < 0.2 * original.abs().mean()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_adapters_may_be_published_for_a_gptq_or_awq_checkpoint(
    kind: str, make_written: MakeWritten, dense: Tiny, tmp_path: Path
) -> None:
    expected = describe_base(dense.folder, tmp_path, lambda _: None)
    found = describe_base(make_written(kind).folder, tmp_path, lambda _: None)
    assert found.modules == expected.modules


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "awq"])
def test_zeros_at_both_ends_of_their_range_are_read(
    kind: str, make_written: MakeWritten, tmp_path: Path
) -> None:
    """The first version of GPTQ stores a zero of 0 as 15: one less, in four bits."""
    generator = torch.Generator().manual_seed(5)
    weight = (
        torch.rand(128, 64, generator=generator) * torch.tensor([1.0, -1.0]).repeat(64)[:, None]
    )
    codes = quantize(weight, GROUP)
    assert set(codes.zeros.flatten().tolist()) == {0, 15}
    tensors = awq_tensors(codes) if kind == "awq" else gptq_tensors(codes, int(kind == "gptq"))

    def put(into: Tensors) -> None:
        into |= {f"{UP}.{suffix}": tensor for suffix, tensor in tensors.items()}

    folder = copy_changed(make_written(kind).folder, tmp_path, put)
    assert torch.equal(dequantize(read(folder, UP, 128, 64)), codes.weight)
    assert torch.equal(stored(folder, UP), codes.weight)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_gptq_or_awq_checkpoint_is_served_as_its_dequantized_model(
    kind: str, dense: Tiny, make_written: MakeWritten
) -> None:
    written = make_written(kind)
    assert_same_model(written.folder, with_weights(dense.folder, written.meant))


@pytest.mark.parametrize(
    ("kind", "are_side_by_side"),
    [("gptq in one order", False), ("gptq in many orders", True), ("awq, mixed", True)],
)
def test_fused_modules_share_a_matrix_unless_they_differ(
    kind: str, are_side_by_side: bool, make_written: MakeWritten
) -> None:
    folder = make_written(kind).folder
    qkv = [m for m in load(folder).modules() if isinstance(m, Linear) and m.site == "qkv"]
    assert [isinstance(m.multiply, SideBySide) for m in qkv] == [are_side_by_side] * 3


def test_a_bias_where_the_architecture_has_none_must_be_zero(dense: Tiny, tmp_path: Path) -> None:
    """Some quantizers give every module a bias."""

    def with_bias(value: float) -> Callable[[str, torch.Tensor], Any]:
        def make(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
            tensors, meant = gptq()(name, weight)
            if name.endswith("_proj") and "self_attn" not in name:
                tensors["bias"] = torch.full((len(weight),), value)
            return tensors, meant

        return make

    meant = write_quantized(dense, tmp_path, GPTQ_CONFIG, with_bias(0.0))
    assert_same_model(tmp_path, with_weights(dense.folder, meant))
    write_quantized(dense, tmp_path, GPTQ_CONFIG, with_bias(0.5))
    with pytest.raises(ModelError, match=r"mlp\..*_proj\.bias is not a weight of this"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["gptq in many orders", "awq"])
def test_an_adapter_adds_to_a_quantized_checkpoint(
    kind: str, dense: Tiny, make_written: MakeWritten, tmp_path: Path
) -> None:
    written = make_written(kind)
    adapter = write_adapter(dense.folder, tmp_path, r=4)
    base = with_weights(dense.folder, written.meant)
    adapted = PeftModel.from_pretrained(base, adapter.path).eval()
    request = GenerateRequest("r", random_prompt(9), driver_greedy(16), adapter_folder=adapter)
    result = run(make_engine(written.folder), [request])["r", 0]
    assert result.token_ids == generate(adapted, request.prompt_token_ids, 16)


@pytest.mark.parametrize("kind", ["gptq", "awq", "gptq rows"])
def test_a_module_in_another_shard_than_its_scales_is_read(
    kind: str, dense: Tiny, make_written: MakeWritten, tmp_path: Path
) -> None:
    written = make_written(kind)
    tensors = load_file(written.folder / "model.safetensors")
    shutil.copy(written.folder / "config.json", tmp_path)
    weight_map: dict[str, str] = {}
    for i in range(3):
        keys = list(tensors)[i::3]
        save_file({key: tensors[key] for key in keys}, tmp_path / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(keys, f"model-{i}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_model(tmp_path, with_weights(dense.folder, written.meant))


# ==== Refusals ====


def _set_state(tensors: Tensors, name: str, value: Any) -> None:
    key = f"{UP}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | {name: value}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _state(name: str, value: Any) -> Callable[[Tensors], None]:
    return lambda tensors: _set_state(tensors, name, value)


def _drop(suffix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{UP}.{suffix}"]

    return change


def _put(suffix: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{UP}.{suffix}": value})


def _fill(suffix: str, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.{suffix}"].view(-1)[-1] = value

    return change


def _convert(suffix: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.{suffix}"] = tensors[f"{UP}.{suffix}"].to(dtype)

    return change


def _cut(suffix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.{suffix}"] = tensors[f"{UP}.{suffix}"][:-1]

    return change


BROKEN_BNB = [
    ("nf4", _drop("weight.absmax"), r"lacks .*up_proj\.weight\.absmax"),
    ("nf4", _drop("weight.quant_map"), r"lacks .*up_proj\.weight\.quant_map"),
    ("nf4", _drop("weight.quant_state.bitsandbytes__nf4"), r"lacks .*quant_state"),
    ("nf4", _drop("weight"), r"lacks .*up_proj\.weight "),
    ("nested", _drop("weight.nested_absmax"), r"lacks .*up_proj\.weight\.nested_absmax"),
    ("nested", _drop("weight.nested_quant_map"), r"lacks .*nested_quant_map"),
    ("nf4", _cut("weight"), r"up_proj\.weight has shape \[4095, 1\].*\[4096, 1\]"),
    ("nf4", _cut("weight.absmax"), r"absmax has shape \[127\].*\[128\]"),
    ("nf4", _convert("weight.absmax", torch.float16), r"absmax is torch\.float16"),
    ("nested", _convert("weight.absmax", torch.int32), r"absmax is torch\.int32"),
    ("nf4", _convert("weight", torch.int8), r"up_proj\.weight is torch\.int8"),
    ("nf4", _fill("weight.absmax", torch.nan), r"up_proj\.weight\.absmax holds .*not finite"),
    ("nested", _fill("weight.nested_quant_map", torch.inf), r"nested_quant_map .*not finite"),
    ("nested", _fill("weight.nested_absmax", torch.inf), r"nested_absmax .*not finite"),
    ("nf4", _fill("weight.quant_map", 0.5), r"quant_map is not the table of nf4"),
    ("nf4", _state("quant_type", "fp4"), r"quant_type='fp4'; it must be 'nf4'"),
    ("nf4", _state("shape", [64, 128]), r"shape=\[64, 128\]; it must be \[128, 64\]"),
    ("nf4", _state("blocksize", 0), r"blocksize=0"),
    ("nf4", _state("blocksize", 48), r"groups of 48"),
    ("nested", _state("nested_blocksize", "many"), r"nested_blocksize='many'"),
    ("nested", _state("nested_offset", None), r"nested_offset=None"),
    (
        "nf4",
        _put("weight.quant_state.bitsandbytes__nf4", torch.tensor([123], dtype=torch.uint8)),
        r"quant_state.* is not JSON",
    ),
    ("nf4", _put("weight.extra", torch.zeros(3)), r"weight\.extra is not a weight"),
    ("int8", _drop("SCB"), r"lacks .*up_proj\.SCB"),
    ("int8", _cut("SCB"), r"SCB has shape \[127\]"),
    ("int8", _convert("SCB", torch.float16), r"SCB is torch\.float16"),
    ("int8", _fill("SCB", torch.nan), r"SCB holds values that are not finite"),
    ("int8", _convert("weight", torch.uint8), r"up_proj\.weight is torch\.uint8"),
    ("int8", _put("weight_format", torch.tensor(1, dtype=torch.uint8)), r"weight_format is 1"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BROKEN_BNB)
def test_a_broken_bitsandbytes_checkpoint_is_refused_by_name(
    kind: str,
    change: Callable[[Tensors], None],
    message: str,
    make_bnb: MakeBnb,
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match=message):
        load(copy_changed(make_bnb(kind), tmp_path, change))


# for 64 inputs: two groups
UNEVEN = torch.tensor([0] * 33 + [1] * 31, dtype=torch.int32)
BROKEN_INT4 = [
    ("gptq", _drop("qzeros"), r"lacks .*up_proj\.qzeros"),
    ("gptq", _drop("qweight"), r"lacks .*up_proj\.qweight"),
    ("gptq in one order", _drop("g_idx"), r"lacks .*up_proj\.g_idx"),
    ("gptq", _cut("qweight"), r"qweight has shape \[7, 128\].*\[8, 128\]"),
    ("gptq", _cut("qzeros"), r"qzeros has shape \[1, 16\].*\[2, 16\]"),
    ("gptq", _cut("g_idx"), r"g_idx has shape \[63\].*\[64\]"),
    ("gptq", _convert("qweight", torch.int64), r"qweight is torch\.int64"),
    ("gptq", _convert("scales", torch.float64), r"scales is torch\.float64"),
    ("gptq", _fill("scales", torch.inf), r"scales holds values that are not finite"),
    ("gptq", _fill("g_idx", 2), r"g_idx names groups 0\.\.2, outside 0\.\.1"),
    ("gptq", _fill("g_idx", -1), r"g_idx names groups -1\.\.1, outside 0\.\.1"),
    ("gptq", _put("g_idx", UNEVEN), r"g_idx puts 33 inputs into group 0; it must be 32"),
    ("gptq", _put("weight", torch.zeros(128, 64)), r"up_proj\.weight is not a weight"),
    ("awq", _drop("scales"), r"lacks .*up_proj\.scales"),
    ("awq", _cut("qweight"), r"qweight has shape \[63, 16\].*\[64, 16\]"),
    ("awq", _cut("scales"), r"scales has shape \[1, 128\].*\[2, 128\]"),
    ("awq", _convert("qzeros", torch.int64), r"qzeros is torch\.int64"),
    ("awq", _fill("scales", torch.nan), r"scales holds values that are not finite"),
]


@pytest.mark.parametrize(("kind", "change", "message"), BROKEN_INT4)
def test_a_broken_gptq_or_awq_checkpoint_is_refused_by_name(
    kind: str,
    change: Callable[[Tensors], None],
    message: str,
    make_written: MakeWritten,
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError, match=message):
        load(copy_changed(make_written(kind).folder, tmp_path, change))


@pytest.mark.parametrize("kept_share", [0.01, 0.5, 0.999])
def test_a_truncated_quantized_file_is_refused(
    kept_share: float, make_bnb: MakeBnb, tmp_path: Path
) -> None:
    folder = copy_changed(make_bnb("nf4"), tmp_path, lambda tensors: None)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept_share)])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load(folder)


def test_a_quantized_head_is_refused(make_written: MakeWritten, tmp_path: Path) -> None:
    def quantize_head(tensors: Tensors) -> None:
        tensors["lm_head.qweight"] = tensors[f"{UP}.qweight"].clone()

    with pytest.raises(ModelError, match=r"lm_head\.qweight is part of a quantized lm_head"):
        load(copy_changed(make_written("gptq").folder, tmp_path, quantize_head))


GPTQ_KEYS = [
    ("quant_method", "aqlm", "one of bitsandbytes, gptq, awq"),
    ("quant_method", ..., "quant_method is missing"),
    ("bits", 8, r"bits=8 is not supported; it must be 4"),
    ("bits", 3, r"bits=3 is not supported"),
    ("bits", ..., "bits is missing"),
    ("group_size", 48, r"group_size=48 is not supported; .* multiple of 32"),
    ("group_size", 0, r"group_size=0"),
    ("group_size", 128, r"qweight has groups of 128 inputs.* the 64 input features"),
    ("checkpoint_format", "marlin", r"checkpoint_format='marlin' is not supported"),
    ("desc_act", "yes", r"desc_act='yes'"),
    ("lm_head", True, r"lm_head=True is not supported"),
    ("pack_dtype", "int8", r"pack_dtype='int8' is not supported"),
    ("dynamic", {"+:.*": {"bits": 8}}, r"dynamic=.* is not supported"),
    ("secret", 1, r"secret=1 is not supported"),
]


@pytest.mark.parametrize(("key", "value", "message"), GPTQ_KEYS)
def test_an_unsupported_gptq_config_is_refused(
    key: str, value: Any, message: str, make_written: MakeWritten, tmp_path: Path
) -> None:
    folder = copy_changed(make_written("gptq").folder, tmp_path, lambda tensors: None)
    change_config(folder, **{key: value})
    with pytest.raises(ModelError, match=message):
        load(folder)


AWQ_KEYS = [
    ("version", "gemv", r"version='gemv' is not supported; it must be 'gemm'"),
    ("bits", 8, r"bits=8"),
    ("zero_point", False, r"zero_point=False"),
    ("group_size", -1, r"group_size=-1"),
    ("group_size", 40, r"group_size=40"),
    ("modules_to_not_convert", "lm_head", r"modules_to_not_convert='lm_head'"),
    ("do_fuse", True, r"do_fuse=True"),
]


@pytest.mark.parametrize(("key", "value", "message"), AWQ_KEYS)
def test_an_unsupported_awq_config_is_refused(
    key: str, value: Any, message: str, make_written: MakeWritten, tmp_path: Path
) -> None:
    folder = copy_changed(make_written("awq").folder, tmp_path, lambda tensors: None)
    change_config(folder, **{key: value})
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_fp4_is_refused(make_bnb: MakeBnb) -> None:
    with pytest.raises(ModelError, match=r"bnb_4bit_quant_type='fp4' is not supported"):
        load(make_bnb("fp4"))


BNB_KEYS = [
    ("load_in_8bit", True, r"load_in_8bit=True .*opposite of load_in_4bit"),
    ("bnb_4bit_quant_storage", "bfloat16", r"bnb_4bit_quant_storage='bfloat16'"),
    ("bnb_4bit_new_idea", True, r"bnb_4bit_new_idea=True"),
]


@pytest.mark.parametrize(("key", "value", "message"), BNB_KEYS)
def test_an_unsupported_bitsandbytes_config_is_refused(
    key: str, value: Any, message: str, make_bnb: MakeBnb, tmp_path: Path
) -> None:
    folder = copy_changed(make_bnb("nf4"), tmp_path, lambda tensors: None)
    change_config(folder, **{key: value})
    with pytest.raises(ModelError, match=message):
        read_spec(folder, None)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_checkpoint_is_not_quantized_again(
    quantization: str, make_written: MakeWritten
) -> None:
    folder = make_written("gptq").folder
    message = rf"quantization='{quantization}' cannot be applied .*\(gptq\); it must be 'none'"
    with pytest.raises(ModelError, match=message):
        load_decoder(
            folder, torch_build(CPU, torch.float32), max_model_len=8, quantization=quantization
        )
    with pytest.raises(ModelError, match=message):
        settle(EngineConfig(str(folder), quantization=quantization, device="cpu"), arena_bytes)


def test_activations_of_a_four_bit_checkpoint_are_int8(
    make_bnb: MakeBnb, make_written: MakeWritten
) -> None:
    for folder, form in ((make_bnb("nf4"), "nf4"), (make_written("awq").folder, "int4")):
        config = EngineConfig(str(folder), dtype="bfloat16", device="cpu")
        settled = settle(config, arena_bytes)
        assert (settled.weight_format, settled.activations) == (form, "int8")


# ==== The plan ====


@pytest.mark.parametrize("kind", [*FORMATS, "nf4", "nested", "int8", "mixed"])
def test_the_plan_counts_the_bytes_that_are_loaded(
    kind: str, make_bnb: MakeBnb, make_written: MakeWritten
) -> None:
    folder = make_written(kind).folder if kind in FORMATS else make_bnb(kind)
    size = arithmetic.read_model_size(folder)
    loaded = weight_bytes(load(folder, size.dtype), size.dtype)
    assert arithmetic.weight_bytes(size, size.form) == loaded


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_weights_quantized_at_load(
    quantization: str, dtype: torch.dtype, tiny_model: MakeTiny
) -> None:
    folder = tiny_model("llama", dtype=dtype, **WIDE).folder
    decoder = load_decoder(
        folder, torch_build(CPU, dtype), max_model_len=8, quantization=quantization
    )
    size = arithmetic.read_model_size(folder, quantization)
    assert arithmetic.weight_bytes(size, size.form) == weight_bytes(decoder, dtype)
    assert (size.form in arithmetic.FORMATS) == (dtype == torch.bfloat16)


GIVEN = ["--bandwidth", "10", "--flops", "0.1"]


def test_the_report_says_how_a_quantized_model_is_served(
    make_written: MakeWritten, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_written("gptq").folder
    assert main(["plan", str(folder), "--context", "100", *GIVEN]) == 0
    text = capsys.readouterr().out
    size = arithmetic.read_model_size(folder)
    (line,) = [line for line in text.splitlines() if "how the engine serves it" in line]
    assert line.startswith("  as stored")
    assert f"{arithmetic.weight_bytes(size, size.form):,} bytes" in line
    assert main(["plan", str(folder), "--quantization", "nf4", *GIVEN]) == 2
    assert "already quantized (gptq)" in capsys.readouterr().err


def test_the_report_counts_int8_keys_and_values(
    tiny_model: MakeTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model("llama", dtype=torch.bfloat16, **WIDE).folder
    arguments = ["plan", str(folder), "--context", "100", *GIVEN, "--quantization", "nf4"]
    assert main([*arguments, "--kv-dtype", "int8"]) == 0
    text = capsys.readouterr().out
    assert "2 x 3 x 2 x (16 + 4) = 240 bytes" in text
    assert "  nf4 " in text and "Decode step floor in nf4" in text
    wide = tiny_model("llama", **WIDE).folder
    assert main(["plan", str(wide), "--context", "100", *GIVEN, "--kv-dtype", "int8"]) == 2
    assert "only for bfloat16" in capsys.readouterr().err
