"""The grammar of model names, without looking anything up.

`<base id>` is a base model and wins over everything. `<adapter>`, `<adapter>@<version or alias>`,
`<tenant>/<adapter>[@...]` and each of them behind `<base id>:` are adapters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ADAPTER = re.compile(rf"(?:(?P<tenant>{_NAME})/)?(?P<adapter>{_NAME}(?:@{_NAME})?)")


@dataclass(frozen=True, slots=True)
class ModelName:
    """What a name asks for. No adapter: the base model; no base: whichever the adapter fits."""

    base: str | None = None
    tenant: str | None = None
    adapter_name: str | None = None  # name[@version or alias]


def parse_model_name(text: str, base_ids: Sequence[str]) -> ModelName | None:
    """None: no model can have this name."""
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
