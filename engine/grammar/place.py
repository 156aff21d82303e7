"""Finds the part of a JSON schema that a compiler refuses, because its errors do not say where."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

SEARCH_CPU_S = 0.5

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_SHARED = ("$defs", "definitions", "x-guidance")  # by all parts


def schemas_of(grammar: str) -> list[tuple[str, dict[str, Any]]]:
    """List the schemas in a grammar, each with the path that it was given, if any."""
    try:
        parts: list[dict[str, Any]] = json.loads(grammar)["grammars"]
        found = [(str(p.get("path", "")), p["json_schema"]) for p in parts if "json_schema" in p]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    return [(path, schema) for path, schema in found if isinstance(schema, dict)]


def find_place(schema: dict[str, Any], error_of: Callable[[dict[str, Any]], str | None]) -> str:
    """Find the innermost schema that by itself is refused with the same error: a JSON pointer.

    The search gives up after a while, with the place that it has come to.
    """
    shared = {name: schema[name] for name in _SHARED if name in schema}
    wanted, end_s = error_of(schema), time.thread_time() + SEARCH_CPU_S
    place, inside = "", _inside(schema)
    while (step := next(inside, None)) is not None:
        pointer, part = step
        if time.thread_time() > end_s:
            return place
        if error_of({**shared, **part}) == wanted:
            place, inside = place + pointer, _inside(part)
    return place


def _inside(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for keyword, value in schema.items():
        parts: list[tuple[str, object]] = []
        if keyword in _MAPS and isinstance(value, dict):
            named = cast(dict[str, object], value)
            parts = [(f"/{keyword}/{_escape(name)}", part) for name, part in named.items()]
        elif keyword in _LISTS and isinstance(value, list):
            listed = cast(list[object], value)
            parts = [(f"/{keyword}/{i}", part) for i, part in enumerate(listed)]
        elif keyword in _SINGLE:
            parts = [(f"/{keyword}", value)]
        yield from ((at, cast(dict[str, Any], p)) for at, p in parts if isinstance(p, dict))


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
