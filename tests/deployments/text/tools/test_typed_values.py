"""The tool's schema decides what an argument without a type is."""

import time
from typing import Any

import pytest

from deployments.text.tools.typed_values import ANY, ArgumentTypes, typed_value


@pytest.mark.parametrize(
    ("text", "types", "wanted"),
    [
        ("0042", ["string"], '"0042"'),
        ("42", ["string"], '"42"'),
        ("42", ["integer"], "42"),
        (" 42\n", ["integer"], "42"),
        ("42.0", ["integer"], "42.0"),
        ("42.5", ["integer"], '"42.5"'),
        ("0042", ["integer"], '"0042"'),
        ("42", ["number"], "42"),
        ("1e3", ["number"], "1e3"),
        ("NaN", ["number"], '"NaN"'),
        ("True", ["boolean"], "true"),
        ("True", ["string", "boolean"], "true"),
        ("None", ["null", "integer"], "null"),
        ("null", ["string"], '"null"'),
        ("null", ["string", "null"], "null"),
        ('{"a": [1]}', ["object"], '{"a": [1]}'),
        ("{'a': 1}", ["object"], "\"{'a': 1}\""),
        ("[1]", ["array", "string"], "[1]"),
        ('say "hi"\n', ["string"], '"say \\"hi\\"\\n"'),
        ("[" * 5000, ["array"], '"' + "[" * 5000 + '"'),
        ("true", list(ANY), "true"),
        ("True", list(ANY), '"True"'),
        ('"a"', list(ANY), '"\\"a\\""'),
        ("a b", list(ANY), '"a b"'),
    ],
)
def test_a_value_is_what_its_types_say(text: str, types: list[str], wanted: str) -> None:
    assert typed_value(text, frozenset(types)) == wanted


def test_what_the_model_says_of_a_value_counts_more() -> None:
    assert typed_value("42", frozenset(["integer"]), is_string=True) == '"42"'
    assert typed_value("42", frozenset(["string"]), is_string=None) == '"42"'
    assert typed_value("[4]", frozenset(["integer"]), is_string=False) == "[4]"


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, ["string"]),
        ({"type": ["string", "null"]}, ["string", "null"]),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ["string", "integer"]),
        ({"oneOf": [{"const": 1}, {"enum": ["a", None]}]}, ["integer", "string", "null"]),
        ({"$ref": "#/$defs/a~1b"}, ["boolean"]),
        ({"allOf": [{"$ref": "#/$defs/a~1b"}]}, ["boolean"]),
        ({"$ref": "#/$defs/loop"}, list(ANY)),
        ({"$ref": "#/nowhere"}, list(ANY)),
        ({"$ref": "http://elsewhere"}, list(ANY)),
        ({}, list(ANY)),
        (True, list(ANY)),
    ],
)
def test_types_are_found_in_the_schema(schema: Any, types: list[str]) -> None:
    defs = {"a/b": {"type": "boolean"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}] * 2}}
    root = {"properties": {"a": schema}, "$defs": defs}
    assert ArgumentTypes(root).of("a") == frozenset(types)


def test_properties_are_found_in_what_a_schema_is_made_of() -> None:
    inner = {"properties": {"a": {"type": "string"}}}
    root = {"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": inner}}
    assert ArgumentTypes(root).of("a") == {"string"}
    others = {"additionalProperties": {"type": "integer"}}
    assert ArgumentTypes(others).of("b") == {"integer"}
    assert ArgumentTypes(None).of("b") == ANY


def test_schemas_that_refer_to_themselves_many_times_cost_little() -> None:
    many = {"anyOf": [{"$ref": f"#/$defs/{number}"} for number in range(1000)]}
    root = {"properties": {"a": many}, "$defs": {str(number): many for number in range(1000)}}
    began = time.thread_time()
    assert ArgumentTypes(root).of("a") == ANY
    assert time.thread_time() - began < 0.2
