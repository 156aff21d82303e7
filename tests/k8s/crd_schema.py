"""From a CustomResourceDefinition to a strict JSON Schema.

An API server drops fields that it does not know and goes on; here they are errors, because in a
manifest they are misspellings. CEL rules are listed, not evaluated. No operator's mind is read:
what passes here may still be refused by one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

Schema = dict[str, Any]

# What every object has and no CRD has to spell out.
TOP = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
OPEN = "x-kubernetes-preserve-unknown-fields"


@dataclass(frozen=True, slots=True)
class Crd:
    """One served version of a custom resource."""

    schema: Schema
    cel_rules: list[str]  # "path: rule"; not evaluated

    def errors(self, resource: Schema) -> list[str]:
        found = Draft202012Validator(self.schema).iter_errors(resource)
        return [f"{error.json_path}: {error.message}" for error in found]


def read_crd(path: Path) -> dict[tuple[str, str], Crd]:
    """The file's served versions by (apiVersion, kind)."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # such a file may be a megabyte
    return crd_versions(yaml.load(path.read_text(), loader))


def crd_versions(definition: Schema) -> dict[tuple[str, str], Crd]:
    spec = definition["spec"]
    kind = spec["names"]["kind"]
    return {
        (f"{spec['group']}/{version['name']}", kind): to_crd(version["schema"]["openAPIV3Schema"])
        for version in spec["versions"]
        if version["served"]
    }


def to_crd(schema: Schema) -> Crd:
    top = to_json_schema(schema)
    # The server checks metadata by itself; a CRD says no more than that it is an object.
    top["properties"] |= TOP | {"metadata": {"type": "object"}}
    return Crd(top, [f"{path}: {rule}" for path, rule in cel_rules(schema)])


def to_json_schema(schema: Schema) -> Schema:
    """Recursive; leaves its argument alone."""
    made = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if schema.get("nullable"):
        made["type"] = [made["type"], "null"]
    if "items" in schema:
        made["items"] = to_json_schema(schema["items"])
    if schema.get("x-kubernetes-list-type") == "set":
        made["uniqueItems"] = True
    if schema.get("type") == "object":
        _close(made)
    return made


def _close(made: Schema) -> None:
    """An object has the properties that are spelt out and no others, unless it is said to."""
    properties: Schema = made.get("properties", {})
    made["properties"] = {name: to_json_schema(value) for name, value in properties.items()}
    # The server fills in defaults before it asks for what is required.
    required = made.get("required", [])
    made["required"] = [name for name in required if "default" not in properties.get(name, {})]
    if made.get(OPEN):
        return
    values = made.get("additionalProperties", False)
    made["additionalProperties"] = to_json_schema(values) if isinstance(values, dict) else values


def cel_rules(schema: Schema, path: str = "$") -> Iterator[tuple[str, str]]:
    for validation in schema.get("x-kubernetes-validations", []):
        yield path, validation["rule"]
    for name, value in schema.get("properties", {}).items():
        yield from cel_rules(value, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(schema.get(key), dict):
            yield from cel_rules(schema[key], path + mark)
