"""Tests the fused decoder with adapters that change norms, embedding and output layer.

Each row must be that of a plain decoder whose own weights were changed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.assembly import adapter_packer
from engine.backends.cuda.bank import DeviceAdapterBank
from engine.backends.cuda.head import with_head_site
from engine.backends.cuda.places import norm_name, places_of
from engine.backends.cuda.streams import HostDevice
from engine.backends.cuda.triton.lora_work import SLOTS_AT
from engine.backends.cuda.weight_ops import cuda_build
from engine.backends.torch.bank import AdapterBank
from engine.lora.overlay import Overlay
from engine.lora.weights import AdapterLoadError, LoraWeights
from engine.model.decoder import Decoder
from engine.model.layers import RmsNorm
from tests.engine.cuda.adapters import launched, load_all, make_bank
from tests.engine.cuda.test_fused_decoder import (
    DEVICE,
    NUM_ROWS,
    OUTPUTS,
    REQUESTS,
    Batch,
    batch_of,
    close,
    expected_of,
    found_of,
    load,
    mixed,
    random_adapter,
    specification,
)
from tests.engine.support.tiny import Tiny

MakeTiny = Callable[..., Tiny]
F32 = torch.float32
MORE = 3  # ids of adapter 2 that the base does not have
FEWER = 4  # ids of the base that adapter 1 does not have


def random_overlay(
    vocab_size: int, width: int, seed: int, *, rank: int, more: int, is_head: bool
) -> Overlay:
    """Change half of the ids, those beyond the base's included, add factors, scale and shift."""
    generator = torch.Generator().manual_seed(seed)
    total = vocab_size + more
    ids = torch.arange(0, min(vocab_size, total), 2)
    ids = torch.cat([ids, torch.arange(vocab_size, max(vocab_size, total))])
    rows = torch.randn(len(ids), width, generator=generator)
    a, b = torch.randn(total, rank, generator=generator), torch.randn(rank, width)
    factors = (b * 0.1, a.T.contiguous()) if is_head else (a * 0.1, b)
    scale = torch.rand(total if is_head else width, generator=generator) + 0.5
    shift = torch.randn(total, generator=generator) if is_head and more < 0 else None
    return Overlay(ids, rows, factors if rank else None, total, scale, shift)


def changed_adapters(decoder: Decoder) -> dict[int, LoraWeights]:
    """Make one that lacks some ids of the base, and one that has more."""
    vocab_size, width = decoder.embedding.shape
    norms = [leaf for leaf in decoder.modules() if isinstance(leaf, RmsNorm)]
    of_norms = [{norm_name(n): torch.rand(n.width) + 0.5 for n in norms[i::2]} for i in (0, 1)]
    made: dict[int, LoraWeights] = {}
    for slot, norms_of, rank, more in ((1, of_norms[0], 3, -FEWER), (2, of_norms[1], 5, MORE)):
        embedding, head = (
            random_overlay(vocab_size, width, slot, rank=rank, more=more, is_head=is_head)
            for is_head in (False, True)
        )
        plain = random_adapter(decoder.lora_sites, slot, F32)
        made[slot] = replace(plain, norms=norms_of, embedding=embedding, head=head)
    return made


def changed_decoder(folder: Path, weights: LoraWeights) -> Decoder:
    """Load the plain decoder and change its weights as the adapter says."""
    decoder = load(folder, specification())
    for leaf in decoder.modules():
        if isinstance(leaf, RmsNorm) and norm_name(leaf) in weights.norms:
            leaf.weight = weights.norms[norm_name(leaf)].to(DEVICE)
    matrix = decoder.embedding.weight
    own, head = weights.embedding, weights.head
    assert own is not None and own.factors is not None and own.scale is not None
    a, b = own.factors
    decoder.embedding.weight = changed_matrix(matrix, own) * own.scale + (a @ b).to(DEVICE)
    assert head is not None and head.factors is not None and head.scale is not None
    a, b = head.factors
    decoder.head.tie(changed_matrix(matrix, head) * head.scale[:, None] + (b.T @ a).to(DEVICE))
    multiply, shift = decoder.head.multiply, 0.0 if head.shift is None else head.shift
    decoder.head.multiply = lambda hidden: multiply(hidden) + shift
    return decoder


def changed_matrix(matrix: Tensor, overlay: Overlay) -> Tensor:
    changed = matrix.new_zeros(overlay.vocab_size, matrix.shape[1])
    shared = min(overlay.vocab_size, len(matrix))
    changed[:shared] = matrix[:shared]
    changed[overlay.ids.to(DEVICE)] = overlay.rows.to(DEVICE)
    return changed


def bank_of(decoder: Decoder, adapters: dict[int, LoraWeights]) -> DeviceAdapterBank:
    bank = make_bank(places_of(decoder), F32, max_rows=16)
    vocab_size = decoder.spec.vocab_size
    load_all(bank, {slot: with_head_site(w, vocab_size) for slot, w in adapters.items()})
    return bank


def with_new_ids(batch: Batch, vocab_size: int) -> Batch:
    """Give rows of adapter 2 ids that only it has, and no row one that adapter 1 lacks."""
    token_ids = batch.token_ids.clamp(max=vocab_size - FEWER - 1)
    token_ids[1], token_ids[5] = vocab_size + 1, vocab_size + MORE - 1
    return replace(batch, token_ids=token_ids)


FAMILIES = {
    "gemma3_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 8.0,
    },
    "granite": {},
}


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", pytest.param("granite", marks=pytest.mark.slow)]
)
def test_each_row_has_its_adapters_norms_embedding_and_output_layer(
    model_type: str, tiny_model: MakeTiny
) -> None:
    changes = FAMILIES[model_type] | {"tie_word_embeddings": True}
    folder = tiny_model(model_type, **changes).folder
    decoder = load(folder, cuda_build(DEVICE, F32))
    adapters, vocab_size = changed_adapters(decoder), decoder.spec.vocab_size
    bank, old = bank_of(decoder, adapters), batch_of(REQUESTS)
    batch = with_new_ids(old, vocab_size)
    old = replace(old, token_ids=old.token_ids.clamp(max=vocab_size - FEWER - 1))
    counts_and_slots = [(count, slot) for count, _, slot in REQUESTS]
    slots = [slot for count, slot in counts_and_slots for _ in range(count)]

    found, _ = found_of(decoder, batch, num_padding=1, lora=launched(bank, [*slots, 0]))
    cut, _ = found_of(
        decoder,
        batch,
        lora=launched(bank, slots),
        output_rows=torch.tensor(OUTPUTS, device=DEVICE),
        output_lora=launched(bank, [slots[row] for row in OUTPUTS]),
    )
    head = bank.head(slots)
    assert head is not None
    logits = head.logits(found[:NUM_ROWS], decoder.head)
    plain = AdapterBank(DEVICE)
    for slot, weights in adapters.items():
        plain.load(slot, LoraWeights(weights.digest, weights.sites, 0))
    lora = mixed(plain, counts_and_slots)
    for slot in (0, 1, 2):
        rows = [row for row in range(NUM_ROWS) if slots[row] == slot]
        changed = load(folder, specification())
        if slot:
            changed = changed_decoder(folder, adapters[slot])
        expected, _ = expected_of(changed, batch if slot == 2 else old, lora)
        close(found[rows], expected[rows], 1e-4)
        outputs = [i for i, row in enumerate(OUTPUTS) if slots[row] == slot]
        close(cut[outputs], expected[[OUTPUTS[i] for i in outputs]], 1e-4)
        own = changed.logits(expected[rows])
        close(logits[rows][:, : own.shape[1]], own, 1e-3)
        assert (logits[rows][:, own.shape[1] :] == -torch.inf).all()


def test_rows_without_such_an_adapter_have_the_bases_output_layer(tiny_model: MakeTiny) -> None:
    decoder = load(tiny_model("llama").folder, cuda_build(DEVICE, F32))
    plain = random_adapter(decoder.lora_sites, 3, F32)
    bank = bank_of(decoder, changed_adapters(decoder) | {3: plain})
    assert bank.head([3, 0, 3]) is None
    assert bank.plan([3, 0, 1])[SLOTS_AT] and not bank.plan([3, 0, 3])[SLOTS_AT]


def test_changes_that_do_not_fit_the_model_are_refused(tiny_model: MakeTiny) -> None:
    decoder = load(tiny_model("llama").folder, cuda_build(DEVICE, F32))
    pack = adapter_packer(HostDevice(), decoder, 8)
    weights = changed_adapters(decoder)[1]
    name, norm = next(iter(weights.norms.items()))
    for norms, reason in (
        ({name: norm[:-1]}, "of 63 values; the model's has 64"),
        ({"model.layers.9.input_layernorm": norm}, "of 64 values; the model's has no such norm"),
    ):
        with pytest.raises(AdapterLoadError, match=reason):
            pack(replace(weights, norms=norms))
    tall = replace(changed_adapters(decoder)[2], norms={})
    assert tall.head is not None
    shifted = replace(tall.head, shift=torch.ones(tall.head.vocab_size))
    with pytest.raises(AdapterLoadError, match="lora_bias on the output layer and more token ids"):
        pack(replace(tall, head=shifted))
    narrow = Overlay(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 63), None, 5)
    with pytest.raises(AdapterLoadError, match="vectors of 63 values; only 64 are allowed"):
        pack(replace(weights, embedding=narrow))
