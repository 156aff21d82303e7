"""Tests the whole runner on Triton kernels, in the interpreter, with a tiny model and adapters.

test_triton_engine tests it on a GPU, where copies are asynchronous, driven by the engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends.cuda.adapter_copies import PackedAdapter
from engine.backends.cuda.assembly import AdapterLimits, adapter_packer, make_triton_runner
from engine.backends.cuda.checks import is_interpreting
from engine.backends.cuda.forward import StepLimits
from engine.backends.cuda.runner import DeviceRunner
from engine.backends.cuda.streams import HostDevice
from engine.backends.cuda.weight_ops import cuda_build
from engine.backends.torch.ops import torch_build
from engine.lora.load import load_lora
from engine.lora.weights import AdapterLoadError, LoraWeights
from engine.model.decoder import Decoder
from engine.model.layers import Build
from engine.model.loader import load_decoder
from engine.scheduler.batch import AdapterLoad, AdapterMove, ScheduledBatch
from engine.scheduler.request import SamplingParams
from tests.engine.support.driver import write_adapter
from tests.engine.support.generations import (
    Generation,
    drive,
    expected,
    generations_of,
    greedy,
    loads_at_the_end,
)
from tests.engine.support.tiny import Tiny

MakeTiny = Callable[..., Tiny]
CPU = torch.device("cpu")
BLOCK_SIZE = 16
LIMITS = StepLimits(3, 40, 64, BLOCK_SIZE)
ARENA_BYTES = 2**20
pytestmark = pytest.mark.skipif(not is_interpreting(), reason="needs Triton's interpreter")
SAMPLINGS = [greedy(4), SamplingParams(max_tokens=5, seed=3, top_p=0.9), greedy(4, logprobs=2)]


@pytest.fixture(scope="module")
def folder(tiny_model: MakeTiny) -> Path:
    return tiny_model("llama", num_hidden_layers=1).folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Decoder:
    return load(folder, torch_build(CPU, torch.float32))


@pytest.fixture(scope="module")
def adapters(
    folder: Path, plain: Decoder, tmp_path_factory: pytest.TempPathFactory
) -> list[LoraWeights]:
    root = tmp_path_factory.mktemp("adapters")
    configs: list[dict[str, Any]] = [{"r": 4}, {"r": 12, "target_modules": ["k_proj", "up_proj"]}]
    folders = [write_adapter(folder, root / str(i), i, **c) for i, c in enumerate(configs)]
    return [load_lora(adapter, plain.lora_sites, torch.float32) for adapter in folders]


def load(folder: Path, build: Build) -> Decoder:
    return load_decoder(folder, build, max_model_len=64)


class LateBeside(HostDevice):
    """Runs side-stream work only when it is waited for."""

    def beside(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


def make(
    folder: Path,
    adapters: Sequence[LoraWeights],
    limits: StepLimits,
    *,
    uses_graphs: bool,
    lora_side_stream: bool = False,
) -> tuple[DeviceRunner, list[PackedAdapter]]:
    packed: dict[str, PackedAdapter] = {}
    decoder = load(folder, cuda_build(CPU, torch.float32))
    made = make_triton_runner(
        LateBeside(),
        decoder,
        torch.zeros(ARENA_BYTES, dtype=torch.uint8),
        limits,
        AdapterLimits(max_slots=3, max_lora_rank=12),
        packed.__getitem__,
        uses_graphs=uses_graphs,
        lora_side_stream=lora_side_stream,
    )
    assert bool(made.graphs.num_graphs) == uses_graphs
    pack = adapter_packer(HostDevice(), decoder, 12)
    packed |= {weights.digest: pack(weights) for weights in adapters}
    return made.runner, list(packed.values())


def check(plain: Decoder, adapters: list[LoraWeights], generations: list[Generation]) -> None:
    for g in generations:
        tokens = expected(plain, g, adapters[g.slot - 1] if g.slot else None)
        assert g.output == [token.token_id for token in tokens]


@pytest.fixture(scope="module")
def captured(folder: Path, adapters: list[LoraWeights]) -> DeviceRunner:
    return with_adapters(folder, adapters, uses_graphs=True, lora_side_stream=True)


def with_adapters(folder: Path, adapters: list[LoraWeights], **options: bool) -> DeviceRunner:
    runner, packed = make(folder, adapters, LIMITS, **options)
    loads = loads_at_the_end(packed, (1, 2), ARENA_BYTES)
    runner.launch(ScheduledBatch((), adapter_loads=loads)).result()
    assert list(runner.arrived()) == [adapter.extent.digest for adapter in packed]
    return runner


TRAFFIC = {"distinct": [1, 2, 0], "identical": [1, 1, 1], "none": [0, 0, 0]}


@pytest.mark.parametrize(("traffic", "depth"), [("distinct", 1), ("identical", 0), ("none", 1)])
def test_results_equal_those_of_each_request_alone(
    captured: DeviceRunner,
    plain: Decoder,
    adapters: list[LoraWeights],
    traffic: str,
    depth: int,
) -> None:
    """Replay graphs that were captured once, for any adapters."""
    generations = generations_of(SAMPLINGS, TRAFFIC[traffic], BLOCK_SIZE)
    drive(captured, generations, budget=LIMITS.max_num_batched_tokens, depth=depth, seed=2)
    check(plain, adapters, generations)


def test_an_adapter_of_too_high_a_rank_is_refused_when_it_is_read(
    folder: Path, plain: Decoder, tmp_path: Path
) -> None:
    adapter = write_adapter(folder, tmp_path / "large", r=13)
    weights = load_lora(adapter, plain.lora_sites, torch.float32)
    with pytest.raises(AdapterLoadError, match="12"):
        make(folder, [weights], LIMITS, uses_graphs=False)


def test_without_graphs_the_text_is_the_same(
    folder: Path, plain: Decoder, adapters: list[LoraWeights]
) -> None:
    runner = with_adapters(folder, adapters, uses_graphs=False)
    generations = generations_of(SAMPLINGS[:2], [2, 0], BLOCK_SIZE)
    drive(runner, generations, budget=LIMITS.max_num_batched_tokens, depth=1, seed=2)
    check(plain, adapters, generations)


def test_adapters_may_move_and_come_back_elsewhere(
    folder: Path, plain: Decoder, adapters: list[LoraWeights]
) -> None:
    runner, packed = make(folder, adapters, replace(LIMITS, max_num_seqs=1), uses_graphs=True)
    first, second = loads_at_the_end(packed, (1, 2), ARENA_BYTES)
    below = second.offset_bytes - first.nbytes
    moved = AdapterMove(1, below, first.nbytes)
    again = AdapterLoad(2, second.digest, first.offset_bytes, second.nbytes)
    batches = {
        0: ScheduledBatch((), adapter_loads=(first, second)),
        3: ScheduledBatch((), adapter_evictions=(2,), moves=(moved,), adapter_loads=(again,)),
    }
    generations = generations_of([greedy(6)], [1], BLOCK_SIZE)
    drive(runner, generations, budget=40, depth=1, between=batches.get)
    check(plain, adapters, generations)
    later = generations_of([greedy(3)], [2], BLOCK_SIZE)
    drive(runner, later, budget=40, depth=1)
    check(plain, adapters, later)
