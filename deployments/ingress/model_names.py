"""Parse model names, without looking anything up.

`<base id>` is a base model and wins over everything. `<adapter>`, `<adapter>@<version or alias>`,
`<tenant>/<adapter>[@...]` and each of them behind `<base id>:` are adapters.

`<adapter>:<weight>+<adapter>:<weight>` is a weighted set of adapters, and so it is behind
`<base id>:`. What begins with a base id and a colon never means anything else, so in a set an
adapter that is called like a base is written behind its tenant or behind the base of the set.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapter_store.names import NAME_RULE
from adapter_store.recipes import MAX_MEMBERS, MajoritySign, Method

_ADAPTER = re.compile(rf"(?:(?P<tenant>{NAME_RULE})/)?(?P<adapter>{NAME_RULE}(?:@{NAME_RULE})?)")
_MEMBER = re.compile(rf"(?P<name>{_ADAPTER.pattern}):(?P<weight>-?[0-9]{{1,3}}(?:\.[0-9]{{1,9}})?)")


@dataclass(frozen=True, slots=True)
class ModelName:
    """The parts of a model name.

    Without an adapter it means the base model; without a base, the one that the adapter fits.
    """

    base: str | None = None
    tenant: str | None = None
    adapter_name: str | None = None  # name[@version or alias]


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Adapters that one request combines: their names, each with its weight, and how.

    Without a base, the one that the first of them fits.
    """

    members: Sequence[tuple[str, float]]
    base: str | None = None
    method: Method = "cat"
    density: float = 1.0
    majority_sign: MajoritySign = "total"

    @property
    def text(self) -> str:
        """Spell it as a model's name, as far as that can say it."""
        return "+".join(f"{name}:{weight:g}" for name, weight in self.members)


def parse_model_name(text: str, base_ids: Sequence[str]) -> ModelName | None:
    """Split a name. None if no model can have it."""
    if text in base_ids:
        return ModelName(base=text)
    # The longest base id first: one id may be the beginning of another.
    for base in sorted(base_ids, key=len, reverse=True):
        if text.startswith(f"{base}:"):
            return _adapter_name(text[len(base) + 1 :], base)
    return _adapter_name(text, None)


def parse_adapter_set(text: str, base_ids: Sequence[str]) -> AdapterSet | None:
    """Split a name that `parse_model_name` does not know. None if it is no set either."""
    bases = sorted(base_ids, key=len, reverse=True)
    base = next((base for base in bases if text.startswith(f"{base}:")), None)
    rest = text if base is None else text[len(base) + 1 :]
    matches = [_MEMBER.fullmatch(part) for part in rest.split("+", MAX_MEMBERS + 1)]
    members = [(match["name"], float(match["weight"])) for match in matches if match is not None]
    return AdapterSet(members, base) if len(members) == len(matches) else None


def _adapter_name(text: str, base: str | None) -> ModelName | None:
    match = _ADAPTER.fullmatch(text)
    if match is None:
        return None
    return ModelName(base, match["tenant"], match["adapter"])
