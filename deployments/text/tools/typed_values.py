"""Give types to arguments that a model has written without any: the tool's schema decides.

`0042` is a text where the schema says string, and no number; `3` is a number where it says integer.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from deployments.text.tools.json_text import decode_json

ANY = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
_TEXT = frozenset(("string",))
_NESTED = frozenset(("object", "array"))
MAX_MEMBERS = 256  # schemas that are looked at for one value

JsonObject = Mapping[str, Any]

_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}  # in any case
_KINDS: Mapping[type, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    dict: "object",
    list: "array",
}


class ArgumentTypes:
    """The types that a tool's arguments may have."""

    def __init__(self, schema: object) -> None:
        self._root = schema
        self._types: dict[str, frozenset[str]] = {}
        self._properties: dict[str, object] = {}
        self._others: object = {}
        for member in _members(schema, schema):
            properties: object = member.get("properties")
            if isinstance(properties, Mapping):
                self._properties = {**cast(JsonObject, properties), **self._properties}
            self._others = self._others or member.get("additionalProperties")

    def of(self, name: str) -> frozenset[str]:
        if name not in self._types:
            schema = self._properties.get(name, self._others)
            self._types[name] = _types(schema, self._root)
        return self._types[name]

    def are_nested(self, name: str) -> bool:
        """Tell whether it may be an object or a list: marks in their texts end nothing."""
        types = self.of(name)
        return types != ANY and not types.isdisjoint(_NESTED)


def typed_value(text: str, types: frozenset[str], is_string: bool | None = None) -> str:
    """Write a value as JSON. `is_string` is what the model has said about it, if it says so."""
    if is_string or types == _TEXT:
        return quoted(text)
    bare = text.strip()
    if types != ANY:
        bare = _WORDS.get(bare.lower(), bare)
    kind = _kind(bare)
    wanted = ANY if is_string is False else types
    if kind in wanted - {"string"} or (kind == "integer" and "number" in wanted):
        return bare
    if kind == "number" and "integer" in wanted and float(bare).is_integer():
        return bare
    return quoted(text)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _types(schema: object, root: object) -> frozenset[str]:
    found: set[str] = set()
    for member in _members(schema, root):
        named: object = member.get("type")
        if isinstance(named, str):
            found.add(named)
        elif isinstance(named, list):
            found.update(cast("list[str]", named))
        elif "const" in member or "enum" in member:
            values = [member["const"]] if "const" in member else member["enum"]
            found.update(_KINDS[type(value)] for value in values)
    return frozenset(found) or ANY


def _members(schema: object, root: object) -> list[JsonObject]:
    """List a schema, and those that it refers to or is composed of; each of them once."""
    found: dict[int, JsonObject] = {}
    waiting = [schema]
    while waiting and len(found) < MAX_MEMBERS:
        each = waiting.pop(0)
        if not isinstance(each, Mapping) or id(cast(object, each)) in found:
            continue
        member = cast(JsonObject, each)
        found[id(member)] = member
        if "$ref" in member:
            waiting.append(_resolve(member["$ref"], root))
        for keyword in ("allOf", "anyOf", "oneOf"):
            if isinstance(inner := member.get(keyword), list):
                waiting += cast("list[object]", inner)[:MAX_MEMBERS]
    return list(found.values())


def _resolve(reference: object, root: object) -> object:
    """Follow a reference inside the schema; None if it leads elsewhere."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = cast("Mapping[str, object]", found)[part]
    return found


def _kind(text: str) -> str | None:
    """Name the type of a JSON text; None if it is not JSON."""
    try:
        return _KINDS[type(decode_json(text))]
    except ValueError:
        return None
