"""Tests the engine on Triton kernels: its text must equal that of transformers and peft.

On a GPU all tests run; in Triton's interpreter, which takes a second per step, one mixed batch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.config import ConfigError
from engine.engine import Engine
from engine.messages import AdapterFolder, GenerateRequest
from tests.engine.support.driver import (
    MIXED_LENGTHS,
    generate,
    greedy,
    make_engine,
    mixed_requests,
    prompt_of,
    run,
    texts,
    write_adapter,
    write_mixed_adapters,
)
from tests.engine.support.kinds import write_kind
from tests.engine.support.pooling import assert_close, pooled, vector_of, vectors
from tests.engine.support.tiny import MODEL_TYPES, VOCAB_SIZE, Tiny

MakeTiny = Callable[..., Tiny]
Texts = dict[tuple[str, int], list[int]]
BLOCK_BYTES = 16 * 2 * 3 * 2 * 32 * 4  # positions, K and V, layers, heads, dim, bytes
VARIANTS: list[dict[str, Any]] = [
    {},
    {"cuda_graphs": "off"},
    {"lora_side_stream": True},
    {"lora_side_stream": True, "cuda_graphs": "off"},
    {"max_num_batched_tokens": 23, "max_num_seqs": 8},
    {"max_num_seqs": 2},
    {"enable_prefix_caching": False},
]
gpu = pytest.mark.gpu


@pytest.fixture(scope="module")
def tiny(tiny_model: MakeTiny) -> Tiny:
    return tiny_model("qwen2", hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> list[AdapterFolder]:
    """Write the usual ones, and instead of one of them DoRA with biases."""
    folder = tmp_path_factory.mktemp("adapters")
    dora = write_kind(tiny.folder, folder / "dora", r=5, use_dora=True, bias="all")
    return [dora if i == 2 else a for i, a in enumerate(write_mixed_adapters(tiny.folder, folder))]


def triton_engine(folder: Path, **changes: Any) -> Engine:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = make_engine(
        folder, **{"device": device, "kernels": "triton", "block_size": 16, **changes}
    )
    assert engine.info.kernels == "triton"
    return engine


def mixed(adapters: list[AdapterFolder], max_tokens: int) -> list[GenerateRequest]:
    return mixed_requests(adapters, max_tokens, repetition_penalty=1.1)


def by_torch(tiny: Tiny, requests: list[GenerateRequest], **changes: Any) -> Texts:
    return texts(run(make_engine(tiny.folder, device="cpu", **changes), requests))


@pytest.mark.parametrize("new", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_mixed_batch_in_little_memory_gives_the_text_of_torch(
    tiny: Tiny, adapters: list[AdapterFolder], tmp_path: Path, new: int
) -> None:
    """One adapter changes the embedding, the output layer and a norm, and may add token ids."""
    more: dict[str, Any] = {"modules_to_save": ["norm"], "vocab_size": new and VOCAB_SIZE + new}
    more["trainable_token_indices"] = {"embed_tokens": [5, 6, VOCAB_SIZE - 1 + new]}
    changed = write_kind(tiny.folder, tmp_path / "a", target_modules=["lm_head", "k_proj"], **more)
    pooling = [pooled("mean", 3, adapters[0])]
    requests = [*mixed([adapters[0], changed, *adapters[2:]], 3)[:5], *pooling]
    engine = triton_engine(
        tiny.folder, max_num_seqs=4, max_model_len=96, memory_bytes=18 * BLOCK_BYTES
    )
    results = run(engine, requests)
    assert texts(results) == by_torch(tiny, requests)
    assert engine.runner.pipeline_depth == 1
    assert_close(
        {r.request_id: vector_of(results[r.request_id, 0].last) for r in pooling},
        vectors(make_engine(tiny.folder, device="cpu"), pooling),
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"block_size": 8}, "block_size=8 is not a multiple of 16"), ({"kernels": "triton"}, "")],
    ids=["block_size", "no interpreter"],
)
def test_explicit_triton_is_refused_if_it_is_not_supported(
    tiny: Tiny, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reason:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU, and no interpreter is needed")
        monkeypatch.delenv("TRITON_INTERPRET")
        reason = "needs a CUDA device, or TRITON_INTERPRET=1"
    with pytest.raises(ConfigError, match=reason):
        triton_engine(tiny.folder, **changes)


def test_reading_adapters_uses_one_thread_of_torch(tiny: Tiny) -> None:
    torch.set_num_threads(2)
    triton_engine(tiny.folder, max_num_seqs=1, cuda_graphs="off").close()
    assert torch.get_num_threads() == 1


def test_an_adapter_of_too_high_a_rank_ends_its_requests_with_the_reason(
    tiny: Tiny, tmp_path: Path
) -> None:
    large = write_adapter(tiny.folder, tmp_path / "large", r=257, target_modules=["q_proj"])
    request = GenerateRequest("r", prompt_of(3), greedy(1), adapter_folder=large)
    engine = triton_engine(tiny.folder, max_num_seqs=1, cuda_graphs="off")
    last = run(engine, [request])["r", 0].last
    assert last is not None and last.error is not None
    assert "lora_rank 257; at most 256" in last.error.message


# ==== on a GPU ====


@gpu
@pytest.mark.parametrize("cuda_graphs", ["auto", "off"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_text_of_every_family_is_that_of_transformers(
    model_type: str, cuda_graphs: str, tiny_model: MakeTiny
) -> None:
    tiny = tiny_model(model_type)
    prompts = [prompt_of(n, seed=n) for n in MIXED_LENGTHS]
    requests = [GenerateRequest(f"r{i}", p, greedy(24)) for i, p in enumerate(prompts)]
    found = texts(run(triton_engine(tiny.folder, cuda_graphs=cuda_graphs), requests))
    assert found == {(f"r{i}", 0): generate(tiny.reference, p, 24) for i, p in enumerate(prompts)}


@gpu
def test_each_adapters_text_is_that_of_peft(tiny: Tiny, adapters: list[AdapterFolder]) -> None:
    prompt = prompt_of(20)
    adapters = adapters[:3]  # peft does not merge the last one, which acts on a part of its tokens
    requests = [
        GenerateRequest(a.digest, prompt, greedy(24), adapter_folder=a)
        for a in adapters
        for _ in "x"
    ]
    found = texts(run(triton_engine(tiny.folder), requests))
    for adapter in adapters:
        base = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
        model: PreTrainedModel = PeftModel.from_pretrained(base, adapter.path).merge_and_unload()
        assert found[adapter.digest, 0] == generate(model, prompt, 24)


@gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nothing_that_the_scheduler_does_changes_the_text(
    tiny: Tiny, adapters: list[AdapterFolder], variant: dict[str, Any]
) -> None:
    requests = mixed(adapters, 20)
    expected = by_torch(tiny, requests)
    engine = triton_engine(tiny.folder, **variant)
    for _ in range(2):  # the second time with a warm prefix cache
        assert texts(run(engine, requests)) == expected


@gpu
@pytest.mark.parametrize("cuda_graphs", ["auto", "off"])
def test_preempted_requests_and_evicted_adapters_lose_nothing(
    tiny: Tiny, adapters: list[AdapterFolder], cuda_graphs: str
) -> None:
    requests = mixed(adapters, 40)
    engine = triton_engine(
        tiny.folder, max_model_len=128, memory_bytes=20 * BLOCK_BYTES, cuda_graphs=cuda_graphs
    )
    assert texts(run(engine, requests)) == by_torch(tiny, requests)
    assert engine.stats.total_preemptions > 0


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("changes", VARIANTS[:3], ids=str)
def test_no_launch_waits_for_the_device(
    tiny: Tiny, adapters: list[AdapterFolder], changes: dict[str, Any]
) -> None:
    """Torch raises if one of its operations would wait; that would end the step's requests."""
    engine = triton_engine(tiny.folder, **changes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(engine, mixed(adapters, 9))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [r.last.error for r in results.values() if r.last] == [None] * len(MIXED_LENGTHS)


@gpu
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_layers_have_the_text_of_dequantized_ones(
    tiny: Tiny, adapters: list[AdapterFolder], quantization: str
) -> None:
    requests = mixed(adapters, 20)
    found = texts(run(triton_engine(tiny.folder, quantization=quantization), requests))
    assert found == by_torch(tiny, requests, quantization=quantization)


@gpu
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp8"])
def test_in_bfloat16_graphs_and_batch_mates_change_little(
    tiny: Tiny, adapters: list[AdapterFolder], quantization: str
) -> None:
    """Compare logprobs of the prompt, which do not depend on sampled tokens."""
    requests = [
        GenerateRequest(
            f"r{n}", prompt_of(n, seed=n), greedy(1, prompt_logprobs=0), adapter_folder=a
        )
        for n, a in zip((17, 30, 41), [None, *adapters[:2]], strict=True)
    ]
    found, exact = (
        [
            entry.logprob
            for result in run(engine, requests).values()
            for entry in (result.last.prompt_logprobs if result.last else None) or []
            if entry
        ]
        for engine in (
            triton_engine(tiny.folder, dtype="bfloat16", quantization=quantization),
            make_engine(tiny.folder, dtype="float32"),
        )
    )
    error = (torch.tensor(found) - torch.tensor(exact)).square().mean().sqrt()
    assert len(found) == len(exact) and error < (0.1 if quantization == "none" else 0.8)
