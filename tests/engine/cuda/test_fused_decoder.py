"""Tests FusedDecoder against Decoder with the reference ops: hidden states, logits and KV cache.

A batch has decodes, a prefill from the start, one that continues, and a row of padding; blocks are
scattered in a cache of random numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends.cuda.buffers import Rows
from engine.backends.cuda.decoder import FusedDecoder
from engine.backends.cuda.inputs import StepInputs
from engine.backends.cuda.layer import Beside, _Site
from engine.backends.cuda.memory import needs
from engine.backends.cuda.weight_ops import DenseLinear, cuda_build
from engine.backends.torch.bank import AdapterBank
from engine.lora.weights import LoraWeights, SiteWeights
from engine.model import reference
from engine.model.decoder import Decoder, DecoderLayer
from engine.model.inputs import AttentionInputs, ForwardInputs, LoraBatch
from engine.model.layers import Build, LoraSite, SideBySide
from engine.model.loader import load_decoder
from engine.model.reference import TORCH_OPS, WEIGHT_OPS
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.fp8 import dequantized_mm
from tests.engine.support.tiny import MODEL_TYPES, Tiny, random_prompt

MakeTiny = Callable[..., Tiny]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, NUM_BLOCKS, CAPACITY = 4, 40, 10

# (new tokens, context with them, adapter slot); decodes first
REQUESTS = [(1, 17, 1), (1, 9, 2), (2, 2, 0), (3, 14, 2)]
OUTPUTS = [0, 1, 3, 6]  # the last row of each request
NUM_ROWS = 7


@dataclass(frozen=True)
class Batch:
    """Inputs of one step, for both decoders."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionInputs


def batch_of(requests: Sequence[tuple[int, int, int]]) -> Batch:
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(NUM_BLOCKS, generator=generator)
    tables = order[: 8 * len(requests)].view(len(requests), 8)
    starts, positions, slots = [0], [], []
    for table, (count, context, _) in zip(tables, requests, strict=True):
        own = torch.arange(context - count, context)
        positions.append(own)
        slots.append(table[own // BLOCK_SIZE] * BLOCK_SIZE + own % BLOCK_SIZE)
        starts.append(starts[-1] + count)
    attention = AttentionInputs(
        num_decodes=sum(count == 1 for count, _, _ in requests),
        cu_seqlens_q=starts,
        context_lens=[context for _, context, _ in requests],
        block_tables=tables.to(DEVICE),
        slot_mapping=torch.cat(slots).to(DEVICE),
    )
    token_ids = torch.tensor(random_prompt(starts[-1]), device=DEVICE)
    return Batch(token_ids, torch.cat(positions).to(DEVICE), attention)


def random_cache(decoder: Decoder) -> torch.Tensor:
    spec, generator = decoder.spec, torch.Generator().manual_seed(11)
    shape = (NUM_BLOCKS, spec.num_layers, 2, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
    return torch.randn(shape, generator=generator).to(decoder.embedding.weight)


def attend_into(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    attention: AttentionInputs,
    *,
    out: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Run reference attention; padding after the last request becomes zeros."""
    num_rows = attention.cu_seqlens_q[-1]
    out[:num_rows] = reference.paged_attention(q[:num_rows], kv_layer, attention, **options)
    out[num_rows:] = 0
    return out


# ==== Adapters ====


def random_adapter(sites: Sequence[LoraSite], seed: int, dtype: torch.dtype) -> LoraWeights:
    """Make an adapter with every second slice of every site, at different ranks."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[int, str], SiteWeights] = {}
    for site in sites:
        expands, rank, out0 = [], 0, 0
        for i, part in enumerate(site.slices):
            if (i + seed) % 2 == 0:
                r = 2 + i
                b = torch.randn(r, part.out_features, generator=generator).mul(0.2).to(dtype)
                expands.append((rank, rank + r, out0, out0 + part.out_features, b))
                rank += r
            out0 += part.out_features
        if rank:
            a = torch.randn(rank, site.in_features, generator=generator).mul(0.2).to(dtype)
            found[site.layer, site.site] = SiteWeights(a, tuple(expands))
    return LoraWeights(f"adapter-{seed}", found, nbytes=1)


def adapters_of(decoder: Decoder) -> AdapterBank:
    bank, dtype = AdapterBank(DEVICE), decoder.embedding.weight.dtype
    for slot in (1, 2):
        bank.load(slot, random_adapter(decoder.lora_sites, slot, dtype))
    return bank


def mixed(bank: AdapterBank, counts_and_slots: Sequence[tuple[int, int]]) -> LoraBatch | None:
    requests = tuple(
        ScheduledRequest(str(i), 0, [0] * count, 0, (), slot, SamplingParams(), samples=True)
        for i, (count, slot) in enumerate(counts_and_slots)
    )
    return bank.batch(ScheduledBatch(requests))


TRAFFIC = {"none": [0, 0, 0, 0], "identical": [1, 1, 1, 1], "distinct": [1, 2, 0, 2]}


def with_slots(traffic: str) -> list[tuple[int, int, int]]:
    slots = TRAFFIC[traffic]
    return [
        (count, context, slot) for (count, context, _), slot in zip(REQUESTS, slots, strict=True)
    ]


# ==== Both decoders on one step ====


def load(folder: Path, build: Build, quantization: str = "none") -> Decoder:
    return load_decoder(folder, build, max_model_len=64, quantization=quantization)


def specification(dtype: torch.dtype = torch.float32) -> Build:
    return Build(WEIGHT_OPS, TORCH_OPS, dtype, DEVICE)


@torch.inference_mode()
def expected_of(
    decoder: Decoder, batch: Batch, lora: LoraBatch | None
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_cache = random_cache(decoder)
    inputs = ForwardInputs(batch.token_ids, batch.positions, batch.attention, lora)
    return decoder(inputs, kv_cache), kv_cache


@torch.inference_mode()
def found_of(
    decoder: Decoder,
    batch: Batch,
    num_padding: int = 0,
    beside: Beside | None = None,
    output_rows: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_cache = random_cache(decoder)
    fused = FusedDecoder(decoder, attend_into, kv_cache, CAPACITY, beside)
    padding = torch.zeros(num_padding, dtype=torch.int64, device=DEVICE)
    token_ids = torch.cat([batch.token_ids, padding])
    rows = token_ids if output_rows is None else output_rows
    inputs = step_inputs(
        token_ids,
        torch.cat([batch.positions, padding]),
        torch.cat([batch.attention.slot_mapping, padding - 1]),
        batch.attention,
        rows,
    )
    out = kv_cache.new_empty(len(rows), decoder.spec.hidden_size)
    return fused.forward(inputs, **options, out=out), kv_cache


def step_inputs(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    attention: AttentionInputs,
    output_rows: torch.Tensor,
) -> StepInputs:
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    return StepInputs(
        token_ids=token_ids.int(),
        sources=nothing,
        positions=positions.int(),
        slot_mapping=slot_mapping.int(),
        output_rows=output_rows,
        sample_rows=nothing,
        attention=attention,  # type: ignore[arg-type]  # what `attend_into` takes
        lora_words=nothing,
        output_lora_words=nothing,
    )


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=atol)


def test_a_step_equals_that_of_the_plain_decoder(tiny_model: MakeTiny) -> None:
    check_step(tiny_model("llama").folder, "none")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_step_with_adapters_equals_that_of_the_plain_decoder(
    model_type: str, tiny_model: MakeTiny
) -> None:
    check_step(tiny_model(model_type).folder, "distinct")


def check_step(folder: Path, traffic: str) -> None:
    requests, build = with_slots(traffic), cuda_build(DEVICE, torch.float32)
    plain, decoder = load(folder, specification()), load(folder, build)
    batch, bank = batch_of(requests), adapters_of(plain)
    lora = mixed(bank, [(count, slot) for count, _, slot in requests])
    hidden, kv_cache = expected_of(plain, batch, lora)
    found, found_cache = found_of(decoder, batch, num_padding=1, lora=of_first_rows(lora))
    close(found[:NUM_ROWS], hidden)
    close(found_cache, kv_cache)
    close(decoder.logits(found[:NUM_ROWS]), plain.logits(hidden), 1e-4)


def of_first_rows(lora: LoraBatch | None) -> LoraBatch | None:
    """Return the adapters of the first rows; padding has none."""

    class FirstRows:
        def add(self, layer: int, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
            assert lora is not None
            lora.add(layer, site, x[:NUM_ROWS], y[:NUM_ROWS])

    return None if lora is None else FirstRows()


def test_shrink_on_a_side_stream_ends_before_expand_and_changes_nothing(
    tiny_model: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run side-stream work as late as allowed: when it is waited for."""
    folder, build = tiny_model("llama").folder, cuda_build(DEVICE, torch.float32)
    decoder, batch = load(folder, build), batch_of(with_slots("distinct"))
    lora = mixed(adapters_of(decoder), [(count, slot) for count, _, slot in REQUESTS])
    assert lora is not None
    events: list[str] = []
    into = DenseLinear.into

    def noted_into(self: DenseLinear, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        events.append("base")
        return into(self, x, out)

    class InParts:
        def shrink(self, layer: int, site: str, x: torch.Tensor) -> None:
            events.append("shrink")
            self.x = x

        def expand(self, layer: int, site: str, y: torch.Tensor) -> None:
            events.append("expand")
            lora.add(layer, site, self.x, y)

    def beside(work: Callable[[], None]) -> Callable[[], None]:
        events.append("fork")
        return work

    expected, _ = found_of(decoder, batch, lora=lora)
    monkeypatch.setattr(DenseLinear, "into", noted_into)
    found, _ = found_of(decoder, batch, beside=beside, lora=InParts())
    assert torch.equal(found, expected)
    assert events == ["fork", "base", "shrink", "expand"] * len(decoder.lora_sites)
    del events[:]
    found_of(decoder, batch, beside=beside)
    assert events == ["base"] * len(decoder.lora_sites), "no adapter, nothing beside"


def test_a_concurrent_shrink_is_waited_for_if_the_base_layer_fails() -> None:
    waited: list[str] = []

    def out_of_memory(x: Rows, out: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no workspace")

    site = _Site(0, "o", out_of_memory, lambda work: lambda: waited.append("shrink"))
    x = torch.zeros(1, 4)
    with pytest.raises(torch.OutOfMemoryError, match="no workspace"):
        site(Rows(x, None), x, NoAdapters())
    assert waited == ["shrink"]


class NoAdapters:
    def add(self, layer: int, site: str, x: torch.Tensor, y: torch.Tensor) -> None:
        raise AssertionError("the base has failed")


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_buffers_have_the_size_that_was_reserved(tiny_model: MakeTiny, quantization: str) -> None:
    build = cuda_build(DEVICE, torch.float32, fp8_multiply=dequantized_mm)
    decoder = load(tiny_model("llama").folder, build, quantization=quantization)
    fused = FusedDecoder(decoder, attend_into, random_cache(decoder), CAPACITY)
    tensors = [getattr(fused._buffers, name) for name in fused._buffers.__slots__]
    nbytes = sum(part.nbytes for tensor in tensors for part in parts_of(tensor))
    nbytes += CAPACITY * decoder.spec.hidden_size * 4  # output of a forward pass
    is_fp8 = quantization == "fp8"
    kept = needs(0, decoder.spec, CAPACITY, 0, torch.float32, 0, is_fp8=is_fp8)
    assert kept.buffers == nbytes


def parts_of(buffer: torch.Tensor | Rows) -> list[torch.Tensor]:
    if isinstance(buffer, torch.Tensor):
        return [buffer]
    rounded = buffer.rounded
    return [buffer.wide, *([] if rounded is None else [rounded.codes, rounded.scales])]


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "part of each head turned": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "gelu, tied": ("llama", {"hidden_act": "gelu", "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_features_that_no_family_has_by_default(name: str, tiny_model: MakeTiny) -> None:
    model_type, changes = CHANGES[name]
    folder, batch = tiny_model(model_type, **changes).folder, batch_of(REQUESTS)
    plain, decoder = load(folder, specification()), load(folder, cuda_build(DEVICE, torch.float32))
    hidden, kv_cache = expected_of(plain, batch, None)
    found, found_cache = found_of(decoder, batch)
    close(found, hidden)
    close(found_cache, kv_cache)


@pytest.mark.parametrize(
    ("traffic", "is_cut"),
    [("none", True), ("identical", True), ("distinct", True), ("distinct", False)],
)
def test_output_rows_are_those_of_the_whole_batch(
    traffic: str, is_cut: bool, tiny_model: MakeTiny
) -> None:
    """Apply adapters of the last layer to the output rows alone, if given for those."""
    folder, requests = tiny_model("gemma2").folder, with_slots(traffic)
    decoder, batch = load(folder, cuda_build(DEVICE, torch.float32)), batch_of(requests)
    bank = adapters_of(decoder)
    lora = mixed(bank, [(count, slot) for count, _, slot in requests])
    output_lora = mixed(bank, [(1, slot) for _, _, slot in requests])
    hidden, kv_cache = found_of(decoder, batch, lora=lora)
    found, found_cache = found_of(
        decoder,
        batch,
        lora=lora,
        output_rows=torch.tensor(OUTPUTS, device=DEVICE),
        output_lora=output_lora if is_cut else None,
    )
    close(found, hidden[OUTPUTS])
    assert torch.equal(found_cache, kv_cache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_in_the_plain_decoder(
    dtype: torch.dtype, tiny_model: MakeTiny
) -> None:
    folder, batch = tiny_model("gemma3_text").folder, batch_of(REQUESTS)
    exact, _ = expected_of(load(folder, specification()), batch, None)
    plain, _ = expected_of(load(folder, specification(dtype)), batch, None)
    found, _ = found_of(load(folder, cuda_build(DEVICE, dtype)), batch)
    # The interpreter rounds to bfloat16 towards zero: twice the error of rounding
    allowed = (plain.float() - exact).abs().max() * (4 if dtype == torch.bfloat16 else 2)
    assert (found.float() - exact).abs().max() <= allowed


@torch.inference_mode()
def test_a_step_leaves_nothing_behind_for_the_next(tiny_model: MakeTiny) -> None:
    decoder = load(tiny_model("qwen3").folder, cuda_build(DEVICE, torch.float32))
    fused = FusedDecoder(decoder, attend_into, random_cache(decoder), CAPACITY)

    def run(requests: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        b = batch_of(requests)
        out = torch.empty(len(b.token_ids), decoder.spec.hidden_size, device=DEVICE)
        slots = b.attention.slot_mapping
        inputs = step_inputs(b.token_ids, b.positions, slots, b.attention, b.token_ids)
        return fused.forward(inputs, out=out)

    run(REQUESTS)
    found = run(REQUESTS[:2])
    close(found, found_of(decoder, batch_of(REQUESTS[:2]))[0])


def test_more_rows_than_the_capacity_are_refused(tiny_model: MakeTiny) -> None:
    decoder = load(tiny_model("llama").folder, cuda_build(DEVICE, torch.float32))
    with pytest.raises(AssertionError, match="11 rows, room for 10"):
        found_of(decoder, batch_of(REQUESTS), num_padding=4)


# ==== Linear layers ====


def test_separate_slices_write_their_own_columns(tiny_model: MakeTiny) -> None:
    folder, batch = tiny_model("qwen2").folder, batch_of(REQUESTS)
    decoder, whole = (load(folder, cuda_build(DEVICE, torch.float32)) for _ in range(2))
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        for linear in (layer.attention.qkv, layer.mlp.gate_up):
            joined = linear.multiply
            assert isinstance(joined, DenseLinear)
            cuts = [0, 16, joined.out_features]
            linear.multiply = SideBySide(tuple(columns(joined, *c) for c in pairwise(cuts)))
    close(found_of(decoder, batch)[0], found_of(whole, batch)[0])


def columns(linear: DenseLinear, start: int, stop: int) -> DenseLinear:
    bias = None if linear._bias is None else linear._bias[start:stop]
    return DenseLinear(linear._weight[:, start:stop].T, bias)


def test_fp8_layers_read_rows_that_the_kernels_rounded(tiny_model: MakeTiny) -> None:
    folder, batch = tiny_model("qwen2").folder, batch_of(REQUESTS)
    build = cuda_build(DEVICE, torch.float32, fp8_multiply=dequantized_mm)
    decoder = load(folder, build, quantization="fp8")
    bank = adapters_of(decoder)
    lora = mixed(bank, [(count, slot) for count, _, slot in REQUESTS])
    outputs = {
        "output_rows": torch.tensor(OUTPUTS, device=DEVICE),
        "output_lora": mixed(bank, [(1, slot) for _, _, slot in REQUESTS]),
    }
    expected, _ = expected_of(decoder, batch, lora)
    dense, _ = expected_of(load(folder, specification()), batch, lora)
    found, _ = found_of(decoder, batch, lora=lora)
    cut, _ = found_of(decoder, batch, lora=lora, **outputs)
    # A sum in another order may round an activation differently, by a sixteenth of it
    allowed = 0.1 * (expected - dense).abs().mean()
    assert (found - expected).abs().mean() < allowed
    assert (cut - expected[OUTPUTS]).abs().mean() < allowed
