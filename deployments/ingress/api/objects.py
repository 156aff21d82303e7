"""Read objects of a request by hand, where errors must name a place inside a list."""

# Fields are JSON of any shape until they are checked here.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownMemberType=false

from collections.abc import Collection
from typing import Any

from deployments.ingress.api.openai_fields import is_empty, short
from deployments.ingress.http_errors import ApiError, invalid

MAX_PATH = 300  # characters of a place that an error names


def read_object(value: object, path: str, known: Collection[str]) -> dict[str, Any]:
    """Take an object with known fields; others must be empty. Raises ApiError."""
    if not isinstance(value, dict):
        raise wrong(path, f"must be an object, not {short(value)}")
    for name, setting in value.items():
        if name not in known and not is_empty(setting):
            field = f"{path}.{name[:80]}"
            raise invalid(f"Unknown field: {field}.", field, "unknown_field")
    return value


def read_text(fields: dict[str, Any], name: str, path: str) -> str:
    """Take a field that must be text. Raises ApiError."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise wrong(f"{path}.{name}", f"must be text, not {short(value)}")
    return value


def read_flag(fields: dict[str, Any], name: str, path: str) -> bool:
    """Take a field that is true or false, or missing. Raises ApiError."""
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise wrong(f"{path}.{name}", f"must be true or false, not {short(value)}")
    return bool(value)


def wrong(path: str, message: str) -> ApiError:
    path = path if len(path) <= MAX_PATH else f"{path[:MAX_PATH]}..."
    return invalid(f"{path}: {message}.", path)


def unsupported(path: str, message: str) -> ApiError:
    return invalid(f"{path}: {message}.", path, "unsupported_field")
