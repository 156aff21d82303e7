"""Tests FP8: the codes, the layer against its dequantized weight, and refusals."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.backends.cuda.fp8 import Fp8Linear, check_fp8, scaled_mm
from engine.backends.cuda.weight_ops import cuda_build
from engine.backends.needs import arena_bytes
from engine.backends.torch.ops import torch_build
from engine.config import ConfigError, EngineConfig
from engine.model import fp8
from engine.model.fp8 import quantize_rows
from engine.model.loader import load_decoder
from engine.model.quantize import quantize_fp8
from engine.model.quantized_weight import dequantize, join
from engine.model.spec import ModelError
from engine.settle import settle
from tests.engine.support.fp8 import dequantized_mm
from tests.engine.support.tiny import Tiny, logits_in_chunks, random_prompt

MakeTiny = Callable[..., Tiny]
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ==== Codes ====


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_nearest_of_e4m3(dtype: torch.dtype) -> None:
    weight = normal(40, 96).to(dtype)
    found = quantize_fp8(weight)
    values = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).float()
    values = values[values.isfinite()]
    scaled = weight.float() / found.scales
    nearest = (scaled[..., None] - values).abs().amin(-1)
    error = (scaled - found.codes.float()).abs()
    assert (error <= nearest * (1 + 1e-5) + 1e-5).all()  # the division is rounded
    assert torch.equal(found.scales[:, 0], weight.float().abs().amax(1) / 448)
    assert found.codes.float().abs().amax(1).eq(448).all()


def test_rows_of_zeros_and_of_tiny_values_are_finite() -> None:
    x = torch.stack([torch.zeros(32), torch.full((32,), 1e-38), torch.full((32,), 3e38)])
    rows = quantize_rows(x)
    found = rows.codes.float() * rows.scales
    assert found.isfinite().all() and found[0].eq(0).all()
    torch.testing.assert_close(found[2], x[2])


# ==== The layer ====


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_multiplies_rounded_rows_by_the_dequantized_weight(has_bias: bool) -> None:
    x, dense, bias = normal(5, 64), normal(48, 64, seed=1), normal(48, seed=2)
    weight = quantize_fp8(dense)
    layer = Fp8Linear(weight, bias if has_bias else None, CPU, x.dtype, dequantized_mm)
    rows = quantize_rows(x)
    expected = (rows.codes.float() * rows.scales) @ dequantize(weight).T + bias * has_bias
    torch.testing.assert_close(layer(x), expected)
    out = torch.empty(5, 48)
    assert layer.rows_into(rows, out) is out
    torch.testing.assert_close(out, expected)
    exact = x @ dense.T + bias * has_bias
    assert (expected - exact).abs().max() < 0.1 * exact.abs().max()
    assert layer(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("has_bias", [False, True])
def test_torchs_multiplication_is_given_its_operands_in_order(has_bias: bool) -> None:
    """On a CPU torch supports the call too, slowly, with the same operands."""
    x, weight = normal(5, 64).bfloat16(), quantize_fp8(normal(48, 64, seed=1))
    bias = normal(48, seed=2) if has_bias else None
    layers = [Fp8Linear(weight, bias, CPU, x.dtype, mm) for mm in (scaled_mm, dequantized_mm)]
    found, expected = (layer(x).float() for layer in layers)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


def test_joined_slices_keep_their_scales() -> None:
    parts = [quantize_fp8(normal(16, 32, seed=i) * 10**i) for i in range(3)]
    expected = torch.cat([dequantize(part) for part in parts])
    assert torch.equal(dequantize(join(parts)), expected)


def test_unsupported_sizes_are_refused(tiny_model: MakeTiny) -> None:
    with pytest.raises(ValueError, match=r"\[48, 40\] in fp8: both must be multiples of 16"):
        Fp8Linear(quantize_fp8(normal(48, 40)), None, CPU, torch.bfloat16)
    folder = tiny_model("llama", intermediate_size=88).folder
    with pytest.raises(ModelError, match=r"down_proj .* 88 inputs and 64 outputs, .* 16; use"):
        load_decoder(folder, torch_build(CPU, torch.float32), max_model_len=64, quantization="fp8")


# ==== supported devices ====


def test_fp8_on_a_cpu_is_refused_with_alternatives(tiny_model: MakeTiny) -> None:
    folder = str(tiny_model("llama").folder)
    config = EngineConfig(folder, quantization="fp8", device="cpu", memory_bytes=2**22)
    expected = r"quantization='fp8'.* CUDA device of capability 8\.9 .*not cpu; use 'int8' or 'nf4'"
    with pytest.raises(ConfigError, match=expected):
        settle(config, arena_bytes)


def test_fp8_needs_a_gpu_of_sufficient_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"8\.9 or higher; a card has 8\.0; use 'nf4' or 'int8'"):
        check_fp8(gpu, torch.bfloat16)
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        check_fp8(gpu, torch.bfloat16)
    with pytest.raises(ValueError, match=r"in bfloat16, not torch\.float16; use dtype"):
        check_fp8(gpu, torch.float16)


def test_loading_for_a_device_without_fp8_is_refused(tiny_model: MakeTiny) -> None:
    folder = tiny_model("llama").folder
    with pytest.raises(ValueError, match=r"capability 8\.9"):
        load_decoder(folder, cuda_build(CPU, torch.bfloat16), max_model_len=64, quantization="fp8")


def test_a_model_in_fp8_is_more_accurate_than_in_nf4(tiny_model: MakeTiny) -> None:
    """Errors of weights and activations are about 3 % each, of nf4's weights alone 9 %."""
    folder, prompt = tiny_model("llama", intermediate_size=128).folder, random_prompt(9)
    plain = torch_build(CPU, torch.float32)
    fp8_ops = cuda_build(CPU, torch.float32, fp8_multiply=dequantized_mm).weight_ops
    builds = {"none": plain, "fp8": replace(plain, weight_ops=fp8_ops), "nf4": plain}
    exact, rounded, coarse = (
        logits_in_chunks(
            load_decoder(folder, build, max_model_len=64, quantization=kind), prompt, 9
        )
        for kind, build in builds.items()
    )
    assert 0 < (rounded - exact).square().mean() < 0.5 * (coarse - exact).square().mean()
