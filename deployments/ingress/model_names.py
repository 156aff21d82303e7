"""Parse model names, without looking anything up.

`<base id>` is a base model and wins over everything. `<adapter>`, `<adapter>@<version or alias>`,
`<tenant>/<adapter>[@...]` and each of them behind `<base id>:` are adapters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapter_store.names import NAME_RULE

_ADAPTER = re.compile(rf"(?:(?P<tenant>{NAME_RULE})/)?(?P<adapter>{NAME_RULE}(?:@{NAME_RULE})?)")


@dataclass(frozen=True, slots=True)
class ModelName:
    """The parts of a model name.

    Without an adapter it means the base model; without a base, the one that the adapter fits.
    """

    base: str | None = None
    tenant: str | None = None
    adapter_name: str | None = None  # name[@version or alias]


def parse_model_name(text: str, base_ids: Sequence[str]) -> ModelName | None:
    """Split a name. None if no model can have it."""
    if text in base_ids:
        return ModelName(base=text)
    # The longest base id first: one id may be the beginning of another.
    for base in sorted(base_ids, key=len, reverse=True):
        if text.startswith(f"{base}:"):
            return _adapter_name(text[len(base) + 1 :], base)
    return _adapter_name(text, None)


def _adapter_name(text: str, base: str | None) -> ModelName | None:
    match = _ADAPTER.fullmatch(text)
    if match is None:
        return None
    return ModelName(base, match["tenant"], match["adapter"])
