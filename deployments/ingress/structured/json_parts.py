"""JsonParts: the JSON schemas that a grammar refers to, each under a name, for llguidance."""

from collections.abc import Mapping
from typing import Any

# Between the tokens of JSON: enough to indent, not enough for a model to go on with it for ever
WHITESPACE = r"[ \n\r\t]{0,48}"
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonParts:
    def __init__(self, is_lenient: bool) -> None:
        self._is_lenient = is_lenient
        self.documents: list[dict[str, Any]] = []
        self.not_enforced: list[str] = []

    def add(self, schema: Mapping[str, Any], path: str) -> str:
        """Refer to a schema; `path` says in errors where it comes from."""
        name = f"json_{len(self.documents)}"
        document = {"x-guidance": self._options(), **schema}
        self.documents.append({"name": name, "path": path, "json_schema": document})
        return f"@{name}"

    def add_tight(self, schema: Mapping[str, Any], path: str) -> str:
        """Refer to a schema whose JSON has no white space of the model's choice."""
        return self.add({"x-guidance": {**self._coerced(), **_TIGHT}, **schema}, path)

    def leave_out(self, keyword: str, schema: Mapping[str, Any], path: str) -> None:
        """List a keyword of what is not written as JSON, if the schema has it."""
        if keyword in schema:
            self.not_enforced.append(f"{keyword} at {path}")

    def _options(self) -> dict[str, Any]:
        return {"whitespace_pattern": WHITESPACE, **self._coerced()}

    def _coerced(self) -> dict[str, Any]:
        return {"coerce_one_of": self._is_lenient}


def with_definitions(schema: object, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take a part of a schema for a schema of its own."""
    shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return {**shared, **(schema if isinstance(schema, dict) else {})}
