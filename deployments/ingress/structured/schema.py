"""Prepares a JSON schema for the engine: what only describes is left out, what cannot be enforced
is refused by keyword and place, or left out and listed where a request may be lenient.
"""

from dataclasses import dataclass, field
from typing import Any, cast

from deployments.ingress.structured.keywords import (
    ENFORCED,
    FORMATS,
    LOOKAROUNDS,
    NOT_ENFORCED,
    SCHEMA,
    SCHEMA_LISTS,
    SCHEMA_MAPS,
)

MAX_DEPTH = 64  # of schemas inside schemas
MAX_SCHEMAS = 10_000
MAX_SHOWN = 200  # characters of a place in an error

Schema = dict[str, Any] | bool


class SchemaRefused(ValueError):
    """The message names the keyword and its place, a JSON pointer."""


@dataclass(slots=True)
class Preparation:
    """What is left of a schema, and keywords with their places that are not enforced."""

    is_lenient: bool = False
    not_enforced: list[str] = field(default_factory=list[str])
    num_schemas: int = 0

    def prepare(self, schema: object, place: str = "", depth: int = 0) -> Schema:
        """Return the schema with what is enforced. Raises SchemaRefused."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaRefused(f"{_show(place)} must be a schema: an object or a boolean")
        self.num_schemas += 1
        if depth > MAX_DEPTH or self.num_schemas > MAX_SCHEMAS:
            raise SchemaRefused(
                f"the schema has more than {MAX_DEPTH} levels or {MAX_SCHEMAS} schemas, "
                f"at {_show(place)}"
            )
        kept: dict[str, Any] = {}
        for keyword, value in cast(dict[str, object], schema).items():
            if self._is_kept(keyword, value, place):
                at = f"{place}/{_escape(keyword)}"
                kept[keyword] = self._prepare_value(keyword, value, at, depth + 1)
        return kept

    def _is_kept(self, keyword: str, value: object, place: str) -> bool:
        if keyword in NOT_ENFORCED:
            if not any(type(value) is type(v) and value == v for v in NOT_ENFORCED[keyword]):
                self._refuse(keyword, place)
            return False
        if keyword == "format":
            return isinstance(value, str) and value in FORMATS
        if keyword == "pattern" and _looks_around(value):
            self._refuse("pattern with a look-around", place)
            return False
        if keyword == "oneOf" and self.is_lenient:
            self.not_enforced.append(f"oneOf (as anyOf) at {_show(place)}")
        return keyword in ENFORCED

    def _refuse(self, keyword: str, place: str) -> None:
        if not self.is_lenient:
            raise SchemaRefused(f"{keyword} at {_show(place)} cannot be enforced")
        self.not_enforced.append(f"{keyword} at {_show(place)}")

    def _prepare_value(self, keyword: str, value: object, place: str, depth: int) -> object:
        if keyword in SCHEMA_MAPS:
            if not isinstance(value, dict):
                raise SchemaRefused(f"{_show(place)} must be an object of schemas")
            named = cast(dict[str, object], value)
            return {n: self.prepare(v, f"{place}/{_escape(n)}", depth) for n, v in named.items()}
        if keyword in SCHEMA_LISTS and isinstance(value, list):
            listed = cast(list[object], value)
            return [self.prepare(v, f"{place}/{i}", depth) for i, v in enumerate(listed)]
        if keyword in SCHEMA:
            return self.prepare(value, place, depth)
        if keyword == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise SchemaRefused(f"{_show(place)} must begin with #: nothing is fetched")
        return value


def _looks_around(pattern: object) -> bool:
    return isinstance(pattern, str) and any(part in pattern for part in LOOKAROUNDS)


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _show(place: str) -> str:
    if not place:
        return "the top"
    return place if len(place) <= MAX_SHOWN else f"{place[:MAX_SHOWN]}..."
