"""Tokens that a grammar leaves no choice of: the answers are those of sampling each."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.grammar.limits import MAX_FORCED_TOKENS
from engine.messages import GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.engine.grammar.test_random_schemas import random_schema
from tests.engine.support.byte_model import EOS, byte_tokenizer, write_byte_model
from tests.engine.support.driver import Result, make_engine, prompt_of
from tests.engine.support.grammars import of_choices, of_schema, run_all

END = byte_tokenizer().token_to_id(EOS)
NAME = "a_name_that_is_long"
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


def random_request(number: int, dice: random.Random) -> GenerateRequest:
    """Make a request whose grammar forces long names, and that any rule may end or steer."""
    schema = random_schema(dice)
    if dice.random() < 0.5:
        schema = {"type": "object", "properties": {NAME: schema}, "required": [NAME]}
        schema["additionalProperties"] = False
    max_tokens = dice.choice([4, 12, 25, 60])
    rules: dict[str, Any] = {}
    for chance, rule in (
        (0.3, {"temperature": 0.0}),
        (0.2, {"stop_token_ids": (ord(dice.choice("_lg,]0")),)}),
        (0.2, {"min_tokens": dice.randint(0, max_tokens)}),
        (0.1, {"logprobs": 2}),
        (0.2, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}),
        (0.2, {"logit_bias": ((ord("_"), -100.0), (ord("a"), 5.0))}),
        (0.2, {"bad_words": ((ord("_"),), tuple(b"tha"))}),
    ):
        rules |= rule if dice.random() < chance else {}
    sampling = SamplingParams(
        max_tokens=max_tokens, seed=number, grammar=of_schema(schema), **rules
    )
    return GenerateRequest(f"r{number}", prompt_of(3 + number % 9), sampling, n=1 + number % 2)


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
    requests = [random_request(number, dice) for number in range(num)]
    expected, found = run_all(sampling, requests), run_all(jumping, requests)
    assert answers(found) == answers(expected)
    tokens = sum(len(result.token_ids) for result in expected.values())
    assert sum(result.num_outputs for result in expected.values()) == tokens
    assert sum(result.num_outputs for result in found.values()) < 0.8 * tokens


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
    compare(make(enable_jump_ahead=False), jumping, 7, 24)
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


def test_tokens_with_log_probabilities_come_one_by_one(make: Callable[..., Engine]) -> None:
    engine, text = make(max_num_batched_tokens=128, max_model_len=256), "xyz" * 5
    sampling = SamplingParams(max_tokens=100, grammar=of_choices(text), logprobs=1)
    pieces, _ = steps_of(engine, sampling)
    assert [len(piece) for piece in pieces] == [1] * 16


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
