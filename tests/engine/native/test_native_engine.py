"""Tests the engine on native kernels: accuracy, and independence of batch mates."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine.backends.native import load
from engine.backends.native.build import BuildError
from engine.backends.native.library import Context
from engine.config import ConfigError
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from engine.model.quantize import quantize_int8
from engine.model.quantized_weight import dequantize
from tests.engine.support.driver import (
    greedy,
    make_engine,
    mixed_requests,
    prompt_of,
    run,
    texts,
    write_mixed_adapters,
)
from tests.engine.support.pooling import all_of, expected, vectors
from tests.engine.support.tiny import MODEL_TYPES, Tiny, load_reference

VARIANTS = [
    {},
    {"max_num_batched_tokens": 16},
    {"max_num_batched_tokens": 23, "block_size": 32},
    {"max_num_seqs": 2},
    {"enable_prefix_caching": False},
    {"num_threads": 1},
    {"num_threads": 3},
]
FORMATS = [
    {},
    {"quantization": "int8"},
    {"quantization": "nf4"},
    {"quantization": "nf4", "activations": "bf16"},
    {"kv_dtype": "int8"},
]


@pytest.fixture(autouse=True)
def only_this_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "Context", partial(Context, isa))


def native_engine(folder: Path, **changes: Any) -> Engine:
    defaults = {"dtype": "bfloat16", "block_size": 16, "max_num_batched_tokens": 64}
    engine = make_engine(folder, **{**defaults, "num_threads": 2, **changes})
    assert engine.info.kernels.startswith("native-")
    return engine


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> list[AdapterFolder]:
    return write_mixed_adapters(tiny.folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Tiny]) -> Tiny:
    return tiny_model("qwen2", hidden_size=128, intermediate_size=192)


def mixed(adapters: list[AdapterFolder], max_tokens: int = 20) -> list[GenerateRequest]:
    return mixed_requests(adapters, max_tokens)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_results_do_not_depend_on_batch_mates_chunking_or_threads(
    tiny: Tiny, adapters: list[AdapterFolder], form: dict[str, str]
) -> None:
    alone: dict[tuple[str, int], list[int]] = {}
    for request in mixed(adapters):
        engine = native_engine(tiny.folder, enable_prefix_caching=False, **form)
        alone.update(texts(run(engine, [request])))
    for variant in VARIANTS:
        engine = native_engine(tiny.folder, **form, **variant)
        for _ in range(2):  # the second time with a warm prefix cache
            assert texts(run(engine, mixed(adapters))) == alone, variant


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_answers_go_on_elsewhere_with_the_same_tokens(
    tiny: Tiny, adapters: list[AdapterFolder], quantization: str
) -> None:
    """The output layer is int8 here, too; the replica that goes on has other threads and steps."""
    lost = native_engine(tiny.folder, quantization=quantization)
    assert lost.settled.output_layer == "int8"
    whole = texts(run(lost, mixed(adapters)))
    cuts = {request.request_id: 1 + i * 5 % 19 for i, request in enumerate(mixed(adapters))}
    moved = [
        replace(r, output_token_ids=whole[r.request_id, 0][: cuts[r.request_id]])
        for r in mixed(adapters)
    ]
    other = native_engine(
        tiny.folder, quantization=quantization, num_threads=1, max_num_batched_tokens=23
    )
    rest = texts(run(other, moved))
    assert rest == {key: tokens[cuts[key[0]] :] for key, tokens in whole.items()}


def test_preemption_changes_no_bit(tiny: Tiny, adapters: list[AdapterFolder]) -> None:
    roomy = native_engine(tiny.folder)
    expected = texts(run(roomy, mixed(adapters, 40)))
    block_bytes = 16 * 2 * 3 * 2 * 32 * 2  # positions, K and V, layers, heads, dim, bytes
    adapter_bytes = sum(roomy.host.get(a.digest).nbytes for a in adapters)
    memory_bytes = 12 * block_bytes + adapter_bytes
    small = native_engine(tiny.folder, memory_bytes=memory_bytes, max_model_len=128)
    run(small, mixed(adapters, 1))  # so that all adapters are there, and all requests run at once
    assert texts(run(small, mixed(adapters, 40))) == expected
    assert small.stats.total_preemptions > 0


def test_neither_chunks_nor_batch_mates_change_a_bit_of_a_pooled_vector(
    tiny: Tiny, adapters: list[AdapterFolder]
) -> None:
    requests = all_of(adapters)
    one_by_one = native_engine(tiny.folder, enable_prefix_caching=False, max_num_seqs=1)
    alone = {name: v.tobytes() for name, v in vectors(one_by_one, requests).items()}
    for variant in VARIANTS[1:3]:
        engine = native_engine(tiny.folder, **variant)
        found = vectors(engine, [*mixed(adapters), *requests])
        assert {name: v.tobytes() for name, v in found.items()} == alone, variant


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_pooled_vectors_are_as_accurate_as_torchs_bfloat16(
    model_type: str, tiny_model: Callable[..., Tiny]
) -> None:
    tiny = tiny_model(model_type)
    requests = all_of()

    def error(engine: Engine) -> float:
        found = vectors(engine, requests)
        errors = [found[r.request_id] - expected(tiny.reference, r) for r in requests]
        return float(np.sqrt(np.mean(np.square(errors))))

    native = error(native_engine(tiny.folder))
    by_torch = error(make_engine(tiny.folder, dtype="bfloat16", kernels="torch"))
    assert native < 1.25 * by_torch + 1e-3, (native, by_torch)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_of_every_family_are_as_accurate_as_torchs_bfloat16(
    model_type: str, tiny_model: Callable[..., Tiny]
) -> None:
    tiny = tiny_model(model_type)
    request = GenerateRequest("r", prompt_of(40), greedy(1, prompt_logprobs=1))
    assert_as_accurate_as_torch(tiny.folder, request, tiny.reference)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_logits_of_an_int8_output_layer_are_as_accurate_as_of_its_dequantized_weights(
    is_tied: bool, tiny_model: Callable[..., Tiny]
) -> None:
    tiny = tiny_model("gemma2", tie_word_embeddings=is_tied)
    request = GenerateRequest("r", prompt_of(40), greedy(1, prompt_logprobs=1))
    rounded = load_reference(tiny.folder, torch.float32)
    head = torch.nn.Parameter(dequantize(quantize_int8(rounded.lm_head.weight.bfloat16())))
    rounded.lm_head.weight = head.requires_grad_(False)  # the embedding's rows stay as they are
    assert_as_accurate_as_torch(tiny.folder, request, rounded, output_layer="int8")


def test_logits_of_an_adapter_that_acts_from_the_middle_on_are_as_accurate(
    tiny: Tiny, adapters: list[AdapterFolder]
) -> None:
    request = next(r for r in mixed(adapters) if r.adapter_folder == adapters[3])
    request = replace(request, sampling=greedy(1, prompt_logprobs=1))
    base = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, adapters[3].path).eval()
    assert_as_accurate_as_torch(tiny.folder, request, peft)


def assert_as_accurate_as_torch(
    folder: Path, request: GenerateRequest, reference: Any, **changes: Any
) -> None:
    prompt = request.prompt_token_ids
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([prompt])).logits[0].float()
    exact = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), prompt[1:]]

    def error(engine: Engine) -> float:
        last = run(engine, [request])[request.request_id, 0].last
        assert last is not None and last.prompt_logprobs is not None
        got = torch.tensor([entry.logprob for entry in last.prompt_logprobs[1:] if entry])
        return float((got - exact).square().mean().sqrt())

    native = error(native_engine(folder, **changes))
    by_torch = error(make_engine(folder, dtype="bfloat16", kernels="torch", **changes))
    assert native < 1.25 * by_torch + 1e-3, (native, by_torch)


def test_torch_computes_what_the_native_kernels_cannot(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tiny.folder, dtype="bfloat16", block_size=4)
    assert engine.info.kernels == "torch"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "computing with torch" in warning and "block_size 4: need a multiple of 16" in warning


def test_without_a_library_everything_works_and_one_warning_says_what_it_costs(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object, **__: object) -> Context:
        raise BuildError("no C++ compiler found (looked for g++, clang++, c++)")

    monkeypatch.setattr(load, "Context", no_compiler)
    engine = make_engine(tiny.folder, dtype="bfloat16", block_size=16, quantization="nf4")
    assert engine.info.kernels == "torch"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "two to five times as long" in warning and "no C++ compiler" in warning
    assert len(run(engine, [GenerateRequest("r", prompt_of(5), greedy(3))])["r", 0].token_ids) == 3
    with pytest.raises(ConfigError, match="kv_dtype='int8' needs the native kernels: no C"):
        make_engine(tiny.folder, dtype="bfloat16", block_size=16, kv_dtype="int8")
