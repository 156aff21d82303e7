"""Tests quantization at load.

Codes are compared with those of bitsandbytes, models with their dequantized weights in
transformers; loading must stay within its memory.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from deployments.config import load_config
from engine.announcer import Announcer
from engine.backends.needs import arena_bytes
from engine.backends.torch.ops import select_pack_linear, torch_build
from engine.config import ConfigError, EngineConfig
from engine.engine import Engine
from engine.messages import GenerateRequest
from engine.model import reference
from engine.model.decoder import Decoder
from engine.model.layers import Linear, SideBySide
from engine.model.loader import load_decoder, weight_bytes
from engine.model.quantize import (
    QUANTIZERS,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)
from engine.model.quantized_weight import (
    NF4_VALUES,
    QuantizedWeight,
    can_join,
    dequantize,
    dequantize_to,
    join,
    pack_pairs,
    unpack_pairs,
)
from engine.model.spec import ModelError, kv_bytes_per_token
from engine.settle import settle
from engine.sizes import read_model_size
from engine.sizes import weight_bytes as planned_bytes
from tests.engine.support.driver import generate, make_engine, run, write_adapter
from tests.engine.support.driver import greedy as driver_greedy
from tests.engine.support.tiny import (
    Tiny,
    greedy,
    load_reference,
    logits_in_chunks,
    random_prompt,
    reference_greedy,
    reference_logits,
    write_tiny,
)

MakeTiny = Callable[..., Tiny]
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = {"intermediate_size": 128}  # a multiple of a block


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ties() -> torch.Tensor:
    """Make blocks of scale 1 with values at, just below and just above every limit."""
    values = torch.tensor(NF4_VALUES)
    limits = (values[1:] + values[:-1]) / 2
    below = torch.nextafter(limits, torch.tensor(-torch.inf))
    above = torch.nextafter(limits, torch.tensor(torch.inf))
    return torch.cat([values, limits, below, above, torch.ones(3)]).view(1, 64)


WEIGHTS = {
    "normal": normal(130, 192),
    "uniform": torch.rand(70, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1,
    "one row": normal(1, 64),
    "longer than a chunk": normal(3, 64 * 5000),
    "constant": torch.full((4, 64), -0.37),
    "zeros": torch.zeros(4, 128),
    "a block of zeros": torch.cat([torch.zeros(2, 64), normal(2, 64)], 1),
    "denormal": normal(8, 64) * 1e-40,
    "almost denormal": normal(8, 64) * 1e-37,
    "large": normal(8, 64) * 1e4,
    "ties": torch.cat([ties(), -ties(), ties() * 0.125, ties() * 3]),
    "transposed": normal(128, 64).T,
}


# ==== Codes ====


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_nf4_codes_and_scales_are_those_of_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[kind].to(dtype)
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    found = quantize_nf4(weight)
    assert torch.equal(found.codes << 4 | found.codes >> 4, packed.view(found.codes.shape))
    assert torch.equal(found.scales.flatten(), state.absmax)


@pytest.mark.parametrize("kind", ["normal", "uniform", "large", "zeros"])
def test_nf4_dequantizes_as_in_bitsandbytes(kind: str) -> None:
    weight = WEIGHTS[kind]
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    found = dequantize(quantize_nf4(weight))
    assert torch.equal(found, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_int8_is_within_half_a_step_of_the_weight(kind: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[kind].to(dtype)
    found = quantize_int8(weight)
    assert found.codes.abs().max() <= 127
    # Half a step plus float32 rounding; steps below 1e-38 are not represented
    step = found.scales.clamp(min=1e-38)
    assert ((dequantize(found) - weight.float()).abs() <= step * 0.5001).all()
    assert torch.equal(found.scales[:, 0], weight.float().abs().amax(1) / 127)


def test_int8_codes_are_those_of_bitsandbytes() -> None:
    """bitsandbytes multiplies by 127 / max instead of dividing, so ties may round differently."""
    weight = normal(200, 256).half()
    codes, largest, _ = bnb.int8_vectorwise_quant(weight)
    found = quantize_int8(weight)
    assert torch.equal(found.scales[:, 0], largest.float() / 127)
    difference = (found.codes.int() - codes.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3


@pytest.mark.parametrize("kind", WEIGHTS)
def test_int4_is_nearly_as_exact_as_the_best_multipliers_of_the_rows_scale(kind: str) -> None:
    weight, found = WEIGHTS[kind].double(), quantize_int4(WEIGHTS[kind])
    blocks = weight.reshape(len(weight), -1, 32)
    scale = blocks.abs().amax((1, 2)) / 120
    torch.testing.assert_close(found.scales[:, 0].double(), scale, rtol=1e-6, atol=1e-44)
    errors = []
    for multiplier in range(-15, 16):
        size = (scale * multiplier)[:, None, None]
        steps = (blocks / size.where(size != 0, 1)).round().clamp(-8, 7)
        errors.append((steps * size - blocks).square().sum(-1))
    least = torch.stack(errors).amin(0).sum(1)
    error = (dequantize(found).double() - weight).square().sum(1)
    # steps below 1e-38 are not represented
    slack = 1e-10 * scale.square().sum() + blocks.numel() * 1e-75
    assert error.sum() <= 1.02 * least.sum() + slack


def test_int4_multipliers_and_their_codes_fit_into_int8() -> None:
    weight = normal(300, 192) * torch.logspace(-3, 3, 192)  # rows of very unequal groups
    found = quantize_int4(weight)
    assert found.multipliers is not None and found.multipliers.shape == (300, 6)
    assert found.multipliers.abs().max() == 15 and found.multipliers.abs().min() <= 1
    assert ((dequantize(found) - weight).abs().amax(1) <= weight.abs().amax(1) * 0.14).all()


@pytest.mark.parametrize("quantization", QUANTIZERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused(quantization: str, bad: float) -> None:
    weight = normal(5, 128)
    weight[3, 70] = bad
    with pytest.raises(ValueError, match="not finite"):
        QUANTIZERS[quantization](weight)


# ==== QuantizedWeight ====


def int4(out_features: int, in_features: int, seed: int = 0) -> QuantizedWeight:
    """Make random codes, scales and zeros, with an input order."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator)
    shape = (out_features, in_features // 32)
    return QuantizedWeight(
        "int4",
        pack_pairs(codes.to(torch.uint8)),
        torch.rand(shape, generator=generator),
        group_size=32,
        zeros=torch.randint(0, 16, shape, generator=generator).float(),
        input_order=torch.randperm(
            in_features, generator=torch.Generator().manual_seed(7), dtype=torch.int32
        ),
    )


KINDS = {
    "int8": quantize_int8(normal(9, 64)),
    "nf4": quantize_nf4(normal(9, 64)),
    "int4": int4(9, 64),
    "int4 without zeros": quantize_int4(normal(9, 64)),
    "fp8": quantize_fp8(normal(9, 64)),
}


def test_pairs_are_unpacked_as_they_were_packed() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32) % 16
    assert torch.equal(unpack_pairs(pack_pairs(codes)), codes)
    assert pack_pairs(torch.tensor([[1, 2]], dtype=torch.uint8)).item() == 0x21


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_joins_are_rows_of_the_dequantized_weight(kind: str) -> None:
    weight = KINDS[kind]
    whole = dequantize(weight)
    assert torch.equal(dequantize(weight.rows(slice(2, 5))), whole[2:5])
    parts = [weight.rows(slice(0, 4)), weight.rows(slice(4, 9))]
    assert can_join(*parts)
    assert torch.equal(dequantize(join(parts)), whole)
    assert weight.nbytes == sum(
        t.nbytes
        for t in (
            *(weight.codes, weight.scales, weight.zeros),
            *(weight.input_order, weight.multipliers),
        )
        if t is not None
    )


def test_weights_that_differ_in_more_than_outputs_are_not_joined() -> None:
    other_order = int4(9, 64)
    assert other_order.input_order is not None
    other_order.input_order.copy_(other_order.input_order.flip(0))
    others = [*KINDS.values(), other_order, quantize_nf4(normal(9, 128))]
    for i, a in enumerate(others):
        assert [can_join(a, b) for b in others] == [i == j for j in range(len(others))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_multiply_by_the_dequantized_weight(kind: str, dtype: torch.dtype) -> None:
    x, bias, weight = normal(3, 64).to(dtype), normal(9).to(dtype), KINDS[kind]
    expected = x.float() @ dequantize(weight).T + bias.float()
    # bfloat16 rounds the result, and the torch path the weight too: 2^-9 of |x| |w| each
    slack = 1e-5 if dtype == torch.float32 else 2**-7
    atol = slack * float((x.float().abs() @ dequantize(weight).abs().T).max())
    for pack in (reference.pack_linear, select_pack_linear(CPU, dtype)):
        torch.testing.assert_close(pack(weight, bias)(x).float(), expected, rtol=0.0, atol=atol)


def test_dequantizing_in_chunks_gives_the_same_weight() -> None:
    weight = quantize_nf4(WEIGHTS["longer than a chunk"])
    whole = dequantize(weight)
    assert torch.equal(dequantize_to(weight, torch.float32, CPU), whole)
    assert torch.equal(dequantize_to(weight, torch.bfloat16, CPU), whole.bfloat16())


# ==== Loading ====


def load(
    folder: Path, quantization: str, dtype: torch.dtype = torch.float32, **options: Any
) -> Decoder:
    return load_decoder(
        folder, torch_build(CPU, dtype), max_model_len=256, quantization=quantization, **options
    )


def dequantized_reference(tiny: Tiny, quantization: str) -> nn.Module:
    """Return transformers' model with dequantized weights in its linear layers."""
    model = load_reference(tiny.folder, torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(dequantize(QUANTIZERS[quantization](module.weight)))
    return model


@pytest.mark.parametrize("quantization", QUANTIZERS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_a_model_quantized_at_load_is_the_dequantized_one(
    model_type: str, quantization: str, tiny_model: MakeTiny
) -> None:
    """Cover separate modules, biases, and modules fused in the checkpoint."""
    tiny, prompt = tiny_model(model_type, **WIDE), random_prompt(11)
    decoder, oracle = load(tiny.folder, quantization), dequantized_reference(tiny, quantization)
    expected = reference_logits(oracle, prompt)
    torch.testing.assert_close(logits_in_chunks(decoder, prompt, 4), expected, rtol=0.0, atol=2e-4)
    assert greedy(decoder, prompt, 12) == reference_greedy(oracle, prompt, 12)
    plain = reference_logits(tiny.reference, prompt)
    assert (expected - plain).abs().max() > 1e-2  # quantization has an effect


def test_a_tied_head_stays_dense(tiny_model: MakeTiny) -> None:
    tiny, prompt = tiny_model("llama", tie_word_embeddings=True, **WIDE), random_prompt(7)
    expected = reference_logits(dequantized_reference(tiny, "nf4"), prompt)
    found = logits_in_chunks(load(tiny.folder, "nf4"), prompt, 7)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-4)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_an_output_layer_in_int8_is_the_dequantized_one_beside_the_embeddings_own_rows(
    is_tied: bool, tiny_model: MakeTiny
) -> None:
    tiny, prompt = tiny_model("llama", tie_word_embeddings=is_tied, **WIDE), random_prompt(7)
    decoder = load(tiny.folder, "nf4", output_layer="int8")
    oracle = dequantized_reference(tiny, "nf4")
    head = dequantize(quantize_int8(oracle.lm_head.weight))
    oracle.lm_head.weight = nn.Parameter(head, requires_grad=False)
    found = logits_in_chunks(decoder, prompt, 7)
    torch.testing.assert_close(found, reference_logits(oracle, prompt), rtol=0.0, atol=2e-4)
    dense = weight_bytes(load(tiny.folder, "nf4"), torch.bfloat16)
    replaced = 0 if is_tied else head.numel() * 2
    expected = dense - replaced + head.numel() + 4 * len(head)
    assert weight_bytes(decoder, torch.bfloat16) == expected
    size = read_model_size(tiny.folder, "nf4", "int8")
    form = replace(size.form, dtype=torch.bfloat16, output_layer="int8")
    assert planned_bytes(size, form) == expected


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_an_output_layer_that_is_not_finite_is_refused_by_name(
    is_tied: bool, tiny_model: MakeTiny, tmp_path: Path
) -> None:
    tiny = tiny_model("llama", tie_word_embeddings=is_tied)
    key = "model.embed_tokens.weight" if is_tied else "lm_head.weight"
    tensors = load_file(tiny.folder / "model.safetensors")
    tensors[key][3, 5] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(tiny.folder / "config.json", tmp_path)
    with pytest.raises(ModelError, match=rf"{key}.* not finite"):
        load(tmp_path, "none", output_layer="int8")


def test_an_adapter_adds_to_a_quantized_base(tiny_model: MakeTiny, tmp_path: Path) -> None:
    tiny = tiny_model("qwen2", **WIDE)
    adapter = write_adapter(tiny.folder, tmp_path, r=5)
    base = dequantized_reference(tiny, "nf4")
    adapted = PeftModel.from_pretrained(base, adapter.path).eval()
    request = GenerateRequest("r", random_prompt(9), driver_greedy(16), adapter_folder=adapter)
    result = run(make_engine(tiny.folder, quantization="nf4"), [request])["r", 0]
    assert result.token_ids == generate(adapted, request.prompt_token_ids, 16)


@pytest.mark.parametrize("quantization", QUANTIZERS)
def test_weight_bytes_are_those_of_codes_and_scales(
    quantization: str, tiny_model: MakeTiny
) -> None:
    tiny = tiny_model("qwen2", **WIDE)
    expected = 0
    for name, parameter in tiny.reference.named_parameters():
        if "layers" in name and parameter.dim() == 2:
            is_short = quantization in ("nf4", "int4")
            codes = parameter.numel() // 2 if is_short else parameter.numel()
            scales = parameter.numel() // 64 if quantization == "nf4" else len(parameter)
            multipliers = parameter.numel() // 32 if quantization == "int4" else 0
            expected += codes + 4 * scales + multipliers
        else:
            expected += 2 * parameter.numel()
    decoder = load(tiny.folder, quantization, torch.bfloat16)
    assert weight_bytes(decoder, torch.bfloat16) == expected


def test_progress_counts_every_weight(
    tiny_model: MakeTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_model("llama", **WIDE)
    capsys.readouterr()
    load(tiny.folder, "int8", announcer=Announcer(shows_bars=True))
    num_weights = len(list(tiny.reference.named_parameters()))
    assert f"{num_weights}/{num_weights}" in capsys.readouterr().err


def test_fused_modules_share_one_matrix(tiny_model: MakeTiny) -> None:
    decoder = load(tiny_model("llama", **WIDE).folder, "nf4")
    linears = [leaf for leaf in decoder.modules() if isinstance(leaf, Linear)]
    assert linears and not any(isinstance(leaf.multiply, SideBySide) for leaf in linears)


def test_four_bits_are_refused_if_blocks_would_straddle_rows(tiny_model: MakeTiny) -> None:
    for form, block in (("nf4", 64), ("int4", 32)):
        tiny = tiny_model("llama", intermediate_size=block + block // 2)
        message = rf"'{form}': .*layers\.0\.mlp\.down_proj has .* multiple of {block}"
        with pytest.raises(ModelError, match=message):
            load(tiny.folder, form)
    load(tiny.folder, "int8")


def test_a_weight_of_a_checkpoint_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path, **WIDE)
    path, key = tiny.folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors[key][5, 9] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.safetensors: .*1\.mlp\.up_proj.*not finite"):
        load(tmp_path, "nf4")


# ==== memory while loading ====

# Keeps the memory that an op for quantized weights would keep, and samples RssAnon, the process's
# own pages; the operating system can drop those of the mapped checkpoint if memory is needed.
WATCH = """
import sys, threading
from pathlib import Path
import torch
from engine.model import loader, reference
from engine.model.layers import Build
from engine.model.ops import WeightOps

folder, quantization = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
kept = []

def pack(weight, bias):
    kept.append(weight)
    return lambda x: x

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous_bytes())

weight_ops = WeightOps(pack, reference.WEIGHT_OPS.pack_head)
build = Build(weight_ops, reference.TORCH_OPS, torch.bfloat16, torch.device("cpu"))
loader.QUANTIZERS[quantization](torch.randn(64, 128))  # what a first call sets up is not counted
before = peak = anonymous_bytes()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
decoder = loader.load_decoder(folder, build, max_model_len=64, quantization=quantization)
after = anonymous_bytes()
done.set()
watcher.join()
assert any(hasattr(w, "codes") for w in kept)
print(peak - before, after - before, loader.weight_bytes(decoder, torch.bfloat16))
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers of 3.1 million values, in bfloat16: 50 MB."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 256,
    }
    folder = tmp_path_factory.mktemp("large")
    return write_tiny(folder, "llama", dtype=torch.bfloat16, **sizes).folder


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])  # nf4 is like int4
def test_loading_needs_little_more_memory_than_the_quantized_model(
    quantization: str, large_folder: Path
) -> None:
    command = [sys.executable, "-c", WATCH, str(large_folder), quantization]
    # Return freed memory at once: malloc would keep some megabytes, in varying amounts
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, after, weights = map(int, result.stdout.split())
    layer = 2 * (4 * 512 * 512 + 3 * 512 * 1280)
    assert weights < peak <= 1.3 * weights + layer
    assert after <= 1.1 * weights + 2**20


# ==== Settings ====


def config(folder: Path, **changes: object) -> EngineConfig:
    return EngineConfig(source=str(folder), memory_bytes=2**22, device="cpu", **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("quantization", "fp4"), ("activations", "fp8"), ("kv_dtype", "nf4")],
)
def test_an_unknown_value_is_refused_with_the_known_ones(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}='{value}' is not one of .*int8"):
        EngineConfig(source="model", **{name: value})


def test_the_config_file_reaches_the_engine() -> None:
    engine = {"activations": "int8", "kv_dtype": "int8"}
    model = {"id": "m", "source": "/m", "quantization": "nf4", "engine": engine}
    app = load_config({"models": [model]})
    found = app.engine_config(app.models[0])
    assert (found.quantization, found.activations, found.kv_dtype) == ("nf4", "int8", "int8")


def test_int8_activations_are_refused_if_no_weights_support_them(tiny_model: MakeTiny) -> None:
    folder = tiny_model("llama", **WIDE).folder
    for quantization in ("int8", "nf4"):
        settled = settle(config(folder, quantization=quantization, activations="int8"), arena_bytes)
        assert (settled.weight_format, settled.activations) == (quantization, "int8")
    with pytest.raises(ConfigError, match=r"activations='int8' .* not dense ones"):
        settle(config(folder, activations="int8"), arena_bytes)


@pytest.mark.parametrize(
    ("changes", "activations"),
    [
        ({"quantization": "nf4"}, "int8"),
        ({"quantization": "nf4", "activations": "bf16"}, "bf16"),
        ({"quantization": "nf4", "dtype": "float32"}, "bf16"),
        ({"quantization": "none"}, "bf16"),
    ],
    ids=["nf4", "exact", "float32", "dense"],
)
def test_activations_of_four_bits_are_int8_unless_they_are_to_be_exact(
    changes: dict[str, str], activations: str, tiny_model: MakeTiny
) -> None:
    folder = tiny_model("llama", **WIDE).folder
    settled = settle(config(folder, **{"dtype": "bfloat16", **changes}), arena_bytes)
    assert settled.activations == activations


def test_int8_kv_gives_room_for_more_tokens(tiny_model: MakeTiny) -> None:
    folder = tiny_model("llama", **WIDE).folder
    plain = settle(config(folder, dtype="bfloat16"), arena_bytes)
    small = settle(config(folder, dtype="bfloat16", kv_dtype="int8"), arena_bytes)
    assert (plain.kv_dtype, small.kv_dtype) == (torch.bfloat16, torch.int8)
    spec = plain.spec
    assert kv_bytes_per_token(spec, torch.int8) == 2 * 3 * 2 * (16 + 4)
    room = 2**22
    assert small.num_blocks == room // (16 * kv_bytes_per_token(spec, torch.int8))
    assert plain.num_blocks == room // (16 * 2 * 3 * 2 * 16 * 2)
    with pytest.raises(ConfigError, match=r"kv_dtype='int8' .*torch\.float32 on cpu"):
        settle(config(folder, dtype="float32", kv_dtype="int8"), arena_bytes)


def test_the_engine_serves_and_counts_quantized_weights(tiny_model: MakeTiny) -> None:
    folder = tiny_model("llama", **WIDE).folder
    engine = Engine(config(folder, quantization="nf4"))
    assert engine.info.weight_bytes == weight_bytes(load(folder, "nf4"), torch.float32)
    assert engine.info.weight_bytes < Engine(config(folder)).info.weight_bytes
