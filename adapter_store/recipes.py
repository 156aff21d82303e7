"""Recipe: how several adapters are combined into one, and the digest of the result.

The digest is known before anything is computed. It covers the digests of the members, so that
another version of one is another adapter.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from adapter_store.errors import AdapterInvalid

Method = Literal["cat", "linear", "ties", "dare_linear", "dare_ties"]
MajoritySign = Literal["total", "frequency"]
MAX_MEMBERS = 8
MAX_WEIGHT = 100.0
PRUNING: tuple[Method, ...] = ("ties", "dare_linear", "dare_ties")
ELECTING: tuple[Method, ...] = ("ties", "dare_ties")


@dataclass(frozen=True, slots=True)
class Recipe:
    """PEFT's words. `cat` lays the members side by side: it is exact, whatever their ranks."""

    members: tuple[str, ...]  # digests
    weights: tuple[float, ...]
    method: Method = "cat"
    density: float = 1.0  # of the methods that prune: which part of the elements is kept
    majority_sign: MajoritySign = "total"  # of those that elect a sign: by sum or by number

    def digest(self, base: str) -> str:
        parts = {"base": base, "recipe": asdict(self)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_recipe(
    members: Sequence[str],
    weights: Sequence[float],
    method: Method = "cat",
    density: float = 1.0,
    majority_sign: MajoritySign = "total",
) -> Recipe:
    """Make the recipe that all spellings of the same combination share.

    The order of the members and what a method does not use make no difference; one member alone is
    weighted, whatever the method, as in PEFT. Raises AdapterInvalid.
    """
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise AdapterInvalid(f"{len(members)} adapters cannot be combined, only 1 to {MAX_MEMBERS}")
    if len(weights) != len(members):
        raise AdapterInvalid(f"{len(members)} adapters need as many weights, not {len(weights)}")
    for weight in weights:
        if not (math.isfinite(weight) and abs(weight) <= MAX_WEIGHT):
            raise AdapterInvalid(f"a weight must be in [-{MAX_WEIGHT}, {MAX_WEIGHT}], not {weight}")
    if len(members) == 1:
        method = "cat"
    if method in PRUNING and not 0.0 < density <= 1.0:
        raise AdapterInvalid(f"density must be in (0, 1] for {method}, not {density}")
    pairs = sorted(zip(members, map(float, weights), strict=True))
    return Recipe(
        tuple(digest for digest, _ in pairs),
        tuple(weight + 0.0 for _, weight in pairs),  # no negative zero
        method,
        density if method in PRUNING else 1.0,
        majority_sign if method in ELECTING else "total",
    )


def parse_recipe(data: Any) -> Recipe:
    """Decode a recipe from JSON. Raises KeyError, TypeError, ValueError."""
    fields = cast(dict[str, Any], dict(data))
    members, weights = tuple(fields.pop("members")), tuple(fields.pop("weights"))
    return Recipe(members, weights, **fields)
