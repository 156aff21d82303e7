"""Tokens that a grammar leaves no choice of: the answers are those of sampling each."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.grammar.limits import MAX_FORCED_TOKENS
from engine.messages import GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.engine.grammar.requests import random_request
from tests.engine.support.byte_model import EOS, byte_tokenizer, write_byte_model
from tests.engine.support.driver import Result, make_engine, prompt_of, write_mixed_adapters
from tests.engine.support.grammars import of_choices, of_regex, of_schema, run_all

END = byte_tokenizer().token_to_id(EOS)
Answers = dict[tuple[str, int], tuple[list[int], str | None, int | None, int, int]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """Make engines of a model with one end token, one for each set of changes."""
    folder = write_byte_model(tmp_path_factory.mktemp("one"), eos_token_id=END).folder
    engines: dict[str, Engine] = {}

    def make(**changes: Any) -> Engine:
        if str(changes) not in engines:
            engines[str(changes)] = make_engine(folder, **{"max_model_len": 64, **changes})
        return engines[str(changes)]

    yield make
    for engine in engines.values():
        engine.close()


def answers(results: dict[tuple[str, int], Result]) -> Answers:
    """Return tokens, how they ended, and what is billed, all of which jumps must not change."""
    found: Answers = {}
    for key, result in results.items():
        last = result.last
        assert last is not None and last.error is None and last.metrics is not None, last
        figures = last.metrics.num_prompt_tokens, last.metrics.num_output_tokens
        found[key] = (result.token_ids, last.finish_reason, last.stop_token_id, *figures)
        assert figures[1] == len(result.token_ids)
        assert len(result.logprobs) in (0, len(result.token_ids))
    return found


def compare(sampling: Engine, jumping: Engine, seed: int, num: int) -> None:
    dice = random.Random(seed)
    requests = [random_request(number, dice, 60) for number in range(num)]
    expected, found = run_all(sampling, requests), run_all(jumping, requests)
    assert answers(found) == answers(expected)
    for key, result in found.items():
        check_logprobs(result, expected[key])
    tokens = sum(len(result.token_ids) for result in expected.values())
    assert sum(result.num_outputs for result in expected.values()) == tokens
    assert sum(result.num_outputs for result in found.values()) < 0.8 * tokens


def check_logprobs(found: Result, expected: Result) -> None:
    """In float32 the last bits may differ."""
    for entry, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
        values, others = ([value for _, value in e.top] for e in (entry, other))
        assert values == pytest.approx(others, abs=1e-4)


TIGHT: dict[str, Any] = {"max_num_batched_tokens": 16, "memory_bytes": 80_000}
CHANGES: dict[str, dict[str, Any]] = {
    "usual": {},
    "few tokens a step": {"max_num_batched_tokens": 8, "max_num_seqs": 8, "block_size": 1},
    "native": {"dtype": "bfloat16", "block_size": 16, "memory_bytes": 2**21},
    "preempted": {"memory_bytes": 80_000},
}


def test_answers_are_those_of_sampling_each_token(make: Callable[..., Engine]) -> None:
    """With few tokens in a step, and too little memory for all."""
    jumping = make(**TIGHT)
    compare(make(enable_jump_ahead=False), jumping, 7, 12)
    assert jumping.stats.total_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("eos", [END, [END, END + 2]], ids=["one end token", "two"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_answers_of_many_grammars_are_those_of_sampling_each_token(
    tmp_path: Path, changes: dict[str, Any], eos: int | list[int]
) -> None:
    folder = write_byte_model(tmp_path, eos_token_id=eos).folder
    engines = [
        make_engine(folder, **{"max_model_len": 64, **changes, "enable_jump_ahead": jumps})
        for jumps in (False, True)
    ]
    for seed in range(20):
        compare(*engines, seed, 48)
    for engine in engines:
        engine.close()


def steps_of(engine: Engine, sampling: SamplingParams) -> tuple[list[list[int]], int]:
    """Run one request; return the tokens of each output, and the number of steps."""
    before, pieces = engine.stats.total_steps, list[list[int]]()
    step = engine.step

    def record() -> Any:
        outputs = step()
        pieces.extend(output.token_ids for output in outputs)
        return outputs

    engine.step = record  # type: ignore[method-assign]
    try:
        run_all(engine, [GenerateRequest("r", prompt_of(5), sampling)])
    finally:
        del engine.step  # type: ignore[method-assign]
    return pieces, engine.stats.total_steps - before


def test_a_long_text_takes_few_steps_and_no_more_than_its_tokens(
    make: Callable[..., Engine],
) -> None:
    """The first step has its first tokens; each next one computes those, and has as many more."""
    engine, text = make(max_num_batched_tokens=128, max_model_len=256), "xyz" * 50
    sampling = SamplingParams(max_tokens=160, grammar=of_choices(text))
    pieces, num_steps = steps_of(engine, sampling)
    assert bytes(t for piece in pieces for t in piece if t < 256).decode() == text
    assert max(map(len, pieces)) <= 1 + MAX_FORCED_TOKENS
    assert num_steps <= 12  # three, where the machine is not busy
    cut = SamplingParams(max_tokens=50, grammar=of_choices(text))
    pieces, _ = steps_of(engine, cut)
    assert sum(map(len, pieces)) == 50


@pytest.mark.parametrize("num_top", [0, 3])
def test_tokens_that_are_not_sampled_have_the_log_probabilities_of_sampled_ones(
    make: Callable[..., Engine], num_top: int
) -> None:
    sampling = SamplingParams(max_tokens=40, grammar=of_choices("xyz" * 5), logprobs=num_top)
    request = GenerateRequest("r", prompt_of(5), sampling)
    found, expected = (
        run_all(engine, [request])["r", 0]
        for engine in (make(**TIGHT), make(enable_jump_ahead=False))
    )
    assert found.num_outputs < expected.num_outputs == len(expected.token_ids) == 16
    assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
    assert all(entry.logprob == 0.0 for entry in found.logprobs)


FORMS = {
    "choice": of_choices("an example of a choice", "another example"),
    "prefix": of_regex("order-number-[0-9]{3}-of-the-shop"),
    "tool": of_schema(
        {
            "type": "object",
            "properties": {
                "name": {"const": "update_customer_address"},
                "arguments": {
                    "type": "object",
                    "properties": {"customer_identification": {"type": "integer"}},
                    "required": ["customer_identification"],
                    "additionalProperties": False,
                },
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
    ),
}


def test_native_answers_are_equal_bit_by_bit_with_adapters_and_however_they_are_resumed(
    tmp_path: Path,
) -> None:
    """Also log probabilities. Resumed is as after the loss of a replica, within certain tokens."""
    folder = write_byte_model(tmp_path / "base", eos_token_id=END).folder
    own = [None, *write_mixed_adapters(folder, tmp_path / "adapters")]
    settings = {"dtype": "bfloat16", "block_size": 16, "max_model_len": 128}
    requests = [
        GenerateRequest(
            f"{form} {i}",
            prompt_of(4 + i),
            SamplingParams(
                max_tokens=90, seed=i, grammar=grammar, logprobs=i, presence_penalty=0.1 * i
            ),
            adapter_folder=own[i % len(own)],
        )
        for form, grammar in FORMS.items()
        for i in range(2)
    ]
    plain = make_engine(folder, **settings, enable_jump_ahead=False)
    expected = run_all(plain, requests)
    plain.close()
    engine = make_engine(folder, **settings, max_num_batched_tokens=16)
    assert engine.info.kernels.startswith("native"), engine.info.kernels
    found = run_all(engine, requests)
    for key, result in expected.items():
        assert (found[key].token_ids, found[key].logprobs) == (result.token_ids, result.logprobs)
    assert all(found[key].num_outputs < len(expected[key].token_ids) for key in expected)
    for cut in (1, 5, 12):
        resumed = [
            replace(r, output_token_ids=expected[r.request_id, 0].token_ids[:cut]) for r in requests
        ]
        for key, result in run_all(engine, resumed).items():
            assert result.token_ids == expected[key].token_ids[cut:]
    engine.close()


def test_a_token_that_the_model_does_not_have_is_never_taken(tmp_path: Path) -> None:
    """Its tokenizer has more; where the grammar leaves no other, the request ends."""
    tokenizer, text = byte_tokenizer(), "abcdef null"
    known = tokenizer.token_to_id("null")
    assert tokenizer.encode(text).ids[-1] == known
    folder = write_byte_model(tmp_path, vocab_size=known, eos_token_id=3, pad_token_id=4).folder
    for jumps in (False, True):
        engine = make_engine(folder, enable_jump_ahead=jumps)
        sampling = SamplingParams(max_tokens=50, grammar=of_choices(text))
        results = run_all(engine, [GenerateRequest("r", prompt_of(5), sampling)])
        result = results["r", 0]
        assert result.token_ids == tokenizer.encode(text).ids[:-1]
        assert result.last is not None and result.last.error is not None
        assert "not finite" in result.last.error.message
        engine.close()
