"""Tests that drafts change no token, whatever a request asks for and whatever runs beside it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, SpeculationConfig
from engine.engine import Engine
from engine.messages import GenerateRequest
from engine.scheduler.request import Request, SamplingParams
from engine.scheduler.speculation import NgramDrafter
from tests.engine.support.drafters import Seer, eager
from tests.engine.support.driver import (
    Result,
    finish,
    greedy,
    make_engine,
    prompt_of,
    run,
    write_mixed_adapters,
)
from tests.engine.support.late_runner import LateRunner
from tests.engine.support.tiny import Tiny

NGRAM = SpeculationConfig("ngram")
Results = dict[tuple[str, int], Result]


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Tiny]) -> Tiny:
    return tiny_model()


def diverse_requests(tiny: Tiny, folder: Path) -> list[GenerateRequest]:
    """Make requests with each rule that a token may be subject to, mixed over adapters."""
    hot: dict[str, Any] = {"temperature": 1.2, "max_tokens": 24, "seed": 3}
    stops = tuple(range(40, 60))
    rules: list[tuple[SamplingParams, int]] = [
        (greedy(24), 1),
        (SamplingParams(top_p=0.9, logprobs=3, **hot), 2),
        (SamplingParams(stop_token_ids=stops, **hot), 3),
        (SamplingParams(stop_token_ids=stops, min_tokens=9, **hot), 1),
        (greedy(24, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.3), 1),
        (SamplingParams(logit_bias=((7, 4.0), (9, -100.0)), frequency_penalty=1.0, **hot), 1),
        (SamplingParams(allowed_token_ids=tuple(range(5, 12)), logprobs=0, **hot), 1),
        (SamplingParams(bad_words=((7, 8), (9,), (10, 11, 12)), top_k=12, **hot), 1),
        (replace(greedy(200), prompt_logprobs=1), 1),
    ]
    adapters = [None, *write_mixed_adapters(tiny.folder, folder)]
    prompts = [prompt_of(30, seed=30)] * 3 + [prompt_of(5 + 7 * i, seed=i) for i in range(6)]
    requests = [
        GenerateRequest(f"r{i}", prompts[i], s, n=n, adapter_folder=adapters[i % len(adapters)])
        for i, (s, n) in enumerate(rules)
    ]
    embed = GenerateRequest("e", prompt_of(40), SamplingParams(pooling="mean"))
    return [*requests, embed]


def run_with_seer(engine: Engine, requests: Sequence[GenerateRequest], known: Results) -> Results:
    def expected(request: Request) -> list[int]:
        return known[request.key].token_ids if request.key in known else []

    engine.scheduler.speculation = eager(Seer(expected), 4, engine.info.max_model_len)
    return run(engine, requests)


def compare(expected: Results, found: Results, *, is_exact: bool) -> None:
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        given = found[key]
        assert given.token_ids == wanted.token_ids, key
        assert given.last is not None and wanted.last is not None and given.last.error is None
        assert given.last.finish_reason == wanted.last.finish_reason
        assert given.last.stop_token_id == wanted.last.stop_token_id
        assert len(given.logprobs) == len(wanted.logprobs)
        if is_exact:
            assert given.logprobs == wanted.logprobs, key
            assert given.last.embedding == wanted.last.embedding


FORMS: dict[str, dict[str, Any]] = {
    "torch": {"dtype": "float32"},
    "native": {"dtype": "bfloat16", "block_size": 16, "memory_bytes": 2**22},
    "native int8 kv": {
        "dtype": "bfloat16",
        "kv_dtype": "int8",
        "quantization": "int8",
        "block_size": 16,
        "memory_bytes": 2**21,
    },
}


@pytest.mark.parametrize("form", [*FORMS][:2])
def test_drafts_change_no_answer(tiny: Tiny, tmp_path: Path, form: str) -> None:
    """In too little memory for all, with chunked prompts; all at once, so that batches differ."""
    requests = diverse_requests(tiny, tmp_path)
    changes = {"max_num_batched_tokens": 32, "max_model_len": 128, "structured_output": "off"}
    changes |= {**FORMS[form], "memory_bytes": 170_000}
    plain = make_engine(tiny.folder, **changes)
    expected = run(plain, requests)
    num_preemptions = 0
    # Whether there is need for one depends on when adapters arrive: seldom before steps as fast
    # as the native ones.
    for _ in range(10 if form == "torch" else 1):
        drafting = make_engine(tiny.folder, speculation=NGRAM, **changes)
        found = run_with_seer(drafting, requests, expected)
        compare(expected, found, is_exact=form != "torch")
        stats = drafting.stats
        drafting.close()
        num_preemptions += stats.total_preemptions
        if num_preemptions:
            break
    assert num_preemptions > 0 or form != "torch"
    assert 0 < stats.total_accepted_tokens < stats.total_drafted_tokens
    last = found["r0", 0].last
    assert last is not None and last.metrics is not None
    assert 0 < last.metrics.num_accepted_tokens < last.metrics.num_drafted_tokens
    plain.close()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_drafts_change_no_answer_of_many(tiny: Tiny, tmp_path: Path, form: str, seed: int) -> None:
    """With several sizes of steps, without a prefix cache, and with drafts of the prompt's own."""
    requests = diverse_requests(tiny, tmp_path)
    changes: dict[str, Any] = {
        "max_num_batched_tokens": (16, 24, 64, 200)[seed],
        "enable_prefix_caching": seed % 2 == 0,
        "max_model_len": 128,
        "structured_output": "off",
    }
    plain = make_engine(tiny.folder, **changes, **FORMS[form])
    expected = run(plain, requests)
    drafting = make_engine(tiny.folder, speculation=NGRAM, **changes, **FORMS[form])
    is_exact = form != "torch"
    compare(expected, run(drafting, requests), is_exact=is_exact)
    compare(expected, run_with_seer(drafting, requests, expected), is_exact=is_exact)
    plain.close()
    drafting.close()


def test_a_resumed_and_an_aborted_request_draft_from_all_that_is_known(tiny: Tiny) -> None:
    """With so few tokens to choose from its answer repeats itself."""
    prompt, sampling = prompt_of(12) * 3, greedy(40, allowed_token_ids=(5, 6))
    plain = make_engine(tiny.folder)
    whole = run(plain, [GenerateRequest("r", prompt, sampling)])["r", 0].token_ids
    engine = make_engine(tiny.folder, speculation=NGRAM)
    engine.scheduler.speculation = eager(NgramDrafter(), 16)
    engine.add_request(GenerateRequest("gone", prompt, sampling))
    engine.add_request(GenerateRequest("r", prompt, sampling, output_token_ids=whole[:17]))
    outputs = [output for _ in range(3) for output in engine.step()]
    engine.abort("gone")
    assert engine.stats.num_blocks_used <= engine.scheduler.blocks.blocks_for(len(prompt) + 40)
    results = finish(engine)
    assert engine.scheduler.blocks.num_held == 0
    early = [token_id for o in outputs if o.request_id == "r" for token_id in o.token_ids]
    assert early + results["r", 0].token_ids == whole[17:]
    assert engine.stats.total_accepted_tokens > 0


def test_a_runner_that_launches_ahead_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.backends.torch.load.SyncRunner", LateRunner)
    auto = make_engine(tiny.folder, speculation=SpeculationConfig("auto"))
    assert auto.scheduler.speculation is None
    with pytest.raises(ConfigError, match=r"speculation\.method=.ngram. is not"):
        make_engine(tiny.folder, speculation=SpeculationConfig("ngram"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "medusa"}, "speculation.method='medusa' is not one of"),
        ({"max_draft_tokens": 0}, "speculation.max_draft_tokens=0 is outside 1..64"),
        ({"max_draft_tokens": 65}, "speculation.max_draft_tokens=65 is outside 1..64"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculationConfig(**changes)
