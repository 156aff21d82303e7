"""ToolFormatRule: which adapters write calls of tools otherwise than their base."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adapter_store.names import AdapterRef


@dataclass(frozen=True, slots=True)
class ToolFormatRule:
    """`pattern` is [tenant/]name[@version], where `*` and `?` stand for any letters.

    Without a tenant it is any tenant's, without a version any version.
    """

    pattern: str
    tool_format: str

    def fits(self, ref: AdapterRef) -> bool:
        tenant, slash, name = self.pattern.rpartition("/")
        name, at, version = name.partition("@")
        return (
            fnmatchcase(ref.name, name)
            and (not slash or fnmatchcase(ref.tenant, tenant))
            and (not at or fnmatchcase(str(ref.version), version))
        )


def tool_format_of(ref: AdapterRef, rules: Sequence[ToolFormatRule]) -> str | None:
    """Find what the first rule says that fits; None if none does, or adapters are combined."""
    if ref.recipe is not None:
        return None
    return next((rule.tool_format for rule in rules if rule.fits(ref)), None)
