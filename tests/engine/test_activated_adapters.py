"""Tests activated LoRAs (aLoRA) in the engine against peft's generate and forward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine.messages import AdapterFolder, ErrorKind, GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.driver import (
    Result,
    finish,
    greedy,
    make_engine,
    prompt_of,
    run,
    texts,
    write_adapters,
)
from tests.engine.support.pooling import vector_of
from tests.engine.support.tiny import Tiny, write_tiny

CONTEXT = prompt_of(26, seed=1)
CALL, OTHER = [9, 8, 9], [7]
# "call" twice, so that the last one counts, overlapping itself; then tokens of its own
PROMPT = [*CONTEXT[:10], *CALL, *CONTEXT[10:], *CALL, 8, 9, *OTHER, 30, 31]
START = 10 + 3 + 16 + 2
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "call": {"r": 8, "alora_invocation_tokens": CALL, "task_type": "CAUSAL_LM"},
    "other": {"r": 3, "alora_invocation_tokens": OTHER, "task_type": "CAUSAL_LM"},
    "absent": {"r": 8, "alora_invocation_tokens": [9, 9], "task_type": "CAUSAL_LM"},
}
ALLOWED = (*OTHER, 11, 12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterFolder]:
    return write_adapters(tiny.folder, tmp_path_factory.mktemp("adapters"), CONFIGS)


def peft_model(tiny: Tiny, adapter: AdapterFolder | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    base.generation_config.eos_token_id = None
    return base if adapter is None else PeftModel.from_pretrained(base, adapter.path).eval()


def request_of(name: str, adapter: AdapterFolder | None, **sampling: Any) -> GenerateRequest:
    params = greedy(12, logprobs=20, allowed_token_ids=ALLOWED, **sampling)
    return GenerateRequest(name, PROMPT, params, adapter_folder=adapter)


@torch.inference_mode()
def assert_as_peft_generates(model: Any, result: Result) -> None:
    """Compare the text, and the distribution of each of its tokens."""
    prompt = torch.tensor([PROMPT])
    expected = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda *_: list(ALLOWED),
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert result.token_ids == expected.sequences[0, len(PROMPT) :].tolist()
    for got, logits in zip(result.logprobs, expected.logits, strict=True):
        for token_id, value in got.top:
            assert value == pytest.approx(logits[0].log_softmax(-1)[token_id].item(), abs=1e-4)


@pytest.mark.parametrize("budget", [17, pytest.param(64, marks=pytest.mark.slow)])
def test_in_a_mixed_batch_each_adapter_generates_as_with_peft(
    tiny: Tiny, adapters: dict[str, AdapterFolder], budget: int
) -> None:
    """Both invocations are among the tokens that may come: none that comes moves the start."""
    everyone = {**adapters, "base": None}
    engine = make_engine(tiny.folder, max_num_batched_tokens=budget)
    results = run(engine, [request_of(name, adapter) for name, adapter in everyone.items()])
    found = {name: results[name, 0] for name in everyone}
    for name, adapter in everyone.items():
        assert_as_peft_generates(peft_model(tiny, adapter), found[name])
    assert OTHER[0] in found["other"].token_ids
    first = {name: round(found[name].logprobs[0].logprob, 3) for name in everyone}
    assert first["absent"] == first["base"] and len({*first.values()}) == 4


@torch.inference_mode()
def test_the_prompts_own_logits_are_pefts(tiny: Tiny, adapters: dict[str, AdapterFolder]) -> None:
    request = request_of("r", adapters["call"], prompt_logprobs=0)
    first = run(make_engine(tiny.folder), [request])["r", 0].first
    assert first is not None and first.prompt_logprobs is not None
    got = [entry.logprob for entry in first.prompt_logprobs if entry]
    rows: list[torch.Tensor] = []
    for name in ("call", None):
        model = peft_model(tiny, None if name is None else adapters[name])
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0].log_softmax(-1)
        rows.append(logits[torch.arange(len(PROMPT) - 1), PROMPT[1:]])
    torch.testing.assert_close(torch.tensor(got), rows[0], atol=1e-4, rtol=0)
    differs = (rows[0] - rows[1]).abs() > 1e-4
    assert differs.nonzero()[0].item() == START, "peft begins at the invocation's first token"


@torch.inference_mode()
def test_a_pooled_vector_is_pefts(tiny: Tiny, adapters: dict[str, AdapterFolder]) -> None:
    sampling = SamplingParams(pooling="mean")
    request = GenerateRequest("r", PROMPT, sampling, adapter_folder=adapters["call"])
    engine = make_engine(tiny.folder, max_num_batched_tokens=16)
    got = torch.tensor(vector_of(run(engine, [request])["r", 0].last))
    model = peft_model(tiny, adapters["call"])
    output = model(input_ids=torch.tensor([PROMPT]), output_hidden_states=True)
    torch.testing.assert_close(got, output.hidden_states[-1][0].mean(0), atol=1e-4, rtol=1e-4)


def test_activated_adapters_and_the_base_share_the_context_before_them(
    tiny: Tiny, adapters: dict[str, AdapterFolder]
) -> None:
    everyone = {"base": None, **adapters}
    engine = make_engine(tiny.folder)
    cached: dict[str, int] = {}
    for name, adapter in everyone.items():
        request = request_of(name, adapter)
        result = run(engine, [request])[name, 0]
        assert result.last is not None and result.last.metrics is not None
        cached[name] = result.last.metrics.num_cached_tokens
        alone = run(make_engine(tiny.folder, enable_prefix_caching=False), [request])[name, 0]
        assert result.token_ids == alone.token_ids
    before_other = len(PROMPT) - 3  # its invocation is one token
    all_but_one = len(PROMPT) - 1
    expected = {"base": 0, "plain": 0, "call": START, "other": before_other, "absent": all_but_one}
    assert cached == {name: n // 4 * 4 for name, n in expected.items()}


def test_a_request_that_goes_on_elsewhere_keeps_its_start(
    tiny: Tiny, adapters: dict[str, AdapterFolder]
) -> None:
    whole = run(make_engine(tiny.folder), [request_of("r", adapters["other"])])["r", 0].token_ids
    for cut in range(whole.index(OTHER[0]) + 1, len(whole)):
        request = request_of("r", adapters["other"])
        request.output_token_ids.extend(whole[:cut])
        assert run(make_engine(tiny.folder), [request])["r", 0].token_ids == whole[cut:]


def test_preemption_and_further_choices_change_nothing(
    tiny: Tiny, adapters: dict[str, AdapterFolder]
) -> None:
    sampling = SamplingParams(max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    requests = [
        GenerateRequest(name, PROMPT, sampling, n=2, adapter_folder=adapters[name])
        for name in ("call", "other")
    ]
    roomy = make_engine(tiny.folder)
    expected = texts(run(roomy, requests))
    nbytes = sum(roomy.host.get(adapters[name].digest).nbytes for name in ("call", "other"))
    block_bytes = roomy.settled.block_bytes
    small = make_engine(tiny.folder, memory_bytes=nbytes + 30 * block_bytes, max_model_len=80)
    for request in requests:
        small.add_request(request)
    assert texts(finish(small)) == expected
    assert small.stats.total_preemptions > 0


def test_an_invocation_that_the_vocabulary_does_not_have_is_an_error(
    tiny: Tiny, adapters: dict[str, AdapterFolder], tmp_path: Path
) -> None:
    config = {**CONFIGS["call"], "alora_invocation_tokens": [9, 256]}
    adapter = write_adapters(tiny.folder, tmp_path, {"a": config})["a"]
    last = run(make_engine(tiny.folder), [request_of("r", adapter)])["r", 0].last
    assert last is not None and last.error is not None
    assert last.error.kind == ErrorKind.ADAPTER_INVALID
    assert "token id 256 is outside the vocabulary [0, 255]" in last.error.message
