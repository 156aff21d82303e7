"""AdapterHistory: all that was ever published under one adapter name. No I/O, no rules."""

from dataclasses import dataclass, field, fields
from typing import Any

from adapter_store.aliases import Alias
from adapter_store.names import Place, State


@dataclass(slots=True)
class Version:
    """One published version of an adapter, live or retired."""

    digest: str
    base: str
    lora_rank: int
    nbytes: int  # of its files together
    published_s: float  # seconds since 1970
    is_retired: bool = False
    generation: int = 0  # of its files
    retired_by: int = 0  # number of the record
    own_files: list[str] | None = None  # beside the weights; None if it is not known
    vocab_size: int = 0  # rows of its own embedding; 0: it is the base's
    is_deleted: bool = False  # retired for good
    published_by: str = ""  # who, as the record says

    @property
    def state(self) -> State:
        """Whether it answers, could do so again, or never will."""
        if self.is_deleted:
            return "deleted"
        return "retired" if self.is_retired else "live"

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {name: getattr(self, name) for name in _FIELDS}

    @property
    def place(self) -> Place:
        """Where its files lie."""
        return Place(self.digest, self.generation)


# dataclasses.asdict copies deeply, which takes twenty times as long.
_FIELDS = tuple(field.name for field in fields(Version))


@dataclass(slots=True)
class AdapterHistory:
    """All versions and aliases of one adapter name. Version n is versions[n - 1]."""

    versions: list[Version] = field(default_factory=list[Version])
    aliases: dict[str, Alias] = field(default_factory=dict[str, Alias])

    def latest(self, base: str | None) -> int | None:
        """Return the newest live version, of this base if one is given; None if there is none."""
        for version in range(len(self.versions), 0, -1):
            if self.is_live(version) and base in (None, self.versions[version - 1].base):
                return version
        return None

    def to_data(self) -> dict[str, Any]:
        """Return it as JSON values."""
        versions = [version.to_data() for version in self.versions]
        aliases = {name: alias.to_data() for name, alias in self.aliases.items()}
        return {"versions": versions, "aliases": aliases}

    def meant_by(self, alias: str) -> int | None:
        """Return the live version of an alias with the largest weight; a dead one if none is."""
        found = self.aliases.get(alias)
        if found is None:
            return None
        wanted = [version for version in found.versions if found.weights[version]]
        return next((version for version in wanted if self.is_live(version)), wanted[0])

    def is_live(self, version: int) -> bool:
        """Check that a version exists and is not retired."""
        return 1 <= version <= len(self.versions) and not self.versions[version - 1].is_retired
