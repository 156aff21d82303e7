"""Tests that no kernel is compiled while requests are served.

All variants that random traffic launches were launched before, by the capture of graphs or by the
warm-up, and every kernel in a graph was compiled before its capture began. Kernels do nothing here,
so the text is random; the launches do not depend on it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends.cuda.adapter_copies import PackedAdapter
from engine.backends.cuda.assembly import AdapterLimits, adapter_packer, make_triton_runner
from engine.backends.cuda.checks import is_interpreting
from engine.backends.cuda.forward import StepLimits
from engine.backends.cuda.runner import DeviceRunner
from engine.backends.cuda.streams import HostDevice, Replay
from engine.backends.cuda.triton import weight_only
from engine.backends.cuda.triton.crossovers import Choice, Shape, unmeasured
from engine.backends.cuda.triton.packed_weight import PackedWeight
from engine.backends.cuda.weight_ops import cuda_build
from engine.lora.load import load_lora
from engine.lora.overlay import Overlay
from engine.lora.weights import LoraWeights
from engine.model.decoder import Decoder
from engine.model.loader import load_decoder
from engine.scheduler.batch import ScheduledBatch, ScheduledRequest
from engine.scheduler.request import SamplingParams
from engine.scheduler.token_rules import token_biases
from tests.engine.cuda.launches import Launches
from tests.engine.support.driver import write_adapter
from tests.engine.support.fp8 import dequantized_mm
from tests.engine.support.generations import loads_at_the_end
from tests.engine.support.tiny import Tiny

MakeTiny = Callable[..., Tiny]
CPU = torch.device("cpu")
PROCESSORS = 24  # so few that small batches split keys, but large ones do not
BLOCK_SIZE, MAX_LEN = 16, 512
LIMITS = StepLimits(20, 600, MAX_LEN, BLOCK_SIZE)
ARENA_BYTES = 2**24
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(seed=3),
    SamplingParams(temperature=0.0, prompt_logprobs=1),
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(top_p=0.9, repetition_penalty=1.1),
)
pytestmark = pytest.mark.skipif(not is_interpreting(), reason="needs Triton's interpreter")


@dataclass(frozen=True)
class Model:
    model_type: str
    quantization: str = "none"
    dtype: torch.dtype = torch.float16
    uses_graphs: bool = True


MODELS = {
    "llama": Model("llama"),
    "llama without graphs": Model("llama", uses_graphs=False),
    "qwen2 in nf4": Model("qwen2", "nf4", uses_graphs=False),
    "gemma2 in int8": Model("gemma2", "int8"),
    "qwen3 in fp8": Model("qwen3", "fp8", torch.bfloat16, uses_graphs=False),
}


class Capturing(HostDevice):
    """Records variants that were launched for the first time during a capture."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches, self.known, self.late = launches, set[Any](), set[Any]()

    def capture(self, work: Callable[[], None]) -> Replay:
        self.known |= self.launches.take()
        replay = super().capture(work)
        self.late |= self.launches.take() - self.known
        return replay


def as_on_a_card(
    weight: PackedWeight, device: torch.device, dtype: torch.dtype
) -> tuple[Choice, ...]:
    shape = Shape(weight.format, weight.out_features, weight.in_features)
    return unmeasured(shape, weight.blocks, PROCESSORS)


def make(
    model: Model, folder: Path, adapters: Path, launches: Launches
) -> tuple[DeviceRunner, Capturing]:
    device = Capturing(launches)
    decoder = load_decoder(
        folder,
        cuda_build(CPU, model.dtype, fp8_multiply=dequantized_mm),
        max_model_len=MAX_LEN,
        quantization=model.quantization,
    )
    packed: dict[str, PackedAdapter] = {}
    runner = make_triton_runner(
        device,
        decoder,
        torch.zeros(ARENA_BYTES, dtype=torch.uint8),
        LIMITS,
        AdapterLimits(max_slots=3, max_lora_rank=16),
        packed.__getitem__,
        uses_graphs=model.uses_graphs,
    ).runner
    runner.warm_up()
    runner._adapters._table.warm_up()
    pack = adapter_packer(device, decoder, 16)
    for seed in (1, 2):
        written = write_adapter(folder, adapters / str(seed), seed, r=4 * seed)
        weights = load_lora(written, decoder.lora_sites, model.dtype)
        if seed == 2:
            weights = with_output_layer(weights, decoder)
        adapter = pack(weights)
        packed[adapter.extent.digest] = adapter
    loads = loads_at_the_end(packed.values(), (1, 2), ARENA_BYTES)
    runner.launch(ScheduledBatch((), adapter_loads=loads)).result()
    assert list(runner.arrived()) == list(packed)
    return runner, device


def with_output_layer(weights: LoraWeights, decoder: Decoder) -> LoraWeights:
    """Add factors, a row, and an id that the base does not have."""
    matrix, vocab_size = decoder.embedding.weight, decoder.spec.vocab_size
    factors = matrix.new_zeros(4, matrix.shape[1]), matrix.new_zeros(4, vocab_size + 1)
    ids = torch.tensor([7, vocab_size])
    head = Overlay(ids, matrix.new_zeros(2, matrix.shape[1]), factors, vocab_size + 1)
    return replace(weights, head=head)


def random_batch(dice: random.Random) -> ScheduledBatch:
    """Draw decodes, chunks or both, of all sizes up to the limits, often small."""
    most = dice.choice((1, 2, LIMITS.max_num_seqs))
    rows = dice.choice((most, 40, 70, 200, LIMITS.max_num_batched_tokens))
    has_adapters, requests = dice.random() < 0.5, list[ScheduledRequest]()
    for _ in range(dice.randint(1, most)):
        count = min(rows, dice.choice((1, 1, 2, 20, dice.randint(1, 600))), MAX_LEN)
        if not count:
            break
        rows -= count
        start = dice.choice((0, dice.randint(0, MAX_LEN - count)))
        sampling = dice.choice(SAMPLINGS)
        request = ScheduledRequest(
            request_id=str(len(requests)),
            choice=0,
            token_ids=[5] * count,
            start=start,
            block_table=tuple(range(-(-(start + count) // BLOCK_SIZE))),
            adapter_slot=dice.randint(0, 2) if has_adapters else 0,
            sampling=sampling,
            samples=dice.random() < 0.8,
            history=([3], [4]) if sampling.uses_penalties else None,
            prompt_targets=[7] * count if sampling.prompt_logprobs else None,
            biases=token_biases(sampling.logit_bias),
        )
        requests.append(request)
    return ScheduledBatch(tuple(sorted(requests, key=lambda r: len(r.token_ids))))


@pytest.mark.parametrize("name", MODELS)
def test_traffic_launches_only_kernels_that_the_warm_up_compiled(
    name: str, tiny_model: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, launches = MODELS[name], Launches(monkeypatch, PROCESSORS)
    monkeypatch.setattr(weight_only, "_choices", as_on_a_card)
    folder = tiny_model(
        model.model_type,
        intermediate_size=128,
        num_hidden_layers=2,
        max_position_embeddings=MAX_LEN,
    ).folder
    runner, device = make(model, folder, tmp_path, launches)
    compiled = device.known | launches.take()
    assert not device.late, "compiled while a graph was captured"
    dice = random.Random(name)
    for _ in range(60):
        runner.launch(random_batch(dice)).result()
    new = launches.take() - compiled
    assert not new, "\n".join(str(variant) for variant in sorted(new, key=str))
