"""Calls that a template has written are read back as they were, however the text is cut."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.text.channels import ChannelParser
from deployments.text.chat_template import ChatTemplate
from deployments.text.deltas import Delta
from deployments.text.tools.call import ToolCall
from deployments.text.tools.call_parser import CallParser
from deployments.text.tools.formats import FORMATS, ToolFormat
from deployments.text.tools.pattern import literals_of
from tests.deployments.support.tool_templates import CALLS, opening_of, template_of

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "code": {"$ref": "#/$defs/code"},
        "n": {"type": "integer"},
        "x": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "more": {"type": "object"},
        "size": {"enum": ["s", "m"]},
    },
    "$defs": {"code": {"type": ["string"]}},
}
SCHEMAS = {"stock_of": SCHEMA, "price-of": SCHEMA, "f": SCHEMA}
TEMPLATES = {name: ChatTemplate(template_of(name), {}) for name in CALLS}

Calls = Sequence[tuple[str, dict[str, Any]]]

# Pieces that look like marks, quotes or brackets of some format, and whole marks of others.
PIECES = [
    "<",
    "</",
    "tool_call",
    ">",
    '"',
    "'",
    "\\",
    "\n",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    " ",
    "é€😀",
]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=8).map("".join)
KEYS = st.sampled_from(["k", "key_2", "name"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=5,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXT,
        "code": TEXT,
        "n": st.integers(-(2**53), 2**53),
        "x": st.one_of(st.none(), st.floats(-1e9, 1e9)),
        "flag": st.booleans(),
        "items": st.lists(VALUES, max_size=3),
        "more": st.dictionaries(KEYS, VALUES, max_size=3),
        "size": st.sampled_from(["s", "m"]),
    },
)
CALL = st.tuples(st.sampled_from(list(SCHEMAS)), ARGUMENTS)


def written(name: str, calls: Calls, content: str = "") -> str:
    """What a model that was trained on this template answers."""
    documents = [
        {"id": f"abcdefgh{at}", "type": "function", "function": {"name": tool, "arguments": given}}
        for at, (tool, given) in enumerate(calls)
    ]
    answer = {"role": "assistant", "content": content, "tool_calls": documents}
    text = TEMPLATES[name].render([{"role": "user", "content": "?"}, answer], False, {})
    return text.partition(opening_of(name))[2].removesuffix("<|end|>")


def parser_of(name: str) -> CallParser | ChannelParser:
    form = FORMATS[name]
    return ChannelParser() if form.has_channels else CallParser(form, SCHEMAS)


def parsed(name: str, parts: Sequence[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The text, and the calls."""
    parser = parser_of(name)
    deltas: list[Delta] = [delta for part in parts for delta in parser.push(part)]
    deltas += parser.flush()
    text = "".join(delta for delta in deltas if isinstance(delta, str))
    calls = [delta for delta in deltas if isinstance(delta, ToolCall)]
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


def cuts(text: str) -> Iterator[list[str]]:
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


def marks_of(form: ToolFormat) -> list[str]:
    around = [*(form.section or ()), *literals_of(form.call), *literals_of(form.parameter)]
    own = ['<|"|>', "<|tool_call_end|>", "<|call|>", "<|end|>", "<|assistant|>"]
    return [mark.strip() for mark in (*around, *own)]


EXAMPLES: list[Calls] = [
    [("stock_of", {"text": 'te"a', "n": 3})],
    [("f", {})],
    [("price-of", {"code": "if a < b:\n    x = {'<': \"</\"}\n", "flag": True, "x": None})],
    [
        ("stock_of", {"text": "0042", "more": {"k": [1, {"name": "é"}]}, "x": 0.5}),
        ("f", {"text": "true", "items": ["]", {}], "size": "m"}),
    ],
]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("calls", EXAMPLES, ids=range(len(EXAMPLES)))
def test_calls_are_read_back_wherever_the_text_is_cut(name: str, calls: Calls) -> None:
    calls = calls[:1] if name == "llama-3" else calls
    for parts in cuts(written(name, calls)):
        assert parsed(name, parts) == ("", list(calls)), parts


@pytest.mark.parametrize("name", CALLS)
def test_random_calls_are_read_back(name: str) -> None:
    check_random_calls(name, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_many_random_calls_are_read_back(name: str) -> None:
    check_random_calls(name, 1500)


def check_random_calls(name: str, num: int) -> None:
    marks = marks_of(FORMATS[name])
    most = 1 if name == "llama-3" else 3

    @settings(max_examples=num, deadline=None)
    @given(st.lists(CALL, min_size=1, max_size=most), st.integers(1, 7))
    def check(calls: Calls, length: int) -> None:
        if any(mark in text for text in texts_in(calls) for mark in marks):
            return  # no format escapes its own marks
        text = written(name, calls)
        wanted = ("", list(calls))
        assert parsed(name, [text]) == wanted
        assert (
            parsed(name, [text[at : at + length] for at in range(0, len(text), length)]) == wanted
        )

    check()


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in(list(value.items()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("llama-3", "gpt-oss")])
def test_text_around_calls_stays(name: str) -> None:
    calls = EXAMPLES[0]
    text = written(name, calls, "I look <b>it</b> up [1].")
    wanted = "I look <b>it</b> up [1]. Done {}."
    for parts in cuts(text + "\nDone {}."):
        shown, found = parsed(name, parts)
        assert (shown.split(), found) == (wanted.split(), calls), parts


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_cut_off_stays_text(name: str) -> None:
    """At any length: either it is whole, but for what closes it, or nothing of it is lost."""
    calls = EXAMPLES[0]
    text = written(name, calls)
    for length in range(len(text)):
        begun = text[:length]
        shown, found = parsed(name, list(begun))
        assert (shown, found) == (begun, []) or (shown, found) == ("", list(calls)), begun


@pytest.mark.parametrize("name", CALLS)
def test_text_that_looks_like_calls_stays_text(name: str) -> None:
    form = FORMATS[name]
    if form.has_channels:
        return
    pieces = [*marks_of(form), "f", '{"name": "f"', "}", "\n", "{", "<", "text "]

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.sampled_from(pieces), max_size=12).map("".join), st.integers(1, 5))
    def check(text: str, length: int) -> None:
        shown, found = parsed(name, [text[at : at + length] for at in range(0, len(text), length)])
        whole = parsed(name, [text])
        assert (shown, found) == whole, "cuts make no difference"
        assert found or shown == text

    check()


@pytest.mark.parametrize("name", CALLS)
def test_a_long_answer_of_beginnings_costs_little(name: str) -> None:
    form = FORMATS[name]
    if form.has_channels:
        return
    beginnings = ["".join(marks_of(form)[:number]) for number in (1, 2, 3)]
    beginnings += [beginnings[0] + '{"a":"', beginnings[0] + "{[" * 20, beginnings[-1] + '"}']
    for beginning in beginnings:
        parts = [beginning] * (30_000 // len(beginning))
        began = time.thread_time()
        parsed(name, parts)
        parsed(name, ["".join(parts)])
        assert time.thread_time() - began < 1.0, beginning


def test_a_broken_call_does_not_hide_the_next_one() -> None:
    broken = '<tool_call>\n{"name": "f", "arguments": {"n": 1}\n</tool_call>\n'
    right = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>'
    assert parsed("hermes", list(broken + right)) == (broken.rstrip(), [("f", {"n": 1})])


def test_arguments_may_be_written_as_a_text_once_more() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"n\\": 1}"}</tool_call>'
    assert parsed("hermes", [text]) == ("", [("f", {"n": 1})])


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f"}',
        '{"arguments": {}}',
        '{"name": "no name", "arguments": {}}',
        '{"name": 5, "arguments": {}}',
        '{"name": "f", "arguments": []}',
        '{"name": "f", "arguments": "nothing"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {},}',
        "[]",
        "[5]",
        "5",
        '{"a": ' + "[" * 100 + "]" * 100 + "}",
    ],
)
def test_json_that_is_no_call_stays_text(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>"
    assert parsed("hermes", list(text)) == (text, [])


@pytest.mark.parametrize(
    "body",
    [
        "f(1)",
        "[f(1)]",
        "[f(*a)]",
        "[f(**a)]",
        "[f.g(a=1)]",
        "[f(a=b)]",
        "[f(a=1j)]",
        "[f(a={1: 2})]",
        "[f(a=1e999)]",
        "[f(a='\\ud83d')]",
        "[f(a=" + "-" * 5000 + "1)]",
        "[f(a=" + "9" * 5000 + ")]",
        "[]",
        "[f(a=1]",
    ],
)
def test_python_that_is_no_list_of_calls_stays_text(body: str) -> None:
    text = f"<|tool_call_start|>{body}<|tool_call_end|>"
    assert parsed("lfm-2", list(text)) == (text, [])


def test_an_answer_in_json_is_no_call_of_an_unknown_tool() -> None:
    for text in ('{"name": "Bob", "parameters": {}}', '{"a": 1}', "[1]", '  {"name": "f"'):
        assert parsed("llama-3", list(text)) == (text, [])
    assert parsed(
        "llama-3", list('{"name": "f", "parameters": {}}; {"name": "f", "arguments": {}}')
    ) == (
        "",
        [("f", {}), ("f", {})],
    )
