"""Grammars that are made to take for ever, to fill the memory or to crash: they cost their own
request an error, and others neither a step nor their grammar."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.grammar.limits import COMPILE_CPU_S
from engine.messages import ErrorKind, GenerateRequest
from engine.scheduler.request import SamplingParams
from tests.engine.support.driver import Result, finish, make_engine, prompt_of
from tests.engine.support.grammars import of_choices, of_lark, of_regex, of_schema, run_all


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema, "type": "array"}
    return schema


def doubled(count: int) -> dict[str, Any]:
    """Make a schema of 2 ** count alternatives."""
    options = [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(count)]
    return {"type": "object", "allOf": options}


QUICK = {
    "no JSON": "{",
    "empty": "",
    "not Lark": of_lark("start"),
    "no start": of_lark('other: "x"'),
    "unknown rule": of_lark("start: other"),
    "nothing matches": of_schema({"type": "string", "minLength": 3, "maxLength": 2}),
    "a reference to itself": of_schema({"$ref": "#"}),
    "a reference to nothing": of_schema({"$ref": "#/$defs/x"}),
    "a type that is none": of_schema({"type": 3}),
    "deep JSON": of_schema(nested(200)),
    "look-ahead": of_regex("(?=a)b"),
    "back reference": of_regex(r"(a)\1"),
    "a brace that is open": of_regex("a{"),
    "null characters": of_lark('start: "\0"\0'),
    "many parentheses": of_lark("start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "many groups": of_regex("(" * 50_000 + "a" + ")" * 50_000),
}
SLOW = {
    "long repetition": of_regex("(a{1000}){1000}"),
    "very long repetition": of_regex("x{1,100000000}"),
    "exponential states": of_regex("(.*a.{60}|.*b.{61})*"),
    "long string": of_schema({"type": "string", "minLength": 10**9}),
    "many items": of_schema({"type": "array", "minItems": 10**9}),
    "alternatives": of_schema(doubled(30)),
    "many words": of_choices(*(f"{i:x}" * 6 for i in range(8_000))),
    "ambiguity": of_lark('start: a\na: a a | a a a | "x" |'),
    "repeated ambiguity": of_lark('start: (a | b)*\na: "x"*\nb: "x"* a*'),
    "intersections": of_lark("start: A\nA: " + " & ".join(f"/(.*{c}.*){{9}}/" for c in "abcdefgh")),
    "complement": of_lark("start: A\nA: ~/(.*a.{40})/"),
}


@pytest.fixture(scope="module")
def busy(byte_folder: Path) -> Iterator[Engine]:
    engine = make_engine(byte_folder, max_model_len=1024)
    run_all(engine, [request_of("first", of_choices("a"))])
    yield engine
    engine.close()


def request_of(request_id: str, grammar: str | None, max_tokens: int = 40) -> GenerateRequest:
    is_free = grammar is None
    sampling = SamplingParams(max_tokens=max_tokens, grammar=grammar, ignore_eos=is_free)
    return GenerateRequest(request_id, prompt_of(5), sampling, tenant=request_id)


def survive(engine: Engine, grammar: str) -> Result:
    """Run a grammar beside others' requests; return how its request ended."""
    assert engine.grammars is not None
    link = engine.grammars._cache.find(of_choices("a")).link
    assert link is not None
    engine.add_request(request_of("hostile", grammar))
    engine.add_request(request_of("plain", None))
    engine.add_request(request_of("kept", of_choices("a")))
    slowest_s, results = 0.0, {}
    while engine.scheduler.has_unfinished:
        start_s = time.monotonic()
        for output in engine.step():
            results.setdefault(output.request_id, Result()).add(output)
        slowest_s = max(slowest_s, time.monotonic() - start_s)
        if engine.is_idle:
            time.sleep(0.001)
    assert len(results["plain"].token_ids) == 40
    assert results["kept"].token_ids[0] == ord("a")
    assert slowest_s < 1.0, f"a step took {slowest_s} s"
    assert engine.grammars._cache.find(of_choices("a")).link is link, "the process was lost"
    return results["hostile"]


@pytest.mark.parametrize("name", QUICK)
def test_what_is_no_grammar_is_refused(busy: Engine, name: str) -> None:
    last = survive(busy, QUICK[name]).last
    assert last is not None and last.error is not None, f"{name} was taken"
    assert last.error.kind == ErrorKind.INVALID_REQUEST and last.error.message


@pytest.mark.parametrize("name", ["very long repetition", "alternatives", "ambiguity"])
def test_a_costly_grammar_costs_nobody_else(busy: Engine, name: str) -> None:
    survive(busy, SLOW[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_all_costly_grammars_cost_nobody_else(busy: Engine, name: str) -> None:
    start_s = time.monotonic()
    survive(busy, SLOW[name])
    assert time.monotonic() - start_s < 20 * COMPILE_CPU_S


def test_tenants_take_turns(busy: Engine) -> None:
    """Ten grammars of one tenant do not hold up the one of another."""
    done: list[str] = []
    for i in range(10):
        busy.add_request(
            GenerateRequest(
                f"many{i}",
                prompt_of(5),
                SamplingParams(max_tokens=8, grammar=of_choices(f"m{i}")),
                tenant="many",
            )
        )
    busy.add_request(request_of("one", of_choices("o")))
    while busy.scheduler.has_unfinished:
        done += [o.request_id for o in busy.step() if o.finish_reason]
    assert done.index("one") <= 3, done


def test_an_aborted_request_takes_its_grammar_out_of_the_queue(busy: Engine) -> None:
    assert busy.grammars is not None
    for i in range(20):
        busy.add_request(request_of(f"gone{i}", of_choices(f"gone{i}")))
        busy.abort(f"gone{i}")
    assert len(busy.grammars._cache._entries) < 64
    names = [json.loads(g)["grammars"][0] for g in busy.grammars._cache._entries if "gone" in g]
    assert len(names) <= 1
    finish(busy)


def test_a_process_that_dies_is_started_again(byte_folder: Path) -> None:
    """Its requests can go on elsewhere, from the tokens that they have."""
    engine = make_engine(byte_folder, max_model_len=1024)
    grammar = of_regex("[ab]{200}")
    run_all(engine, [request_of("first", of_choices("a"))])
    engine.add_request(request_of("lost", grammar, 300))
    engine.add_request(request_of("plain", None, 300))
    output: list[int] = []
    while len(output) < 3:
        output += [t for o in engine.step() if o.request_id == "lost" for t in o.token_ids]
    assert engine.grammars is not None
    link = engine.grammars._cache.find(grammar).link
    assert link is not None
    os.kill(link.pid, signal.SIGKILL)
    results = finish(engine)
    last = results["lost", 0].last
    assert last is not None and last.error is not None
    assert last.error.kind == ErrorKind.ENGINE_DIED
    assert results["plain", 0].last and results["plain", 0].last.error is None
    again = request_of("again", grammar, 300)
    again.output_token_ids.extend([*output, *results["lost", 0].token_ids])
    result = run_all(engine, [again])["again", 0]
    assert result.last and result.last.finish_reason == "stop"
    engine.close()
