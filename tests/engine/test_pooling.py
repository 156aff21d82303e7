"""Tests pooled hidden states against transformers and peft, beside running generations."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from engine.messages import AdapterFolder, GenerateRequest
from engine.scheduler.request import POOLINGS, InvalidRequest, SamplingParams
from tests.engine.support.driver import (
    finish,
    greedy,
    make_engine,
    prompt_of,
    run,
    texts,
    write_mixed_adapters,
)
from tests.engine.support.pooling import (
    LENGTHS,
    all_of,
    assert_close,
    expected,
    pooled,
    vector_of,
    vectors,
)
from tests.engine.support.tiny import Tiny, load_reference, write_tiny

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> list[AdapterFolder]:
    mixed = write_mixed_adapters(tiny.folder, tmp_path_factory.mktemp("adapters"))
    return mixed[:3]  # peft does not merge the last one, which acts on a part of its tokens


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_pooling_equals_transformers(model_type: str, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path, model_type)
    requests = all_of()
    got = vectors(make_engine(tiny.folder, max_num_batched_tokens=16), requests)
    assert_close(got, {r.request_id: expected(tiny.reference, r) for r in requests})


def test_distinct_adapters_of_one_batch_equal_peft(
    tiny: Tiny, adapters: list[AdapterFolder]
) -> None:
    requests = all_of(adapters)
    got = vectors(make_engine(tiny.folder, max_num_batched_tokens=48), requests)
    models: dict[AdapterFolder | None, Any] = {None: tiny.reference}
    for folder in adapters:
        model = load_reference(tiny.folder, torch.float32)
        models[folder] = PeftModel.from_pretrained(model, folder.path).merge_and_unload()
    wanted = {r.request_id: expected(models[r.adapter_folder], r) for r in requests}
    assert_close(got, wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 17, "block_size": 1},
        {"max_num_seqs": 2},
    ],
    ids=str,
)
def test_a_vector_depends_on_neither_chunks_nor_generations_beside_it(
    tiny: Tiny, adapters: list[AdapterFolder], changes: dict[str, Any]
) -> None:
    requests = all_of(adapters)
    alone = vectors(make_engine(tiny.folder, max_num_seqs=1), requests)
    words = [GenerateRequest(f"g{n}", prompt_of(n, seed=n), greedy(20)) for n in LENGTHS]
    mixed = [r for pair in zip(requests, [*words, *words], strict=False) for r in pair]
    mixed = list({r.request_id: r for r in [*mixed, *requests]}.values())
    engine = make_engine(tiny.folder, **changes)
    results = run(engine, mixed)
    assert_close({r.request_id: vector_of(results[r.request_id, 0].last) for r in requests}, alone)
    kept = {key: value for key, value in texts(results).items() if key[0].startswith("g")}
    assert kept == texts(run(make_engine(tiny.folder), words))
    assert engine.stats.num_blocks_used == 0 and not engine.results.holds_parts


def test_preemption_changes_no_vector(tiny: Tiny) -> None:
    bytes_per_token = 2 * 3 * 2 * 16 * 4
    requests = [pooled("mean", 61), pooled("last", 40), pooled("cls", 23)]
    words = [GenerateRequest(f"g{n}", prompt_of(n), greedy(40)) for n in (3, 4, 5)]
    alone = vectors(make_engine(tiny.folder, max_num_seqs=1), requests)
    engine = make_engine(
        tiny.folder,
        memory_bytes=72 * bytes_per_token,
        max_model_len=64,
        max_num_batched_tokens=16,
    )
    assert_close(vectors(engine, [*words, *requests]), alone)
    assert engine.stats.total_preemptions > 0


def test_cached_prefixes_are_read_where_the_last_token_is_enough(tiny: Tiny) -> None:
    engine = make_engine(tiny.folder)
    run(engine, [GenerateRequest("g", prompt_of(61, seed=61), greedy(1))])
    cached: dict[str, int] = {}
    for pooling in POOLINGS:
        request = pooled(pooling, 61)
        before = engine.stats.total_cached_tokens
        assert_close(
            vectors(engine, [request]), {request.request_id: expected(tiny.reference, request)}
        )
        cached[pooling] = engine.stats.total_cached_tokens - before
    assert cached == {"mean": 0, "cls": 0, "last": 60}


def test_what_pooling_has_computed_is_a_prefix_for_others(tiny: Tiny) -> None:
    engine = make_engine(tiny.folder)
    vectors(engine, [pooled("mean", 61)])
    again = GenerateRequest("g", prompt_of(61, seed=61), greedy(4))
    got = texts(run(engine, [again]))
    assert engine.stats.total_cached_tokens == 60
    assert got == texts(run(make_engine(tiny.folder), [again]))


def test_a_prompt_may_fill_the_context_and_not_more(tiny: Tiny) -> None:
    engine = make_engine(tiny.folder, max_model_len=61, max_num_batched_tokens=16)
    request = pooled("mean", 61)
    assert_close(
        vectors(engine, [request]), {request.request_id: expected(tiny.reference, request)}
    )
    with pytest.raises(InvalidRequest, match="62 tokens, and the context holds 61"):
        engine.add_request(pooled("last", 62))


@pytest.mark.parametrize(
    ("request_changes", "sampling", "message"),
    [
        ({"n": 2}, {}, "one choice"),
        ({"output_token_ids": [5]}, {}, "no output"),
        ({}, {"prompt_logprobs": 1}, "neither a grammar nor prompt_logprobs"),
    ],
)
def test_what_goes_with_no_pooling_is_refused(
    tiny: Tiny, request_changes: dict[str, Any], sampling: dict[str, Any], message: str
) -> None:
    request = replace(
        pooled("mean", 4, **request_changes), sampling=SamplingParams(pooling="mean", **sampling)
    )
    with pytest.raises(InvalidRequest, match=message):
        make_engine(tiny.folder).add_request(request)


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="pooling must be one of"):
        SamplingParams(pooling="max")


def test_an_aborted_request_leaves_nothing_behind(tiny: Tiny) -> None:
    engine = make_engine(tiny.folder, max_num_batched_tokens=16)
    engine.add_request(pooled("mean", 61))
    engine.step()
    assert engine.results.holds_parts
    engine.abort("mean61")
    assert not engine.results.holds_parts and engine.stats.num_blocks_used == 0
    assert [o.finish_reason for o in engine.step()] == ["abort"]
    finish(engine)


def test_states_that_are_not_finite_end_that_request_alone(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path)
    with torch.no_grad():
        tiny.reference.get_input_embeddings().weight[7] = torch.inf
    tiny.reference.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, enable_prefix_caching=False)
    bad = GenerateRequest("bad", [5, 7, 9], SamplingParams(pooling="mean"))
    good = GenerateRequest("good", [5, 8, 9], SamplingParams(pooling="mean"))
    results = run(engine, [bad, good])
    last = results["bad", 0].last
    assert last is not None and last.error is not None
    assert last.error.message == "the model gave hidden states that are not finite"
    assert vector_of(results["good", 0].last).shape == (64,)


def test_a_model_without_an_output_layer_and_its_adapter_equal_peft(tmp_path: Path) -> None:
    """As those of sentence-transformers are saved: no name begins with `model.`."""
    write_tiny(tmp_path / "whole", "qwen3", tie_word_embeddings=True)
    model = AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    model.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    (tmp_path / "bare/config.json").write_text(json.dumps(config))
    keys = load_file(tmp_path / "bare/model.safetensors")
    assert "embed_tokens.weight" in keys and not any(key.startswith("model.") for key in keys)
    request = pooled("last", 23)
    engine = make_engine(tmp_path / "bare")
    [plain] = vectors(engine, [request]).values()
    with torch.inference_mode():
        hidden = model(torch.tensor([request.prompt_token_ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(torch.tensor(plain), hidden, atol=1e-4, rtol=1e-4)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    tuned.save_pretrained(tmp_path / "adapter")
    folder = AdapterFolder("digest", str(tmp_path / "adapter"))
    [found] = vectors(engine, [replace(request, adapter_folder=folder)]).values()
    with torch.inference_mode():
        hidden = tuned(torch.tensor([request.prompt_token_ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(torch.tensor(found), hidden, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(torch.tensor(plain), hidden, atol=1e-2)
