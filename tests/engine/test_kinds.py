"""Tests what loading an adapter beyond A and B needs: the base's weights, refusals by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.lora.kinds import ALL_KINDS, Kind, check_kinds, kinds_of
from engine.lora.overlay import Overlay
from engine.lora.weights import AdapterLoadError, LoraWeights, SiteWeights
from engine.model.base_weights import BaseWeights
from engine.model.quantize import QUANTIZERS
from engine.model.quantized_weight import dequantize
from tests.engine.support.tiny import write_tiny

VOCAB_SIZE = 8


def overlay(vocab_size: int = VOCAB_SIZE) -> Overlay:
    return Overlay(torch.tensor([3]), torch.ones(1, 4), None, vocab_size)


def site(**affine: torch.Tensor) -> LoraWeights:
    return LoraWeights("d", {(0, "o"): SiteWeights(torch.empty(0, 4), (), **affine)}, 0)


EXAMPLES = {
    Kind.AFFINE: site(shift=torch.ones(4)),
    Kind.NORMS: LoraWeights("d", {}, 0, norms={"model.norm": torch.ones(4)}),
    Kind.EMBEDDING: LoraWeights("d", {}, 0, embedding=overlay()),
    Kind.HEAD: LoraWeights("d", {}, 0, head=overlay()),
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_adapter_of_a_kind_that_is_not_computed_is_refused_by_name(kind: Kind) -> None:
    check_kinds(EXAMPLES[kind], VOCAB_SIZE, {kind}, "some")
    with pytest.raises(
        AdapterLoadError, match=f"adapter d has {kind.value[:8]}.* the some kernels"
    ):
        check_kinds(EXAMPLES[kind], VOCAB_SIZE, ALL_KINDS - {kind}, "some")


def test_scales_alone_and_more_rows_than_the_base_has_are_kinds_too() -> None:
    assert kinds_of(site(scale=torch.ones(4)), VOCAB_SIZE) == {Kind.AFFINE}
    assert kinds_of(site(), VOCAB_SIZE) == set()
    wide = LoraWeights("d", {}, 0, head=overlay(VOCAB_SIZE + 1))
    assert kinds_of(wide, VOCAB_SIZE) == {Kind.HEAD, Kind.VOCABULARY}


def test_sizes_count_every_tensor() -> None:
    both = SiteWeights(torch.empty(0, 4), (), torch.ones(4), torch.ones(4))
    assert both.nbytes == 2 * 4 * 4
    factors = torch.ones(VOCAB_SIZE, 2), torch.ones(2, 4)
    changed = Overlay(torch.tensor([3]), torch.ones(1, 4), factors, VOCAB_SIZE)
    assert changed.nbytes == 8 + 16 + VOCAB_SIZE * 8 + 32


def test_weights_are_read_again_as_the_model_has_them(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen2", dtype=torch.float16).folder
    module = "model.layers.1.mlp.down_proj"
    stored = load_file(folder / "model.safetensors")
    weight, bias = stored[f"{module}.weight"], stored["model.layers.1.self_attn.q_proj.bias"]
    with BaseWeights(folder, "none", torch.bfloat16) as base:
        assert torch.equal(torch.cat([*base.rows(module, 64, 96)]), weight.bfloat16().float())
        assert base.bias(module, 64) is None
        found = base.bias("model.layers.1.self_attn.q_proj", 64)
        assert found is not None and torch.equal(found, bias.bfloat16().float())
    with BaseWeights(folder, "int8", torch.bfloat16) as base:
        expected = dequantize(QUANTIZERS["int8"](weight))
        assert torch.equal(torch.cat([*base.rows(module, 64, 96)]), expected)
