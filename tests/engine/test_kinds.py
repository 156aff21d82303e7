"""Tests that kernels refuse, by name, what they do not compute of an adapter."""

import pytest
import torch

from engine.lora.kinds import ALL_KINDS, Kind, check_kinds, kinds_of
from engine.lora.overlay import Overlay
from engine.lora.weights import AdapterLoadError, LoraWeights, SiteWeights

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
