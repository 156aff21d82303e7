"""What an answer must match, from a request's fields to the grammar that the engine gets."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from deployments.config_sections import IngressSection
from deployments.ingress.structured.constraint import (
    WHITESPACE,
    Constraint,
    ConstraintRefused,
    to_grammar,
)
from deployments.ingress.structured.keywords import ENFORCED, FORMATS, NOT_ENFORCED
from deployments.ingress.structured.schema import MAX_DEPTH, MAX_SCHEMAS, Preparation, SchemaRefused
from tests.deployments.support.fakes import EOS, Server, byte_tokenizer, in_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TAG = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "null"}, "end": "</f>"},
        {"begin": "[B]", "schema": {"type": "boolean"}, "end": ""},
    ],
    "triggers": ["<f=", "["],
}
LENIENT = IngressSection(max_body_bytes=100_000, lenient_schemas=True)


def prompt_of(path: str) -> dict[str, Any]:
    if path == CHAT:
        return {"messages": [{"role": "user", "content": "x"}]}
    return {"prompt": "x"}


def parts_of(grammar: str | None) -> dict[str, Any]:
    assert grammar is not None
    [part] = json.loads(grammar)["grammars"]
    return part


def schema_of(grammar: str | None) -> dict[str, Any]:
    schema = parts_of(grammar)["json_schema"]
    options = schema.pop("x-guidance")
    assert options["whitespace_pattern"] == WHITESPACE
    return schema


# ---- fields ----


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, SCHEMA),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            SCHEMA,
        ),
        ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, SCHEMA),
        ({"structured_outputs": {"json_object": True}}, {"type": "object"}),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, SCHEMA),
    ],
    ids=str,
)
def test_the_engine_gets_the_schema(
    path: str, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(path, **prompt_of(path), **fields)
        assert answer.status == 200, answer.body
        [request] = server.engine.requests
        assert schema_of(request.sampling.grammar) == expected
        assert "x-reef-not-enforced" not in answer.headers

    in_server(test)


@pytest.mark.parametrize(
    ("fields", "lark"),
    [
        ({"structured_outputs": {"choice": ["a", 'b"\n']}}, 'start: "a" | "b\\"\\n"'),
        ({"guided_choice": ["é"]}, 'start: "é"'),
        ({"structured_outputs": {"regex": r"a/b\/c\\/d"}}, r"start: /a\/b\/c\\\/d/"),
        ({"guided_regex": "[ab]+"}, "start: /[ab]+/"),
        ({"guided_grammar": 'start: "x"'}, 'start: "x"'),
        ({"structured_outputs": {"grammar": '{"grammars": []}'}}, '{"grammars": []}'),
    ],
    ids=str,
)
def test_the_engine_gets_the_grammar(fields: dict[str, Any], lark: str) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt=["x", "y"], n=2, **fields)
        assert answer.status == 200, answer.body
        grammars = {request.sampling.grammar for request in server.engine.requests}
        assert len(server.engine.requests) == 2 and len(grammars) == 1
        assert parts_of(grammars.pop()) == {"lark_grammar": lark}

    in_server(test)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}, "guided_json": "", "guided_choice": []},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_no_grammar(fields: dict[str, Any]) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="x", **fields)
        assert answer.status == 200
        assert server.engine.requests[0].sampling.grammar is None

    in_server(test)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_object", "colour": 1}},
            "response_format.colour",
            "not known",
        ),
        (
            {"structured_outputs": {"json": {}, "regex": "a"}},
            "structured_outputs",
            "exactly one of",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, None, "not JSON"),
        ({"structured_outputs": {"structural_tag": "[]"}}, None, "must be an object"),
        ({"structured_outputs": {"whitespace_pattern": "x"}}, None, "not supported"),
        ({"response_format": {**TAG, "colour": 1}}, "response_format.colour", "not known"),
        (
            {"response_format": {**TAG, "triggers": []}},
            "response_format.triggers",
            "1 to 256 strings",
        ),
        (
            {"response_format": {**TAG, "triggers": ["<x"]}},
            "response_format.tags[0].begin",
            "begins with no trigger",
        ),
        (
            {"structured_outputs": {"structural_tag": {"format": {"type": "qwen_xml"}}}},
            "structured_outputs.structural_tag.format.type",
            "not 'qwen_xml'",
        ),
        (
            {
                "structured_outputs": {
                    "structural_tag": {
                        "format": {"type": "json_schema", "json_schema": {"not": {}}}
                    }
                }
            },
            "structured_outputs.structural_tag.format.json_schema",
            "not at the top cannot be enforced",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to 1024"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "non-empty strings"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice", "1 to 1024"),
        ({"guided_regex": 3}, "guided_regex", "string"),
        ({"guided_json": 3}, "guided_json", "JSON schema"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_json": "3"}, "guided_json", "must be a schema"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, None, "together"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
        (
            {"guided_json": {"properties": {"a": {"not": {}}}}},
            "guided_json",
            "not at /properties/a cannot be enforced",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_a_400_that_says_where(
    fields: dict[str, Any], param: str | None, words: str
) -> None:
    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="x", **fields)
        assert answer.status == 400, answer.body
        assert words in answer.error["message"]
        assert param is None or answer.error["param"] == param

    in_server(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_lenient_server_says_what_it_does_not_enforce(stream: bool) -> None:
    schema = {
        "properties": {"é": {"uniqueItems": True, "type": "array"}},
        "oneOf": [{}, {}],
        "not": {},
    }

    async def test(server: Server) -> None:
        answer = await server.post(COMPLETIONS, prompt="x", guided_json=schema, stream=stream)
        assert answer.status == 200
        assert answer.headers["x-reef-not-enforced"] == (
            "uniqueItems at /properties/%C3%A9; oneOf (as anyOf) at the top; not at the top"
        )
        [request] = server.engine.requests
        assert parts_of(request.sampling.grammar)["json_schema"]["x-guidance"]["coerce_one_of"]

    in_server(test, ingress_settings=LENIENT)


# ---- structural tags ----


def tagged(tag: Any, ids: Mapping[str, int] | None = None) -> str:
    return to_grammar(Constraint("structural_tag", tag, "tag"), False, lambda texts: ids or {}).text


def allows(grammar: str, text: str, token: int = 0) -> bool:
    """Tell whether the text may be a whole answer; a NUL in it stands for the token."""
    matcher = LLMatcher(byte_table(), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = [token if byte == 0 else byte for byte in text.encode()]
    return all(matcher.consume_token(i) for i in tokens) and bool(
        matcher.compute_bitmask()[EOS // 8] >> EOS % 8 & 1
    )


@cache
def byte_table() -> LLTokenizer:
    return LLTokenizer(byte_tokenizer().to_str(), eos_token=EOS)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        ("no tag < f=a", True),
        ("so: <f=a>12</f> and <f=b>null</f>[B]true. <", True),
        ("<f=a>x</f>", False),
        ("<f=b>12</f>", False),
        ("<f=c>1</f>", False),
        ("<f=a>12", False),
        ("a [", False),
    ],
)
def test_tags_hold_what_stands_behind_a_trigger(text: str, fits: bool) -> None:
    assert allows(tagged(TAG), text) is fits
    assert allows(tagged(json.dumps(TAG)), text) is fits


TEXT_TAG = {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}
INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
NUMBER_TAG = {"type": "tag", "begin": "<n>", "content": INTEGER, "end": "</n>"}


@pytest.mark.parametrize(
    ("part", "right", "wrong"),
    [
        ({"type": "const_string", "value": 'a"'}, ['a"'], ["", 'a""']),
        ({"type": "regex", "pattern": "a/+"}, ["a/", "a//"], ["a"]),
        (TEXT_TAG, ["<a></a>", "<a>x<</a>"], ["<a>", "<a></a></a>", "x<a></a>"]),
        (
            {"type": "sequence", "elements": [NUMBER_TAG, TEXT_TAG]},
            ["<n>1</n><a></a>"],
            ["<n>1</n>"],
        ),
        (
            {"type": "or", "elements": [NUMBER_TAG, TEXT_TAG]},
            ["<n>1</n>", "<a></a>"],
            ["<n></n>", ""],
        ),
        (
            {"type": "tags_with_separator", "tags": [NUMBER_TAG, TEXT_TAG], "separator": ", "},
            ["", "<n>1</n>", "<n>1</n>, <a></a>"],
            [", ", "<n>1</n>, ", "<n>1</n><a></a>"],
        ),
        (
            {
                "type": "triggered_tags",
                "triggers": ["<n"],
                "tags": [NUMBER_TAG],
                "at_least_one": True,
            },
            ["<n>1</n>", "x<n>1</n><<n>1</n>y"],
            ["", "x"],
        ),
        (
            {
                "type": "triggered_tags",
                "triggers": ["<"],
                "tags": [NUMBER_TAG],
                "stop_after_first": True,
            },
            ["x<n>1</n>", "x"],
            ["<n>1</n>x", "<"],
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_formats_are_made_of_parts(part: Any, right: list[str], wrong: list[str]) -> None:
    grammar = tagged({"type": "structural_tag", "format": part})
    assert [allows(grammar, text) for text in right] == [True] * len(right)
    assert [allows(grammar, text) for text in wrong] == [False] * len(wrong)


def test_marks_of_tags_are_tokens_where_the_vocabulary_has_them() -> None:
    grammar = tagged({"format": NUMBER_TAG}, {"<n>": EOS + 1})
    assert allows(grammar, "\0" + "1</n>", EOS + 1) and not allows(grammar, "<n>1</n>")


# ---- schemas ----


def prepared(schema: Any) -> Any:
    return Preparation().prepare(schema)


def test_what_only_describes_is_left_out() -> None:
    schema = {
        "title": "T",
        "description": "d",
        "default": 1,
        "examples": [1],
        "x-order": 1,
        "$comment": "",
        "deprecated": True,
        "x-guidance": {"lenient": True},
        "then": {"not": {}},
        "minContains": 2,
        "uniqueItems": False,
        "unevaluatedProperties": True,
        "dependentRequired": {},
        "type": "string",
        "format": "uri-reference",
        "properties": {"title": {"format": "color"}, "not": {"format": "uuid"}},
    }
    kept = {"type": "string", "properties": {"title": {}, "not": {"format": "uuid"}}}
    assert prepared(schema) == kept


def test_values_that_are_no_schemas_stay_as_they_are() -> None:
    for keyword in ("enum", "const"):
        schema = {keyword: [{"title": 1, "not": {}, "format": "x"}]}
        assert prepared(schema) == schema


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"not": {}}, "not at the top"),
        ({"if": {}, "then": {}}, "if at the top"),
        ({"uniqueItems": True}, "uniqueItems at the top"),
        ({"propertyNames": {"maxLength": 1}}, "propertyNames at the top"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired at the top"),
        ({"contains": {}}, "contains at the top"),
        ({"anyOf": [{}, {"items": {"not": {}}}]}, "not at /anyOf/1/items"),
        ({"items": [{}, {"not": {}}]}, "not at /items/1"),
        ({"$defs": {"a/b~": {"if": {}}}}, "if at /$defs/a~1b~0"),
        ({"properties": {"a": {"pattern": "(?=a)b"}}}, "pattern with a look-around at /prop"),
        ({"$ref": "https://example.com/s"}, "/$ref must begin with #"),
        ({"items": {"$ref": 3}}, "/items/$ref must begin with #"),
        ({"properties": []}, "/properties must be an object of schemas"),
        ({"allOf": [3]}, "/allOf/0 must be a schema"),
        ({"additionalProperties": "no"}, "/additionalProperties must be a schema"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused_with_its_place(schema: Any, place: str) -> None:
    with pytest.raises(SchemaRefused) as refusal:
        prepared(schema)
    assert place in str(refusal.value)


def test_schemas_have_stated_limits() -> None:
    deep: Any = {}
    for _ in range(MAX_DEPTH):
        deep = {"items": deep}
    assert prepared(deep) == deep
    with pytest.raises(SchemaRefused, match=f"more than {MAX_DEPTH} levels"):
        prepared({"items": deep})
    with pytest.raises(SchemaRefused, match=f"{MAX_SCHEMAS} schemas"):
        prepared({"anyOf": [{}] * MAX_SCHEMAS})
    with pytest.raises(ConstraintRefused, match="at most 262144 are allowed"):
        to_grammar(Constraint("json", {"enum": ["x" * 300_000]}, "guided_json"))


def test_texts_that_are_no_unicode_and_values_that_are_too_deep_are_refused() -> None:
    with pytest.raises(ConstraintRefused, match="UTF-8"):
        to_grammar(Constraint("regex", "\ud800", "guided_regex"))
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConstraintRefused, match="nested too deeply"):
        to_grammar(Constraint("json", {"const": deep}, "guided_json"))


# ---- the library ----

EXAMPLES: dict[str, Any] = {
    "$anchor": "a",
    "$defs": {"a": {}},
    "$id": "https://example.com/a",
    "$ref": "#/$defs/a",
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "additionalItems": False,
    "additionalProperties": False,
    "allOf": [{}],
    "anyOf": [{}],
    "const": 1,
    "definitions": {"a": {}},
    "enum": [1],
    "format": "date",
    "items": {},
    "multipleOf": 2,
    "oneOf": [{"type": "integer"}, {"type": "string"}],
    "pattern": "a",
    "patternProperties": {"a": {}},
    "prefixItems": [{}],
    "properties": {"a": {}},
    "required": ["a"],
    "type": "integer",
}


def library_says(schema: dict[str, Any]) -> str:
    grammar = json.dumps({"grammars": [{"json_schema": {**schema, "$defs": {"a": {}}}}]})
    return LLMatcher.validate_grammar(grammar)


@pytest.mark.parametrize("keyword", sorted(ENFORCED))
def test_the_library_takes_what_the_table_says(keyword: str) -> None:
    assert library_says({keyword: EXAMPLES.get(keyword, 2)}) == ""


@pytest.mark.parametrize("keyword", sorted(NOT_ENFORCED))
def test_the_library_refuses_what_the_table_says(keyword: str) -> None:
    assert "Unimplemented keys" in library_says({keyword: {"a": ["b"]}})


def test_the_library_knows_the_formats_of_the_table() -> None:
    for name in FORMATS:
        assert library_says({"type": "string", "format": name}) == ""
    assert "Unknown format" in library_says({"type": "string", "format": "color"})
