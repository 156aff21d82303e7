"""Reads what an answer must match: OpenAI's response_format, vLLM's structured_outputs, its older
guided_json, guided_regex, guided_choice and guided_grammar.

A request may have one of them. Errors begin with the path of the field.
"""

from collections.abc import Mapping
from typing import Any, cast

from deployments.ingress.api.openai_fields import is_empty
from deployments.ingress.structured.constraint import MAX_CHOICES, Constraint, Kind

ANY_OBJECT = {"type": "object"}
KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar", "structural_tag")

_FORMAT_FIELDS = {"type", "json_schema", "schema"}
_TAG_FIELDS = {"type", "structures", "triggers", "format"}
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}
# vLLM's, that would change the answer
_OPTIONS = (
    "disable_additional_properties",
    "disable_any_whitespace",
    "whitespace_pattern",
)
# vLLM's choice of a library, which has no effect here
_IGNORED = ("backend", "disable_fallback")


def read_constraint(
    response_format: Mapping[str, Any] | None,
    structured_outputs: Mapping[str, Any] | None,
    guided: Mapping[Kind, Any],
) -> Constraint | None:
    """Find the only constraint of a request, if there is one. Raises ValueError."""
    found = [
        *_of_response_format(response_format or {}),
        *_of_structured_outputs(structured_outputs or {}),
        *(_checked(kind, v, f"guided_{kind}") for kind, v in guided.items() if not is_empty(v)),
    ]
    if len(found) > 1:
        raise ValueError(f"{found[1].path}: not allowed together with {found[0].path}")
    return found[0] if found else None


def _of_response_format(given: Mapping[str, Any]) -> list[Constraint]:
    path = "response_format"
    kind = given.get("type") if given else "text"
    if kind == "structural_tag":
        _refuse_unknown(given, _TAG_FIELDS, path)
        return [Constraint(kind, given, path)]
    _refuse_unknown(given, _FORMAT_FIELDS, path)
    if kind == "text":
        return []
    if kind == "json_object":
        schema = given.get("schema")
        return [Constraint("json", ANY_OBJECT if schema is None else schema, path)]
    if kind == "json_schema":
        return [_of_json_schema(given.get("json_schema"), f"{path}.json_schema")]
    raise ValueError(
        f"{path}.type: must be 'text', 'json_object', 'json_schema' or 'structural_tag'"
    )


def _of_json_schema(given: object, path: str) -> Constraint:
    if not isinstance(given, dict):
        raise ValueError(f"{path}: must be an object with a schema")
    fields = cast(dict[str, Any], given)
    _refuse_unknown(fields, _SCHEMA_FIELDS, path)
    if fields.get("schema") is None:
        raise ValueError(f"{path}.schema: is required")
    return _checked("json", fields["schema"], f"{path}.schema")


def _of_structured_outputs(given: Mapping[str, Any]) -> list[Constraint]:
    path = "structured_outputs"
    _refuse_unknown(given, {*KINDS, "json_object", *_OPTIONS, *_IGNORED}, path)
    for option in _OPTIONS:
        if given.get(option):
            raise ValueError(f"{path}.{option}: is not supported")
    asked: dict[Kind, Any] = {k: given[k] for k in KINDS if given.get(k) is not None}
    if given.get("json_object"):
        asked.setdefault("json", ANY_OBJECT)
    if given and len(asked) != 1:
        raise ValueError(f"{path}: must have exactly one of {', '.join(KINDS)}, json_object")
    return [_checked(kind, value, f"{path}.{kind}") for kind, value in asked.items()]


def _checked(kind: Kind, value: Any, path: str) -> Constraint:
    if kind == "choice":
        return Constraint(kind, _choices(value, path), path)
    if kind == "json":
        if not isinstance(value, dict | bool | str):
            raise ValueError(f"{path}: must be a JSON schema")
    elif kind == "structural_tag":
        if not isinstance(value, dict | str):
            raise ValueError(f"{path}: must be a structural tag: an object, or its JSON")
    elif not isinstance(value, str) or not value:
        raise ValueError(f"{path}: must be a non-empty string")
    return Constraint(kind, value, path)


def _choices(value: object, path: str) -> list[str]:
    choices = cast(list[object], value) if isinstance(value, list) else []
    texts = [choice for choice in choices[:MAX_CHOICES] if isinstance(choice, str) and choice]
    if not texts or len(texts) != len(choices):
        raise ValueError(f"{path}: must be a list of 1 to {MAX_CHOICES} non-empty strings")
    return texts


def _refuse_unknown(given: Mapping[str, Any], known: set[str], path: str) -> None:
    unknown = next((n for n, v in given.items() if n not in known and v is not None), None)
    if unknown is not None:
        raise ValueError(f"{path}.{unknown[:80]}: is not known")
