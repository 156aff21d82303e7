"""Read the generation_config.json of an adapter's folder: end tokens and sampling defaults.

Of its keys those are taken that are taken of a base's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from adapter_store.errors import AdapterInvalid, StoreCorrupt

GENERATION_NAME = "generation_config.json"
MAX_FILE_BYTES = 2**20
MAX_END_TOKENS = 64
# name: the least value, the most, and whether the least itself is left out, as requests may have it
RANGES = {
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "top_k": (0, 2**31 - 1, False),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.01, 100.0, False),
}


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """`eos_token_ids` are None where the base's hold; `sampling` has the names of RANGES."""

    eos_token_ids: tuple[int, ...] | None = None
    sampling: Mapping[str, float] = field(default_factory=dict[str, float])


def read_generation(folder: Path, num_rows: int | None) -> bytes | None:
    """Write the folder's settings as GENERATION_NAME's content; None if it has none.

    `num_rows` are those of the embedding, if they are known. Raises AdapterInvalid.
    """
    path = folder / GENERATION_NAME
    if not path.is_file():
        return None
    try:
        found = _read(path)
        names = [name for name in RANGES if found.get(name) is not None]
        kept: dict[str, Any] = {name: _number(name, found[name]) for name in names}
        ends = found.get("eos_token_id")
        if ends is not None:
            kept["eos_token_id"] = _end_tokens(ends, num_rows)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{path}: {error}") from error
    return json.dumps(kept, sort_keys=True).encode()


def parse_generation(raw: bytes, digest: str) -> GenerationSettings:
    """Decode what `read_generation` wrote. Raises StoreCorrupt."""
    try:
        data: dict[str, Any] = json.loads(raw)
        ends = data.pop("eos_token_id", None)
        return GenerationSettings(None if ends is None else tuple(ends), data)
    except (AttributeError, TypeError, ValueError) as error:
        raise StoreCorrupt(f"the generation settings of {digest} are damaged: {error!r}") from error


def _read(path: Path) -> dict[str, Any]:
    num_bytes = path.stat().st_size
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"it has {num_bytes} bytes, and at most {MAX_FILE_BYTES} are taken")
    found: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return cast("dict[str, Any]", found)


def _number(name: str, value: object) -> float:
    is_whole = name == "top_k"
    if type(value) is not int and (is_whole or type(value) is not float):
        kind = "whole number" if is_whole else "number"
        raise ValueError(f"{name}={value!r:.100} is no {kind}")
    number = cast(float, value)
    if is_whole and number == -1:  # off, as some files write it
        return 0
    least, most, is_open = RANGES[name]
    if not (least < number if is_open else least <= number) or not number <= most:
        bracket = "(" if is_open else "["
        raise ValueError(f"{name} must be in {bracket}{least}, {most}], not {number}")
    return number


def _end_tokens(value: Any, num_rows: int | None) -> list[int]:
    ends = cast("list[Any]", value) if isinstance(value, list) else [value]
    if len(ends) > MAX_END_TOKENS:
        raise ValueError(
            f"eos_token_id has {len(ends)} ids, and at most {MAX_END_TOKENS} are taken"
        )
    for end in ends:
        if type(end) is not int or end < 0 or (num_rows is not None and end >= num_rows):
            last = "" if num_rows is None else num_rows - 1
            raise ValueError(f"eos_token_id {end!r:.100} is no token id in 0..{last}")
    return list(dict.fromkeys(ends))
