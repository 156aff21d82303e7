"""Schemas of tools are checked as jsonschema checks them, at a cost that follows their size."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from deployments.ingress.api.json_schema import find_fault

SIMPLE: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}}
WORDS = st.sampled_from(["string", "object", "a", "", "#/$defs/a"])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.just(0.5), WORDS)
NAMES = (
    "type enum const required properties items prefixItems anyOf allOf not additionalProperties "
    "minLength maximum multipleOf uniqueItems description $ref $defs pattern if "
    "dependentRequired minItems propertyNames unknown"
)
KEYWORDS = st.sampled_from(NAMES.split())
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYWORDS, inner, max_size=3),
        st.dictionaries(WORDS, inner, max_size=2),
        st.lists(inner, max_size=2),
    ),
    max_leaves=8,
)


def is_schema(schema: Any) -> bool:
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYWORDS, SCHEMAS, max_size=3))
def test_what_jsonschema_refuses_is_refused(schema: Any) -> None:
    """And nothing else, but for lists in `items`, which drafts before 2020-12 have."""
    if not has_items_list(schema):
        assert (find_fault(schema) is None) == is_schema(schema)


def has_items_list(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("items"), list) or any(map(has_items_list, value.values()))
    return isinstance(value, list) and any(map(has_items_list, value))


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "objekt"}, ".type"),
        ({"type": []}, ".type"),
        ({"properties": {"a": {"type": 5}}}, ".properties.a.type"),
        ({"properties": {"a": 5}}, ".properties.a"),
        ({"properties": ["a"]}, ".properties"),
        ({"anyOf": [True, {"items": {"enum": 5}}]}, ".anyOf[1].items.enum"),
        ({"items": [{}, {"not": 1}]}, ".items[1].not"),
        ({"required": ["a", "a"]}, ".required"),
        ({"minLength": -1}, ".minLength"),
        ({"minLength": True}, ".minLength"),
        ({"maximum": "5"}, ".maximum"),
        ({"multipleOf": 0}, ".multipleOf"),
        ({"$defs": {"x": {"allOf": []}}}, ".$defs.x.allOf"),
        (5, ""),
    ],
)
def test_a_fault_is_named_by_its_place(schema: Any, path: str) -> None:
    fault = find_fault(schema)
    assert fault is not None and fault[0] == path


def test_numbers_of_any_size_are_numbers() -> None:
    assert find_fault({"maximum": 10**400, "minLength": 10**400}) is None
    assert find_fault({"maximum": float("inf")}) is not None


def test_the_longest_schemas_cost_little() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"properties": {"a": deep}}
    wide = {"properties": {f"{number}": {"type": "string"} for number in range(8000)}}
    many = {"anyOf": [{"enum": [1]}] * 15_000}
    for schema in (deep, wide, many):
        assert len(json.dumps(schema)) < 2**18
        began = time.thread_time()
        assert find_fault(schema) is None
        assert time.thread_time() - began < 3, "0.64 s were seen on a slow host"
