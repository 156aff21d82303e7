"""Check that a JSON Schema is one, without judging any value by it.

Keywords that are not known are ignored, as JSON Schema says. Each is looked at once, so the work
follows the size of the schema.
"""

# Schemas are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Callable, Iterator

from deployments.ingress.api.openai_fields import short

TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")

Check = Callable[[object], bool]
Found = tuple[str, object]  # a schema inside a schema, and its path

_SCHEMA = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "contentSchema",
    "else",
    "if",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_SCHEMAS_BY_NAME = (
    "$defs",
    "definitions",
    "dependentSchemas",
    "patternProperties",
    "properties",
)
_LIST_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")


def find_fault(schema: object) -> tuple[str, str] | None:
    """Return the path of the first fault, such as `.properties.a.type`, and what is wrong there."""
    waiting: list[Found] = [("", schema)]
    while waiting:
        path, each = waiting.pop()
        if isinstance(each, bool):
            continue
        if not isinstance(each, dict):
            return path, f"must be a schema, not {short(each)}"
        for keyword, value in each.items():
            wanted = _wrong(keyword, value)
            if wanted is not None:
                return f"{path}.{keyword}", f"must be {wanted}, not {short(value)}"
            waiting.extend(
                (f"{path}.{keyword}{rest}", inner) for rest, inner in _inner(keyword, value)
            )
    return None


def _wrong(keyword: str, value: object) -> str | None:
    """Say what a keyword's value must be, if it is something else."""
    wanted, check = _CHECKS.get(keyword, _ANYTHING)
    return None if check(value) else wanted


def _inner(keyword: str, value: object) -> Iterator[Found]:
    """List the schemas in a keyword's value, with the rest of their paths."""
    if keyword in _SCHEMA:
        yield "", value
    elif keyword in _SCHEMAS_BY_NAME and isinstance(value, dict):
        yield from ((f".{name[:80]}", inner) for name, inner in value.items())
    elif keyword in _LIST_OF_SCHEMAS or (keyword == "items" and isinstance(value, list)):
        assert isinstance(value, list)
        yield from ((f"[{at}]", inner) for at, inner in enumerate(value))
    elif keyword == "items":
        yield "", value


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_number(value) and isinstance(value, int | float) and value >= 0 and value % 1 == 0


def _are_names(value: object) -> bool:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return is_list and len(set(value)) == len(value)  # pyright: ignore[reportArgumentType]


def _is_type(value: object) -> bool:
    if isinstance(value, str):
        return value in TYPES
    return _are_names(value) and bool(value) and set(value) <= set(TYPES)  # pyright: ignore


def _are_dependencies(value: object) -> bool:
    return isinstance(value, dict) and all(map(_are_names, value.values()))


def _checks() -> dict[str, tuple[str, Check]]:
    def of(wanted: str, check: Check, *keywords: str) -> dict[str, tuple[str, Check]]:
        return dict.fromkeys(keywords, (wanted, check))

    def is_positive(value: object) -> bool:
        return _is_number(value) and isinstance(value, int | float) and value > 0

    def is_text(value: object) -> bool:
        return isinstance(value, str)

    counts = ("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties")
    texts = ("$ref", "$id", "$schema", "$anchor", "$dynamicRef", "$comment", "title")
    return {
        **of(f"one or several of {', '.join(TYPES)}", _is_type, "type"),
        **of("a list", lambda value: isinstance(value, list), "enum", "examples"),
        **of("a list of names, each once", _are_names, "required"),
        **of("an object of lists of names", _are_dependencies, "dependentRequired"),
        **of("an object of schemas", lambda value: isinstance(value, dict), *_SCHEMAS_BY_NAME),
        **of("a list of schemas", lambda v: isinstance(v, list) and bool(v), *_LIST_OF_SCHEMAS),
        **of("text", is_text, *texts, "description", "pattern", "format"),
        **of("a number of at least 0", _is_count, *counts, "minContains", "maxContains"),
        **of("a number", _is_number, "minimum", "maximum"),
        **of("a number above 0", is_positive, "multipleOf"),
        **of("true or false", lambda value: isinstance(value, bool), "uniqueItems", "deprecated"),
    }


_CHECKS = _checks()
_ANYTHING: tuple[str, Check] = ("", lambda value: True)
