"""Which versions a restoration or a deletion is about. No I/O."""

from collections.abc import Sequence

from adapter_store.errors import AdapterNotFound, InvalidName
from adapter_store.names import LATEST, AdapterRecord, split_name


def restorable(records: Sequence[AdapterRecord], tenant: str, full_name: str) -> AdapterRecord:
    """Return the version of name@version, which is retired or live.

    `records` are all versions of the name. Raises InvalidName, AdapterNotFound.
    """
    name, selector = split_name(full_name)
    if not isinstance(selector, int):
        raise InvalidName(f"{full_name!r} names no version: write {name}@<number>")
    found = next((record for record in records if record.version == selector), None)
    if found is None:
        raise AdapterNotFound(f"tenant {tenant} has never had an adapter {full_name!r}")
    if found.state == "deleted":
        raise AdapterNotFound(f"{full_name!r} of tenant {tenant} was deleted: publish it again")
    return found


def chosen_versions(
    records: Sequence[AdapterRecord], tenant: str, full_name: str, selector: int | str
) -> tuple[int, ...]:
    """Return the versions that are not deleted yet: one of a version or alias, all of a bare name.

    Raises AdapterNotFound.
    """
    left = [record for record in records if record.state != "deleted"]
    if selector == LATEST and "@" not in full_name:
        chosen = [record.version for record in left]
    elif isinstance(selector, int):
        chosen = [record.version for record in left if record.version == selector]
    else:
        live = [record for record in left if record.state == "live"]
        chosen = [record.version for record in live if selector in record.aliases]
        check_one(full_name, chosen)
    if not chosen:
        raise AdapterNotFound(f"tenant {tenant} has no adapter {full_name!r}")
    return tuple(chosen)


def check_one(full_name: str, versions: Sequence[int]) -> None:
    """Raise InvalidName for an alias that means several versions: one of them has to be named."""
    if len(versions) > 1:
        listed = ", ".join(map(str, versions))
        raise InvalidName(f"{full_name!r} means the versions {listed}: name one of them")
