"""Tests the linear layers of a device, with given outputs and in the plain decoder."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.backends.cuda.weight_ops import DenseHead, DenseLinear, cuda_build
from engine.backends.torch.ops import torch_build
from engine.model import reference
from engine.model.loader import load_decoder
from tests.engine.support.tiny import Tiny, logits_in_chunks, random_prompt

MakeTiny = Callable[..., Tiny]
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_dense_layer_writes_to_the_given_output(has_bias: bool, dtype: torch.dtype) -> None:
    x, weight = normal(5, 24, dtype=dtype), normal(9, 24, dtype=dtype, seed=1)
    bias = normal(9, dtype=dtype, seed=2) if has_bias else None
    expected = reference.pack_linear(weight, bias)(x)
    layer, slack = DenseLinear(weight, bias), 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(layer(x), expected, rtol=slack, atol=slack)
    wide = torch.full((5, 20), 7.0, dtype=dtype)
    layer.into(x, wide[:, 4:13])
    torch.testing.assert_close(wide[:, 4:13], expected, rtol=slack, atol=slack)
    assert wide[:, :4].eq(7).all() and wide[:, 13:].eq(7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_float32_and_may_be_overwritten(dtype: torch.dtype) -> None:
    x, head = normal(3, 24, dtype=dtype), DenseHead(normal(50, 24, dtype=dtype, seed=1))
    first = head(x)
    assert first.dtype == torch.float32
    kept = first.clone()
    head(x).zero_()
    assert torch.equal(first, kept)


def test_the_plain_decoder_runs_on_the_same_layers(tiny_model: MakeTiny) -> None:
    folder, prompt = tiny_model("qwen2").folder, random_prompt(9)
    plain, weight_ops = torch_build(CPU, torch.float32), cuda_build(CPU, torch.float32).weight_ops
    mixed = replace(plain, weight_ops=weight_ops)
    found, expected = (
        logits_in_chunks(load_decoder(folder, build, max_model_len=64), prompt, 4)
        for build in (mixed, plain)
    )
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)
