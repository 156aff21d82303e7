"""Find versions by what they are, a page at a time, with a bound on what one page looks at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol

from adapter_store.errors import AdapterNotFound, InvalidName
from adapter_store.names import AdapterRecord, AdapterRef, State, check_name, split_name

MAX_LOOKED_AT = 10_000  # versions, for one page
NAMES_AT_ONCE = 100


class Versions(Protocol):
    """The part of `adapter_store.store.AdapterStore` that is used here."""

    def list_versions(
        self, tenant: str, first_name: str, num_names: int
    ) -> Sequence[AdapterRecord]: ...
    def tenants_from(self, first: str = "") -> Sequence[str]: ...


class Names(Protocol):
    """Another part of it."""

    def versions_of(self, tenant: str, name: str) -> Sequence[AdapterRecord]: ...
    def resolve(self, tenant: str, full_name: str, base: str | None = None) -> AdapterRef: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What versions must be. What is empty is not asked for."""

    tenant: str = ""
    name: str = ""  # with `*` and `?` for any letters
    base: str = ""  # the beginning of a fingerprint
    state: State | None = "live"  # None: any
    proof: str = ""  # the outcome of the latest probe, or `none`

    def fits(self, record: AdapterRecord) -> bool:
        """Check one version of the tenant."""
        outcome = "none" if record.verdict is None else record.verdict.outcome
        return (
            self.state in (None, record.state)
            and (not self.name or fnmatchcase(record.name, self.name))
            and record.base.startswith(self.base)
            and self.proof in ("", outcome)
        )


class Position(NamedTuple):
    """A version in the order of listings, written tenant/name@version."""

    tenant: str
    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Page:
    """Versions in order. What follows begins behind `next_after`; None: that is all."""

    records: Sequence[AdapterRecord]
    next_after: Position | None


def parse_position(text: str) -> Position:
    """Read what `str` writes of one. Raises InvalidName."""
    tenant, slash, full_name = text.partition("/")
    name, version = split_name(full_name if slash else "")
    if not isinstance(version, int):
        raise InvalidName(f"{text!r} must be tenant/name@version")
    return Position(check_name("tenant", tenant), name, version)


def version_of(names: Names, tenant: str, full_name: str) -> AdapterRecord:
    """Return a version, in whatever state if its number is given.

    Raises InvalidName, AdapterNotFound.
    """
    name, selector = split_name(full_name)
    records = names.versions_of(check_name("tenant", tenant), name)
    if not isinstance(selector, int):
        selector = names.resolve(tenant, full_name).version
    found = [record for record in records if record.version == selector]
    if not found:
        raise AdapterNotFound(f"tenant {tenant} has no adapter {full_name!r}")
    return found[0]


def page_of(versions: Versions, wanted: Wanted, after: Position | None, limit: int) -> Page:
    """List at most `limit` versions behind a position.

    A page may have fewer, or none, and yet not be the last one: it looks at MAX_LOOKED_AT.
    """
    found: list[AdapterRecord] = []
    last: Position | None = None
    for num_looked_at, record in enumerate(_walk(versions, wanted.tenant, after)):
        if num_looked_at == MAX_LOOKED_AT or len(found) == limit:
            return Page(found, last)
        last = Position(record.tenant, record.name, record.version)
        if wanted.fits(record):
            found.append(record)
    return Page(found, None)


def _walk(versions: Versions, tenant: str, after: Position | None) -> Iterator[AdapterRecord]:
    tenants = [tenant] if tenant else versions.tenants_from("" if after is None else after.tenant)
    for owner in tenants:
        begin = after if after is not None and after.tenant == owner else None
        for record in _walk_names(versions, owner, "" if begin is None else begin.name):
            if begin is None or (record.name, record.version) > (begin.name, begin.version):
                yield record


def _walk_names(versions: Versions, tenant: str, first_name: str) -> Iterator[AdapterRecord]:
    while records := versions.list_versions(tenant, first_name, NAMES_AT_ONCE):
        yield from records
        first_name = f"{records[-1].name}\0"  # the next possible one
