"""Shapes: what a JSON schema allows as a list of plain types, for calls that are no JSON.

Where a model writes arguments in a notation of its own, no library holds it to a schema. What is
not an alternative of types, values and their limits is refused by keyword and place.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from deployments.ingress.structured.lark import ANY_TEXT, regex
from deployments.ingress.structured.schema import SchemaRefused

MAX_REFERENCES = 32  # one behind the other
MAX_ALTERNATIVES = 1000  # that are looked at for one value

_NAMES = {"$defs", "definitions", "$id", "$schema", "$anchor"}
_OF_TYPE: Mapping[str, set[str]] = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
    "array": {"items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_OF_ANY_TYPE = {keyword for keywords in _OF_TYPE.values() for keyword in keywords}

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """A type with its limits, one of some values, or, as the type "any", anything."""

    type: str
    schema: Schema
    place: str
    values: Sequence[Any] | None = None


def shapes_of(schema: object, root: Schema, place: str) -> list[Shape]:
    """List the alternatives of a schema. Raises SchemaRefused."""
    return _Search(root).of(schema, place, 0)


@dataclass(slots=True)
class _Search:
    root: Schema
    num_looked_at: int = 0

    def of(self, schema: object, place: str, num_references: int) -> list[Shape]:
        self.num_looked_at += 1
        if self.num_looked_at > MAX_ALTERNATIVES:
            raise SchemaRefused(f"there are more than {MAX_ALTERNATIVES} alternatives at {place}")
        if schema is True or schema is None:
            return [Shape("any", {}, place)]
        if not isinstance(schema, dict):
            return []
        given = _without_names(cast(dict[str, Any], schema))
        if "$ref" in given:
            _only(given, {"$ref"}, place)
            if num_references == MAX_REFERENCES:
                raise SchemaRefused(f"$ref at {place} refers to itself")
            return self.of(_resolved(given["$ref"], self.root, place), place, num_references + 1)
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in given:
                return self._combined(keyword, given, place, num_references)
        return list(_typed(given, place))

    def _combined(
        self, keyword: str, given: Schema, place: str, num_references: int
    ) -> list[Shape]:
        _only(given, {keyword}, place)
        parts: list[object] = given[keyword]
        if keyword == "allOf" and len(parts) > 1:
            raise _refused(keyword, place)
        shapes: list[Shape] = []
        for at, part in enumerate(parts):
            shapes += self.of(part, f"{place}/{keyword}/{at}", num_references)
        if keyword == "oneOf" and not _differ(shapes):
            raise _refused(keyword, place)
        return shapes


def _without_names(schema: Schema) -> dict[str, Any]:
    return {keyword: value for keyword, value in schema.items() if keyword not in _NAMES}


def _differ(shapes: Sequence[Shape]) -> bool:
    """Tell whether no value is of two of the shapes."""
    types = ["number" if shape.type == "integer" else shape.type for shape in shapes]
    return len(set(types)) == len(types) and "any" not in types and "values" not in types


def _typed(given: Schema, place: str) -> Iterator[Shape]:
    if "const" in given or "enum" in given:
        _only(given, {"const", "enum", "type"}, place)
        values = [given["const"]] if "const" in given else list(given["enum"])
        yield Shape("values", given, place, values)
        return
    named = given.get("type")
    if named is None:
        _only(given, set(), place)
        yield Shape("any", {}, place)
        return
    _only(given, {"type", *_OF_ANY_TYPE}, place)
    for kind in [named] if isinstance(named, str) else cast("list[str]", named):
        limits = {k: v for k, v in given.items() if k in _OF_TYPE[kind]}
        yield Shape(kind, {"type": kind, **limits}, place)


def _only(given: Schema, known: set[str], place: str) -> None:
    for keyword in given:
        if keyword not in known:
            raise _refused(keyword, place)


def _refused(keyword: str, place: str) -> SchemaRefused:
    return SchemaRefused(
        f"{keyword} at {place or 'the top'} cannot be enforced in the way this model writes calls"
    )


def _resolved(reference: str, root: Schema, place: str) -> object:
    found: object = root
    for part in reference.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and part.isdecimal():
            found = dict(enumerate(cast("list[object]", found))).get(int(part))
        elif isinstance(found, dict):
            found = cast("dict[str, object]", found).get(part)
        else:
            found = None
    if found is None:
        raise SchemaRefused(f"$ref at {place or 'the top'} leads nowhere")
    return found


def properties_of(schema: Schema, place: str = "") -> tuple[Mapping[str, Any], Sequence[str]]:
    """List the properties of an object's schema, and which of them must be there.

    Raises SchemaRefused.
    """
    [shape] = _typed({**_without_names(schema), "type": "object"}, place)
    properties: Mapping[str, Any] = shape.schema.get("properties", {})
    required: Sequence[str] = shape.schema.get("required", ())
    for name in required:
        if name not in properties:
            raise SchemaRefused(f"required at {place or 'the top'} names {name!r}, no property")
    return properties, required


def string_terms(shape: Shape) -> list[str]:
    """List expressions that a text must match, each of them. `format` is not among them."""
    terms: list[str] = []
    least, most = shape.schema.get("minLength", 0), shape.schema.get("maxLength", "")
    if least or most != "":
        terms.append(f"/(?s:.{{{least:.0f},{most if most == '' else int(most)}}})/")
    pattern: str | None = shape.schema.get("pattern")
    if pattern is not None:
        terms.append(_searched(pattern))
    return terms or [ANY_TEXT]


def _searched(pattern: str) -> str:
    """Write what contains a match of a pattern, of which only the ends may be anchored."""
    any_text = "(?s:.*)"
    before = "" if pattern.startswith("^") else any_text
    is_anchored = pattern.endswith("$") and not pattern.endswith("\\$")
    after = "" if is_anchored else any_text
    inner = pattern.removeprefix("^")
    inner = inner[:-1] if is_anchored else inner
    return regex(f"{before}(?:{inner}){after}")
