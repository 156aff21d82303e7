"""Tests the engine's step loop with pipelining: answers equal those without."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.messages import ErrorKind, GenerateRequest
from engine.scheduler.request import POOLINGS, SamplingParams
from tests.engine.support.driver import (
    Result,
    finish,
    greedy,
    make_engine,
    prompt_of,
    run,
    write_adapter,
)
from tests.engine.support.late_runner import LateRunner
from tests.engine.support.tiny import Tiny

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Tiny]) -> Tiny:
    return tiny_model()


@pytest.fixture
def ahead(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    """Return a function that makes engines that run one step ahead."""

    def make(**changes: object) -> Engine:
        with monkeypatch.context() as patch:
            patch.setattr("engine.backends.torch.load.SyncRunner", LateRunner)
            return make_engine(tiny.folder, **changes)

    return make


def late(engine: Engine) -> LateRunner:
    assert isinstance(engine.runner, LateRunner)
    return engine.runner


def diverse_requests() -> list[GenerateRequest]:
    """Make requests: chunked, with choices, stops, penalties, prompt logprobs, resumption."""
    hot = {"temperature": 1.3, "max_tokens": 18}
    stops = tuple(range(40, 70))
    return [
        GenerateRequest("greedy", prompt_of(30, 1), greedy(12)),
        GenerateRequest("one", prompt_of(5, 2), greedy(1, logprobs=2)),
        GenerateRequest("stops", prompt_of(9, 3), SamplingParams(stop_token_ids=stops, **hot), n=3),
        GenerateRequest(
            "held", prompt_of(9, 4), SamplingParams(stop_token_ids=stops, min_tokens=7, **hot)
        ),
        GenerateRequest(
            "penalties",
            prompt_of(7, 5),
            SamplingParams(repetition_penalty=1.4, frequency_penalty=0.6, seed=4, **hot),
        ),
        GenerateRequest("scored", prompt_of(40, 6), greedy(6, logprobs=3, prompt_logprobs=2)),
        GenerateRequest(
            "resumed", prompt_of(6, 7), SamplingParams(seed=9, **hot), output_token_ids=[5, 6, 7]
        ),
        GenerateRequest(
            "banned",
            prompt_of(8, 12),
            SamplingParams(
                bad_words=(*((i,) for i in range(99)), *((i, i + 1) for i in range(99, 250))),
                seed=3,
                **hot,
            ),
        ),
        GenerateRequest(
            "allowed",
            prompt_of(8, 13),
            SamplingParams(allowed_token_ids=(3, 9, 12), logprobs=1, seed=4, **hot),
        ),
        *(
            GenerateRequest(
                f"{pooling}{length}", prompt_of(length, 8), SamplingParams(pooling=pooling)
            )
            for pooling in POOLINGS
            for length in (1, 33, 37)
        ),
    ]


Answers = dict[tuple[str, int], Result]


def assert_same(found: Answers, expected: Answers) -> None:
    """Compare all that a client sees except times; logprobs may differ by rounding."""
    assert found.keys() == expected.keys()
    for key, result in expected.items():
        assert found[key].token_ids == result.token_ids
        assert _end(found[key]) == _end(result)
        assert _logprobs(found[key]) == pytest.approx(_logprobs(result), abs=1e-4)
        assert _embedding(found[key]) == pytest.approx(_embedding(result), abs=1e-4)


def _end(result: Result) -> tuple[object, ...]:
    last = result.last
    assert last is not None and last.metrics is not None
    num_tokens = (last.metrics.num_prompt_tokens, last.metrics.num_output_tokens)
    return last.finish_reason, last.stop_token_id, last.error, *num_tokens


def _embedding(result: Result) -> list[float]:
    embedding = result.last.embedding if result.last else None
    return [] if embedding is None else np.frombuffer(embedding, "<f4").tolist()


def _logprobs(result: Result) -> list[float]:
    first = result.first
    scored = (first.prompt_logprobs if first else None) or []
    entries = [*result.logprobs, *(entry for entry in scored if entry is not None)]
    return [v for e in entries for v in (e.logprob, *(x for pair in e.top for x in pair))]


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> Answers:
    return run(make_engine(tiny.folder), diverse_requests())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"max_num_seqs": 2},
        {"enable_prefix_caching": False, "block_size": 1},
    ],
    ids=str,
)
def test_answers_equal_those_without_pipelining(
    ahead: MakeEngine, expected: Answers, changes: dict[str, int]
) -> None:
    engine = ahead(**changes)
    assert_same(run(engine, diverse_requests()), expected)
    stats = engine.stats
    assert stats.num_blocks_used == stats.num_running == stats.num_waiting == 0
    assert stats.queued_tokens == 0
    assert stats.total_output_tokens == sum(len(r.token_ids) for r in expected.values())


def test_preemption_changes_no_answer(ahead: MakeEngine, expected: Answers) -> None:
    engine = ahead(memory_bytes=72 * 2 * 3 * 2 * 16 * 4, max_model_len=64)
    assert_same(run(engine, diverse_requests()), expected)
    assert engine.stats.total_preemptions > 0


@pytest.mark.parametrize("loads_are_immediate", [True, False])
def test_adapters_that_take_turns_change_no_answer(
    ahead: MakeEngine,
    tiny: Tiny,
    tmp_path: Path,
    loads_are_immediate: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = [write_adapter(tiny.folder, tmp_path / f"a{i}", seed=i) for i in range(3)]
    requests = [
        GenerateRequest(f"r{i}", prompt_of(6 + i, i), greedy(9), adapter_folder=adapters[i % 3])
        for i in range(6)
    ]
    changes = {"adapter_memory_bytes": 40_000}
    expected = run(make_engine(tiny.folder, **changes), requests)
    monkeypatch.setattr(LateRunner, "loads_are_immediate", loads_are_immediate)
    engine = ahead(**changes)
    assert_same(run(engine, requests), expected)
    assert not engine.scheduler.adapters.is_any_loading


def test_no_empty_step_is_launched(ahead: MakeEngine) -> None:
    engine = ahead()
    engine.add_request(GenerateRequest("r", prompt_of(5), greedy(3)))
    tokens = [len([t for o in engine.step() for t in o.token_ids]) for _ in range(5)]
    assert tokens == [0, 1, 1, 1, 0]
    assert engine.stats.total_steps == 3


def test_an_engine_is_idle_only_when_nothing_is_in_flight(ahead: MakeEngine) -> None:
    engine = ahead()
    engine.add_request(GenerateRequest("r", prompt_of(5), greedy(20)))
    engine.step()
    engine.step()
    engine.abort("r")
    (ended,) = engine.step()
    assert ended.finish_reason == "abort"
    assert not engine.is_idle and late(engine).num_in_flight == 0
    assert engine.step() == [] and engine.is_idle


def test_seconds_of_overlapping_steps_are_counted_once(ahead: MakeEngine) -> None:
    engine = ahead()
    now = iter(range(1000))
    engine._clock = lambda: float(next(now))
    run(engine, [GenerateRequest("r", prompt_of(5), greedy(8))])
    assert 0 < engine.stats.total_step_s <= next(now)


def test_a_reused_request_id_gets_no_token_that_was_in_flight(
    ahead: MakeEngine, tiny: Tiny
) -> None:
    second = GenerateRequest("r", prompt_of(8, 1), greedy(5, prompt_logprobs=1))
    expected = run(make_engine(tiny.folder), [second])
    engine = ahead(max_num_batched_tokens=16)
    engine.add_request(GenerateRequest("r", prompt_of(40), greedy(5, prompt_logprobs=1)))
    engine.step()
    engine.step()
    engine.abort("r")
    (aborted,) = engine.step()
    assert aborted.finish_reason == "abort"
    assert_same(run(engine, [second]), expected)
    assert not engine.results.holds_parts


def test_a_launch_that_raises_ends_its_requests_after_their_last_token(
    ahead: MakeEngine, expected: Answers
) -> None:
    engine = ahead()
    engine.add_request(GenerateRequest("lost", prompt_of(9), greedy(9)))
    engine.step()
    late(engine).refuses_launch = True
    token, end = engine.step()
    assert len(token.token_ids) == 1 and token.error is None
    assert end.error is not None and end.error.kind == ErrorKind.ENGINE_ERROR
    assert "launch is refused" in end.error.message
    assert engine.stats.num_blocks_used == 0
    late(engine).refuses_launch = False
    assert_same(run(engine, diverse_requests()), expected)


def test_a_result_that_raises_ends_its_requests_but_not_those_of_the_step_behind_it(
    ahead: MakeEngine, expected: Answers
) -> None:
    engine = ahead(max_num_batched_tokens=64)
    engine.add_request(GenerateRequest("lost", prompt_of(9), greedy(9)))
    engine.step()
    for request in diverse_requests():
        engine.add_request(request)
    late(engine).loses_step = True
    (end,) = engine.step()
    assert end.error is not None and "step is lost" in end.error.message
    late(engine).loses_step = False
    assert_same(finish(engine), expected)


def test_logits_that_are_not_finite_end_only_their_own_request(ahead: MakeEngine) -> None:
    engine = ahead()
    logits, num_calls = late(engine).model.logits, 0

    def poisoned(hidden: torch.Tensor, adapter_slots: Sequence[int]) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        values = logits(hidden, adapter_slots)
        if num_calls == 2:
            values[0] = torch.nan
        return values

    late(engine).model.logits = poisoned  # type: ignore[method-assign]
    requests = [GenerateRequest(name, prompt_of(5), greedy(4)) for name in ("first", "second")]
    results = run(engine, requests)
    first, second = results["first", 0].last, results["second", 0].last
    assert first is not None and first.error is not None and "not finite" in first.error.message
    assert len(results["first", 0].token_ids) == 1
    assert second is not None and second.finish_reason == "length"
    assert results["second", 0].token_ids[0] == results["first", 0].token_ids[0]
