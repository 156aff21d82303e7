"""An engine whose requests have grammars: every output matches, and nobody else notices."""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.engine import Engine
from engine.messages import AdapterFolder, ErrorKind, GenerateRequest
from engine.scheduler.request import InvalidRequest, SamplingParams
from tests.engine.support.byte_model import EOS, EOT, byte_tokenizer
from tests.engine.support.driver import (
    Result,
    make_engine,
    prompt_of,
    run,
    texts,
    write_mixed_adapters,
)
from tests.engine.support.grammars import of_choices, of_regex, of_schema, run_all
from tests.engine.support.late_runner import LateRunner

TOKENIZER = byte_tokenizer()
ENDS = (TOKENIZER.token_to_id(EOS), TOKENIZER.token_to_id(EOT))

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "na": {"enum": ["é", "12", 12, None]},
            "me": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["name", "me"],
        "additionalProperties": False,
    },
    {"type": "integer", "minimum": -7, "maximum": 3000, "multipleOf": 3},
    {"anyOf": [{"const": {"a": [1, {}]}}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    {
        "$defs": {"leaf": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 1}},
        "type": "object",
        "properties": {"date": {"type": "string", "format": "date"}},
        "required": ["date"],
        "additionalProperties": {"$ref": "#/$defs/leaf"},
        "maxProperties": 2,
    },
]
del SCHEMAS[3]["maxProperties"]
SCHEMAS[3]["additionalProperties"] = False
SCHEMAS[3]["properties"]["leaf"] = {"$ref": "#/$defs/leaf"}


def free(max_tokens: int = 300, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **changes)


def bound(schema: dict[str, Any], seed: int = 0, **changes: Any) -> SamplingParams:
    return free(seed=seed, grammar=of_schema(schema), **changes)


def text_of(result: Result) -> str:
    ids = [t for t in result.token_ids if t not in ENDS]
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def check(result: Result, schema: dict[str, Any]) -> None:
    last = result.last
    assert last is not None and last.finish_reason == "stop", last
    jsonschema.validate(
        json.loads(text_of(result)), schema, format_checker=jsonschema.FormatChecker()
    )


@pytest.fixture(scope="module")
def adapters(byte_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFolder]:
    return write_mixed_adapters(byte_folder, tmp_path_factory.mktemp("adapters"))


def mixed(adapters: list[AdapterFolder], num: int = 12) -> list[GenerateRequest]:
    """Make requests: two of three with a schema, of several adapters, with all kinds of rules."""
    rules: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.5, "logprobs": 3},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"logit_bias": ((ord("1"), 4.0), (ENDS[0], -5.0)), "top_p": 0.8},
        {"top_k": 4, "min_p": 0.01},
    ]
    own = [None, *adapters]
    requests: list[GenerateRequest] = []
    for i in range(num):
        sampling = free(20, ignore_eos=True, seed=i, **rules[i % 5])
        if i % 3:
            sampling = bound(SCHEMAS[i % len(SCHEMAS)], i, **rules[i % 5])
        folder = own[i % len(own)]
        requests.append(
            GenerateRequest(f"r{i}", prompt_of(5 + i, i), sampling, adapter_folder=folder)
        )
    return requests


@pytest.fixture(scope="module")
def expected(byte_folder: Path, adapters: list[AdapterFolder]) -> dict[tuple[str, int], Result]:
    """Each request by itself."""
    results: dict[tuple[str, int], Result] = {}
    engine = make_engine(byte_folder, max_model_len=1024)
    for request in mixed(adapters):
        results |= run_all(engine, [request])
    engine.close()
    return results


def test_outputs_match_their_schemas(expected: dict[tuple[str, int], Result]) -> None:
    for i in range(12):
        if i % 3:
            check(expected[f"r{i}", 0], SCHEMAS[i % len(SCHEMAS)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 16},
        {"max_num_seqs": 3},
        {"memory_bytes": 360_000, "max_model_len": 320},
        {"enable_prefix_caching": False, "block_size": 1},
        {"enable_jump_ahead": False},
    ],
    ids=["mixed", "chunked", "few at a time", "with preemptions", "no cache", "one by one"],
)
def test_in_one_batch_each_output_is_as_by_itself(
    byte_folder: Path,
    adapters: list[AdapterFolder],
    expected: dict[tuple[str, int], Result],
    changes: dict[str, Any],
) -> None:
    engine = make_engine(byte_folder, **{"max_model_len": 1024, **changes})
    found = run_all(engine, mixed(adapters))
    assert texts(found) == texts(expected)
    assert (engine.stats.total_preemptions > 0) == ("memory_bytes" in changes)
    engine.close()


def test_rows_without_a_grammar_are_as_if_there_were_none(
    engine: Engine, adapters: list[AdapterFolder]
) -> None:
    requests = mixed(adapters)
    plain = [r for r in requests if r.sampling.grammar is None]
    among, alone = texts(run_all(engine, requests)), texts(run(engine, plain))
    assert {key: among[key] for key in alone} == alone


def test_native_kernels_keep_to_grammars(byte_folder: Path, adapters: list[AdapterFolder]) -> None:
    engine = make_engine(byte_folder, max_model_len=1024, dtype="bfloat16", block_size=16)
    assert engine.info.kernels.startswith("native"), engine.info.kernels
    found = run_all(engine, mixed(adapters))
    for i in range(12):
        if i % 3:
            check(found[f"r{i}", 0], SCHEMAS[i % len(SCHEMAS)])
    engine.close()


# ---- a step ahead ----


@pytest.fixture
def ahead(byte_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with monkeypatch.context() as patch:
        patch.setattr("engine.backends.torch.load.SyncRunner", LateRunner)
        engine = make_engine(byte_folder, max_model_len=1024)
    yield engine
    engine.close()


def test_a_step_ahead_the_outputs_are_the_same(
    ahead: Engine, adapters: list[AdapterFolder], expected: dict[tuple[str, int], Result]
) -> None:
    assert texts(run_all(ahead, mixed(adapters))) == texts(expected)


def test_a_row_with_a_grammar_sits_out_and_others_do_not(ahead: Engine) -> None:
    """A step ahead, its token is not known when the next step is launched."""
    plain = GenerateRequest("plain", prompt_of(5), free(20, ignore_eos=True))
    held = GenerateRequest("held", prompt_of(6), bound(SCHEMAS[0], max_tokens=20))
    seen: list[set[str]] = []
    launch = ahead.runner.launch

    def record(batch: Any, *masks: Any) -> Any:
        seen.append({r.request_id for r in batch.requests})
        return launch(batch, *masks)

    ahead.runner.launch = record  # type: ignore[method-assign]
    run_all(ahead, [plain, held])
    both = seen[: seen.index({"held"})] if {"held"} in seen else seen
    assert sum("plain" in step for step in both) >= 20
    assert not any("held" in a and "held" in b for a, b in pairwise(both))


# ---- resuming ----


def test_an_output_goes_on_elsewhere_from_any_token(engine: Engine) -> None:
    request = GenerateRequest("whole", prompt_of(9), bound(SCHEMAS[0], 3, temperature=1.2))
    whole = run_all(engine, [request])["whole", 0].token_ids
    cut = [
        replace(request, request_id=f"cut{at}", output_token_ids=whole[:at])
        for at in range(1, len(whole))
    ]
    found = texts(run_all(engine, cut))
    for at in range(1, len(whole)):
        assert found[f"cut{at}", 0] == whole[at:]


# ---- rules that meet grammars ----


def test_choices_of_one_request_go_their_own_ways(engine: Engine) -> None:
    request = GenerateRequest("many", prompt_of(9), bound(SCHEMAS[0], temperature=1.3), n=5)
    found = run_all(engine, [request])
    for index in range(5):
        check(found["many", index], SCHEMAS[0])
    assert len({text_of(result) for result in found.values()}) > 1


def test_logprobs_are_of_the_tokens_that_the_grammar_allows(engine: Engine) -> None:
    request = GenerateRequest("r", prompt_of(9), free(grammar=of_choices("a", "b"), logprobs=4))
    first, last = run_all(engine, [request])["r", 0].logprobs
    likely = {token_id: value for token_id, value in first.top if value > -1e9}
    assert set(likely) == {ord("a"), ord("b")}
    total = sum(2.718281828**value for value in likely.values())
    assert total == pytest.approx(1.0, abs=1e-5) and len(first.top) == 4
    assert {token_id for token_id, value in last.top if value > -1e9} == set(ENDS)


def test_min_tokens_gives_way_where_only_the_end_is_left(engine: Engine) -> None:
    grammar = of_regex("[ab]{1,3}")
    for min_tokens in (2, 3, 8):
        request = GenerateRequest("r", prompt_of(9), free(grammar=grammar, min_tokens=min_tokens))
        result = run_all(engine, [request])["r", 0]
        assert len(text_of(result)) >= min(min_tokens - 1, 3)
        assert len(result.token_ids) >= min_tokens and result.last is not None
        assert result.last.finish_reason == "stop"


def test_a_stop_token_ends_amid_a_structure(engine: Engine) -> None:
    stop = (ord("b"),)
    sampling = free(grammar=of_choices("aab"), stop_token_ids=stop)
    result = run_all(engine, [GenerateRequest("r", prompt_of(9), sampling)])["r", 0]
    assert text_of(result) == "aab" and result.last and result.last.stop_token_id == ord("b")
    held = free(grammar=of_choices("bbbb"), stop_token_ids=stop, min_tokens=3)
    result = run_all(engine, [GenerateRequest("r", prompt_of(9), held)])["r", 0]
    assert text_of(result) == "bbb"


def test_max_tokens_cuts_a_structure_off(engine: Engine) -> None:
    sampling = bound(SCHEMAS[0], max_tokens=3)
    result = run_all(engine, [GenerateRequest("r", prompt_of(9), sampling)])["r", 0]
    assert result.last and result.last.finish_reason == "length" and len(result.token_ids) == 3


def test_biases_and_penalties_cannot_leave_the_grammar(engine: Engine) -> None:
    biases = tuple((token_id, 100.0) for token_id in range(ord("c"), ord("z")))
    grammar = of_regex("[ab]{8}")
    for changes in ({"logit_bias": biases}, {"presence_penalty": 2.0, "repetition_penalty": 50.0}):
        sampling = free(grammar=grammar, **changes)
        result = run_all(engine, [GenerateRequest("r", prompt_of(9), sampling)])["r", 0]
        assert re.fullmatch("[ab]{8}", text_of(result))


# ---- refusals ----


def error_of(engine: Engine, grammar: str) -> tuple[ErrorKind, str]:
    result = run_all(engine, [GenerateRequest("r", prompt_of(5), free(grammar=grammar))])["r", 0]
    assert result.last is not None and result.last.error is not None
    return result.last.error.kind, result.last.error.message


def test_a_grammar_that_is_wrong_is_refused_each_time(engine: Engine) -> None:
    for _ in range(2):
        kind, message = error_of(engine, of_schema({"type": "strin"}))
        assert kind == ErrorKind.INVALID_REQUEST and "strin" in message
    assert error_of(engine, "no grammar")[0] == ErrorKind.INVALID_REQUEST
    assert engine.stats.num_running == engine.stats.num_waiting == 0


def test_what_cannot_go_together_is_refused_at_once(engine: Engine, byte_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        engine.add_request(
            GenerateRequest("r", prompt_of(5), free(grammar=of_choices("a"), ignore_eos=True))
        )
    with pytest.raises(InvalidRequest, match=r"grammar must have \[0, 262144\] bytes"):
        free(grammar="x" * 300_000)
    with pytest.raises(InvalidRequest, match="UTF-8"):
        free(grammar="\ud800")
    off = make_engine(byte_folder, structured_output="off")
    with pytest.raises(InvalidRequest, match="switched off"):
        off.add_request(GenerateRequest("r", prompt_of(5), free(grammar=of_choices("a"))))


def test_a_model_without_a_tokenizer_says_so(
    tiny_model: Callable[..., Any],
) -> None:
    engine = make_engine(tiny_model().folder)
    assert engine.grammars is None
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json"):
        engine.add_request(GenerateRequest("r", prompt_of(5), free(grammar=of_choices("a"))))


def test_random_walks_of_requests_leave_nothing_behind(engine: Engine) -> None:
    """Requests with good and bad grammars come and are aborted at any time."""
    assert engine.grammars is not None
    dice = random.Random(0)
    grammars = [of_schema(s) for s in SCHEMAS] + ["bad", of_choices("new", "er")]
    live: set[str] = set()
    for number in range(120):
        if dice.random() < 0.5:
            request_id = f"w{number}"
            sampling = free(30, grammar=dice.choice(grammars), seed=number)
            engine.add_request(GenerateRequest(request_id, prompt_of(4), sampling, n=2))
            live.add(request_id)
        if live and dice.random() < 0.2:
            engine.abort(dice.choice(sorted(live)))
        engine.step()
        engine.scheduler.check_integrity()
    while engine.scheduler.has_unfinished:
        engine.step()
    assert all(e.num_requests == 0 for e in engine.grammars._cache._entries.values())
