"""The table of every configuration key, as docs/configuration.md shows it."""

from collections.abc import Iterator
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deployments.config import AppConfig
from engine.byte_size import BINARY

HEAD = "| key | default | what it says |\n|---|---|---|"


def config_table() -> str:
    """Write the table in Markdown, a row for each key."""
    cells = (
        (f"`{path}`", _default(path, field), str(field.description))
        for path, field in config_keys(AppConfig)
    )
    rows = (f"| {' | '.join(row)} |".replace("|  |", "| |") for row in cells)
    return "\n".join([HEAD, *rows])


def config_keys(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Walk through all keys; a list of sections is written `name[]`."""
    for name, field in section.model_fields.items():
        inner, is_list = _section_in(field.annotation)
        if inner is None:
            yield f"{path}{name}", field
        else:
            yield from config_keys(inner, f"{path}{name}{'[]' if is_list else ''}.")


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    is_list = get_origin(annotation) is list
    inner = get_args(annotation)[0] if is_list else annotation
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return inner, is_list
    return None, is_list


def _default(path: str, field: FieldInfo) -> str:
    if field.is_required():
        return ""
    if field.default is None:
        extra: Any = field.json_schema_extra
        assert isinstance(extra, dict), f"{path} is not made by `key`"
        return str(cast(dict[str, object], extra)["unset"])
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, str):
        return f"`{field.default}`"
    return _size(field.default) if path.endswith("_bytes") else f"{field.default:g}"


def _size(num_bytes: int) -> str:
    """In the largest unit that makes it a whole number."""
    unit = max((u for u in BINARY if num_bytes % BINARY[u] == 0), key=BINARY.__getitem__)
    return f"`{num_bytes // BINARY[unit]}{unit}`"
