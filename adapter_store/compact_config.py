"""Read how an adapter stores smaller A or B than it multiplies with: QALoRA, BD-LoRA.

QALoRA    A acts on inputs that are averaged in groups, and then multiplied by their number
BD-LoRA   A or B is block-diagonal, and only its blocks are stored, below each other
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from adapter_store.errors import AdapterInvalid

MAX_GROUP_SIZE = 2**16
MAX_BLOCKS = 1024
# Keys that PEFT does not combine with these, or has another meaning for
_WITHOUT = ("use_dora", "lora_bias", "ensure_weight_tying")


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """Which modules' A and B are block-diagonal: those whose names contain one of the texts."""

    num_blocks: int
    of_a: tuple[str, ...]
    of_b: tuple[str, ...]
    match_strict: bool  # whether each module must be one of them

    def blocks(self, module: str) -> tuple[int, int]:
        """Return the number of blocks of A and of B; 1: it is stored as it is."""
        in_a = any(text in module for text in self.of_a)
        in_b = any(text in module for text in self.of_b)
        if in_a and in_b:
            raise AdapterInvalid(
                f"use_bdlora: {module} is in both target_modules_bd_a and target_modules_bd_b, "
                "which PEFT refuses"
            )
        if self.match_strict and not (in_a or in_b):
            raise AdapterInvalid(
                f"use_bdlora: {module} is in neither target_modules_bd_a nor target_modules_bd_b, "
                "which PEFT refuses unless match_strict is false"
            )
        return (self.num_blocks if in_a else 1), (self.num_blocks if in_b else 1)

    def to_config(self, names: Mapping[str, str]) -> dict[str, object]:
        """Write it with one text for each module; `names` are those that it knows them by."""
        blocks = {module: self.blocks(name) for module, name in names.items()}
        return {
            "nblocks": self.num_blocks,
            "target_modules_bd_a": sorted(name for name, (a, _) in blocks.items() if a > 1),
            "target_modules_bd_b": sorted(name for name, (_, b) in blocks.items() if b > 1),
            "match_strict": False,
        }


def read_group_size(config: Mapping[str, Any]) -> int:
    """Return how many inputs QALoRA averages; 0: it is off. Raises AdapterInvalid."""
    is_on = config.get("use_qalora") or False
    if type(is_on) is not bool:
        raise AdapterInvalid(f"use_qalora={is_on!r} must be true or false")
    if not is_on:
        return 0
    _refuse_beside("use_qalora", config)
    if config.get("use_bdlora") is not None:
        raise AdapterInvalid("use_qalora and use_bdlora are not served together")
    # A group of one input would look as if there were no groups, and be another function
    return _whole("qalora_group_size", config.get("qalora_group_size", 16), 2, MAX_GROUP_SIZE)


def read_blocks(config: Mapping[str, Any]) -> BlockDiagonal | None:
    """Read use_bdlora; None: it is off. Raises AdapterInvalid."""
    value = config.get("use_bdlora")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise AdapterInvalid(f"use_bdlora={value!r} must be an object, with nblocks in it")
    found = cast("dict[str, Any]", value)
    known = ("nblocks", "target_modules_bd_a", "target_modules_bd_b", "match_strict")
    for key in found:
        if key not in known:
            raise AdapterInvalid(f"use_bdlora has a key {key!r}; known are {', '.join(known)}")
    _refuse_beside("use_bdlora", config)
    match_strict = found.get("match_strict", True)
    if type(match_strict) is not bool:
        raise AdapterInvalid(f"match_strict={match_strict!r} of use_bdlora must be true or false")
    return BlockDiagonal(
        _whole("nblocks of use_bdlora", found.get("nblocks", 1), 1, MAX_BLOCKS),
        _texts(found, "target_modules_bd_a"),
        _texts(found, "target_modules_bd_b"),
        match_strict,
    )


def _refuse_beside(key: str, config: Mapping[str, Any]) -> None:
    for other in _WITHOUT:
        if config.get(other):
            raise AdapterInvalid(f"{key} and {other}={config[other]!r} are not served together")


def _whole(key: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise AdapterInvalid(f"{key}={value!r} must be a whole number in {least}..{most}")
    return value


def _texts(found: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value: Any = found.get(key) or []
    if not isinstance(value, list) or not all(
        isinstance(text, str) and text for text in cast("list[Any]", value)
    ):
        raise AdapterInvalid(f"{key}={value!r} of use_bdlora must be a list of parts of names")
    return tuple(cast("list[str]", value))
