"""Tests that a GPU's memory is divided before loading, or refused with figures."""

import re
from collections.abc import Callable

import pytest
import torch

from engine.backends.cuda.memory import Needs, _scratch_bytes, arena_bytes
from engine.backends.torch.ops import torch_build
from engine.config import ConfigError
from engine.model.loader import load_decoder
from engine.sizes import read_model_size
from tests.engine.support.tiny import Tiny

GIB = 2**30
NEEDS = Needs(weights=16 * GIB, buffers=GIB, reserve=3 * GIB)


def test_the_arena_is_the_remaining_memory() -> None:
    assert arena_bytes(80 * GIB, NEEDS, None, GIB, "") == 60 * GIB


def test_a_configured_arena_size_is_used_as_it_is() -> None:
    assert arena_bytes(80 * GIB, NEEDS, 48 * GIB, GIB, "") == 48 * GIB
    assert arena_bytes(80 * GIB, NEEDS, 60 * GIB, GIB, "") == 60 * GIB


def test_more_than_the_remaining_memory_is_refused_with_what_would_fit() -> None:
    with pytest.raises(ConfigError, match=r"memory_bytes=66571993088 needs 62\.00 GiB") as error:
        arena_bytes(80 * GIB, NEEDS, 62 * GIB, GIB, "")
    message = str(error.value)
    fits = re.search(r"memory_bytes=(\d+) would fit", message)
    assert fits and arena_bytes(80 * GIB, NEEDS, int(fits[1]), GIB, "") == 60 * GIB
    for figure in ("80.00 GiB free", "16.00 GiB", "1.00 GiB", "3.00 GiB"):
        assert figure in message


@pytest.mark.parametrize("asked", [None, GIB, 8 * GIB])
def test_a_model_too_large_for_the_device_is_refused_with_advice(asked: int | None) -> None:
    with pytest.raises(ConfigError, match=r"4\.00 GiB are missing: take quantization='nf4'"):
        arena_bytes(18 * GIB, NEEDS, asked, 2 * GIB, "take quantization='nf4'")


@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
def test_scratch_holds_the_largest_low_bit_layer(
    tiny_model: Callable[..., Tiny], quantization: str
) -> None:
    folder, dtype = tiny_model("llama").folder, torch.bfloat16
    decoder = load_decoder(folder, torch_build(torch.device("cpu"), dtype), max_model_len=64)
    largest = max(site.in_features * site.out_features for site in decoder.lora_sites)
    found = _scratch_bytes(read_model_size(folder, quantization), dtype)
    assert found == (2 * largest if quantization == "int8" else 0)
