"""Tests DeviceRunner against SyncRunner, with steps ahead, padding and replayed graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.forward import StepLimits
from engine.backends.cuda.inputs import StepInputs
from engine.backends.cuda.streams import HostDevice
from engine.backends.sampler import target_logprobs
from engine.backends.torch.ops import torch_build
from engine.lora.load import load_lora
from engine.lora.weights import LoraWeights
from engine.model.decoder import Decoder
from engine.model.inputs import LoraBatch
from engine.model.loader import load_decoder
from engine.scheduler.batch import (
    PENDING,
    AdapterLoad,
    AdapterMove,
    BlockCopy,
    ScheduledBatch,
    ScheduledRequest,
)
from engine.scheduler.request import SamplingParams
from tests.engine.support.driver import write_adapter
from tests.engine.support.generations import (
    drive,
    expected,
    generations_of,
    greedy,
    loads_at_the_end,
)
from tests.engine.support.plain_device import ARENA_BYTES, BLOCK_SIZE, make_plain, pack_all
from tests.engine.support.tiny import OneRequest, Tiny

MakeTiny = Callable[..., Tiny]


@pytest.fixture(scope="module")
def decoder(tiny_model: MakeTiny) -> Decoder:
    return load_decoder(
        tiny_model("llama").folder,
        torch_build(torch.device("cpu"), torch.float32),
        max_model_len=128,
    )


@pytest.fixture(scope="module")
def adapters(
    tiny_model: MakeTiny, decoder: Decoder, tmp_path_factory: pytest.TempPathFactory
) -> list[LoraWeights]:
    folder = tmp_path_factory.mktemp("adapters")
    configs: list[dict[str, Any]] = [{"r": 8}, {"r": 3, "target_modules": ["q_proj", "down_proj"]}]
    return [
        load_lora(
            write_adapter(tiny_model("llama").folder, folder / str(i), seed=i, **config),
            decoder.lora_sites,
            torch.float32,
        )
        for i, config in enumerate(configs)
    ]


MIXED = [
    greedy(9),
    SamplingParams(max_tokens=8, seed=5, top_p=0.8),
    greedy(7, repetition_penalty=1.5, frequency_penalty=0.4),
    SamplingParams(max_tokens=9, seed=6, presence_penalty=1.0, logprobs=3),
    greedy(10, logprobs=0),
    SamplingParams(max_tokens=6, seed=7, temperature=0.7, top_k=20, min_p=0.01),
    greedy(11, logit_bias=((7, 3.0),), logprobs=2),
]


@pytest.mark.parametrize("uses_graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("slots", [[0] * 7, [1] * 7, [1, 2, 0, 2, 1, 0, 2]], ids=str)
def test_results_equal_those_of_each_request_alone(
    decoder: Decoder, adapters: list[LoraWeights], uses_graphs: bool, depth: int, slots: list[int]
) -> None:
    packed = pack_all(adapters)
    runner = make_plain(decoder, packed.__getitem__, uses_graphs=uses_graphs)
    if not uses_graphs:
        runner.warm_up()  # must leave nothing behind
    generations = generations_of(MIXED, slots)
    loads = loads_at_the_end(packed.values(), (1, 2), ARENA_BYTES)
    runner.launch(ScheduledBatch((), adapter_loads=loads)).result()
    assert list(runner.arrived()) == [load.digest for load in loads]
    drive(runner, generations, budget=40, depth=depth, seed=depth)
    for s in generations:
        tokens = expected(decoder, s, adapters[s.slot - 1] if s.slot else None)
        assert s.output == [t.token_id for t in tokens]
        scored = [entry for result in s.results for entry in result.logprobs or ()]
        assert len(scored) == (0 if s.sampling.logprobs is None else len(tokens))
        for entry, token in zip(scored, tokens, strict=False):
            assert entry.logprob == pytest.approx(token.logprob, abs=1e-4)
            assert [i for i, _ in entry.top] == [i for i, _ in token.top]


def test_prompt_logprobs_are_those_of_all_rows(decoder: Decoder) -> None:
    samplings = [greedy(3, prompt_logprobs=2), greedy(4), greedy(2, prompt_logprobs=0)]
    generations = generations_of(samplings, [0] * 3)
    drive(make_plain(decoder, {}.__getitem__), generations, budget=9, depth=1, seed=3)
    for s in (generations[0], generations[2]):
        entries = [entry for result in s.results for entry in result.prompt_logprobs]
        with torch.inference_mode():
            logits = OneRequest(decoder).forward(s.prompt)
        scores = target_logprobs(logits[:-1], s.prompt[1:], s.sampling.prompt_logprobs or 0)
        assert [e.logprob for e in entries] == pytest.approx([v for v, _ in scores], abs=1e-4)
        assert [[i for i, _ in e.top] for e in entries] == [[i for i, _ in t] for _, t in scores]


def test_moved_and_reloaded_adapters_keep_their_requests_text(
    decoder: Decoder, adapters: list[LoraWeights]
) -> None:
    """Between steps, adapters are moved, evicted and loaded elsewhere, and blocks copied."""
    packed = pack_all(adapters)
    runner = make_plain(decoder, packed.__getitem__)
    first, second = loads_at_the_end(packed.values(), (1, 2), ARENA_BYTES)
    generations = generations_of([greedy(30)] * 3, [1, 1, 0])
    step = first.offset_bytes - 2**20
    moved = AdapterMove(1, step, first.nbytes)
    again = AdapterLoad(3, second.digest, second.offset_bytes - 4096, second.nbytes)

    def between(number: int) -> ScheduledBatch | None:
        if number == 0:
            return ScheduledBatch((), adapter_loads=(first, second))
        if number == 6:
            return ScheduledBatch((), moves=(moved,))
        if number == 8:  # another adapter overwrites the place
            return ScheduledBatch((), adapter_evictions=(2,), adapter_loads=(again,))
        if number in (10, 13):
            s = generations[2]
            old, new = s.blocks[0], 500 + number
            s.blocks = (new, *s.blocks[1:])
            return ScheduledBatch((), moves=(BlockCopy(old, 400), BlockCopy(400, new)))
        return None

    drive(runner, generations, budget=40, depth=1, seed=1, between=between)
    for s in generations:
        tokens = expected(decoder, s, adapters[0] if s.slot else None)
        assert s.output == [t.token_id for t in tokens]
    later = generations_of([greedy(5)], [3])
    drive(runner, later, budget=40, depth=1)
    assert later[0].output == [t.token_id for t in expected(decoder, later[0], adapters[1])]


def test_running_out_of_memory_ends_only_that_step(decoder: Decoder) -> None:
    class Small(HostDevice):
        released = 0

        def release_cached(self) -> None:
            self.released += 1

    device = Small()
    runner = make_plain(decoder, {}.__getitem__, device=device)
    model = runner._forward._model
    logits, failing = model.logits, True

    def out_of_memory(hidden: Tensor, head: None) -> Tensor:
        if failing:
            raise torch.OutOfMemoryError("no room for logits")
        return logits(hidden, head)

    model.logits = out_of_memory  # type: ignore[method-assign]
    generations = generations_of([greedy(5)] * 2, [0, 0])
    with pytest.raises(torch.OutOfMemoryError, match="no room for logits"):
        drive(runner, generations, budget=40, depth=1)
    assert device.released == 1
    failing = False
    again = generations_of([greedy(5)] * 2, [0, 0])
    drive(runner, again, budget=40, depth=1)
    assert [s.output for s in again] == [
        [t.token_id for t in expected(decoder, s, None)] for s in again
    ]


def test_warm_up_runs_few_and_many_requests(decoder: Decoder) -> None:
    """Both are needed, because attention uses different kernels for them."""
    runner = make_plain(decoder, {}.__getitem__, limits=StepLimits(8, 70, 128, BLOCK_SIZE))
    model, met = runner._forward._model, set[tuple[int, int, int, bool]]()
    forward = model.forward

    def noted(inputs: StepInputs, lora: LoraBatch | None, *others: Any, **options: Any) -> Tensor:
        rows, positions = len(inputs.token_ids), inputs.attention
        met.add((rows, positions.num_decodes, len(positions.tiles), lora is not None))
        return forward(inputs, lora, *others, **options)

    model.forward = noted  # type: ignore[method-assign]
    runner.warm_up()
    shapes = [(1, 1, 1), (17, 1, 1), (64, 1, 1), (70, 8, 70)]
    assert met == {(*shape, has_lora) for shape in shapes for has_lora in (True, False)}


def test_rows_with_a_lost_pending_token_do_not_affect_others(decoder: Decoder) -> None:
    """The previous step raised: its request still has a row, whose result is arbitrary."""
    runner = make_plain(decoder, {}.__getitem__)
    lost, fine = generations_of([greedy(5)] * 2, [0, 0])
    drive(runner, [fine], budget=40, depth=0)
    row = ScheduledRequest("lost", 0, [PENDING], 4, lost.blocks, 0, lost.sampling, True)
    again = generations_of([greedy(1)] * 2, [0, 0])[1]
    prompt = ScheduledRequest("1", 0, again.prompt, 0, again.blocks, 0, again.sampling, True)
    outputs = runner.launch(ScheduledBatch((row, prompt))).result()
    assert outputs[1].token_ids == fine.output[:1]
