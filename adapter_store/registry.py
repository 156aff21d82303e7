"""Map names to digests by an append-only log in the object store, replayed into memory."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

from adapter_store.aliases import AliasView, Trial, check_one_base, check_weights, to_record
from adapter_store.catalog import Catalog, Key
from adapter_store.errors import AdapterExists, AdapterNotFound, FilesRemoved
from adapter_store.followed_log import FollowedLog, check_may_write, do_now
from adapter_store.life_cycle import check_one, chosen_versions, restorable
from adapter_store.limits import NO_LIMITS, PublishLimits
from adapter_store.manifest import AdapterManifest
from adapter_store.names import (
    AdapterRecord,
    AdapterRef,
    Place,
    check_alias,
    check_name,
    split_name,
)
from adapter_store.object_store import ObjectStore
from adapter_store.own_files import OWN_NAMES
from adapter_store.record_log import Record, RecordLog, encode
from adapter_store.verdict import Verdict

__all__ = ["Registry", "check_may_write"]

AT_ONCE = 32  # adapters that a snapshot reads while names wait


class Registry(FollowedLog[Catalog]):
    """The names in one object store. Thread-safe.

    Reads answer from memory as of the last `refresh`; writes refresh first. The constructor,
    `refresh` and all writes may raise SourceUnavailable; `refresh` and the writes StoreCorrupt too.
    """

    def __init__(
        self,
        store: ObjectStore,
        wall_clock: Callable[[], float],
        reader: ObjectStore | None = None,
        may_write: bool = True,
        run_later: Callable[[Callable[[], None]], None] = do_now,
    ) -> None:
        """Open the log in `store`; `reader` is the same store, for reading what others write.

        Without `may_write` all writes raise AccessDenied. `run_later` is given what is due after a
        write, and takes long if there are many adapters.
        """
        records = RecordLog(store, Catalog.from_data, reader)
        self._saving = threading.Lock()  # held while a snapshot is made and written
        super().__init__(records, Catalog(), wall_clock, may_write, run_later)

    # ---- names ---------------------------------------------------------------------------------

    def resolve(self, tenant: str, full_name: str, base: str | None = None) -> AdapterRef:
        """Return what name[@version|alias] means. Raises InvalidName, AdapterNotFound."""
        with self._lock:
            return self._catalog.resolve(tenant, full_name, base)

    def list(self, tenant: str | None = None) -> Sequence[AdapterRecord]:
        """List the live versions, of one tenant or of all."""
        with self._lock:
            return tuple(self._catalog.list(tenant))

    def list_from(self, tenant: str, first_name: str, num_names: int) -> Sequence[AdapterRecord]:
        """List the live versions of the tenant's next names, from this one on."""
        with self._lock:
            by_name = groupby(self._catalog.list_from(tenant, first_name), lambda r: r.name)
            return [record for _, records in islice(by_name, num_names) for record in records]

    def list_versions(
        self, tenant: str, first_name: str, num_names: int
    ) -> Sequence[AdapterRecord]:
        """List all versions, retired ones included, of the tenant's next names."""
        with self._lock:
            found = self._catalog.list_from(tenant, first_name, with_retired=True)
            by_name = groupby(found, lambda record: record.name)
            return [record for _, records in islice(by_name, num_names) for record in records]

    def tenants_from(self, first: str) -> Sequence[str]:
        """List the tenants that have ever published, from this name on."""
        with self._lock:
            return self._catalog.tenants_from(first)

    def versions_of(self, tenant: str, name: str) -> Sequence[AdapterRecord]:
        """List all versions of a name, retired ones included."""
        with self._lock:
            return self._catalog.versions_of(tenant, name)

    def num_live(self, tenant: str) -> int:
        """Count the live versions of a tenant."""
        with self._lock:
            return self._catalog.num_live(tenant)

    def publish(
        self,
        tenant: str,
        name: str,
        manifest: AdapterManifest,
        generation: int = 0,
        only_new: bool = False,
        by: str = "",
        limits: PublishLimits = NO_LIMITS,
    ) -> AdapterRef:
        """Append the name's next version, unless the latest has this very content; return it.

        `generation` says where its files were uploaded to, `by` who publishes, as the log keeps it.
        Raises InvalidName, LimitExceeded, FilesRemoved if the files need not be there any more, and
        AdapterExists if the name should be new and is not.
        """
        check_name("tenant", tenant)
        check_name("adapter", name)

        own_files = [name for name in OWN_NAMES if name in manifest.files]

        def record(catalog: Catalog) -> Record | None:
            if only_new and catalog.live_versions(tenant, name):
                raise AdapterExists(f"{name} of tenant {tenant} exists already")
            if _is_latest(catalog, tenant, name, manifest):
                return None
            limits.check_number(tenant, catalog.num_live(tenant))
            limits.check_bytes(tenant, catalog.live_bytes(tenant), manifest.nbytes)
            if not catalog.may_use(Place(manifest.digest, generation)):
                raise FilesRemoved(f"the files of {manifest.digest} were removed as garbage")
            return {
                "kind": "publish",
                "tenant": tenant,
                "name": name,
                "version": catalog.num_versions(tenant, name) + 1,
                "digest": manifest.digest,
                "base": manifest.base,
                "lora_rank": manifest.lora_rank,
                "nbytes": manifest.nbytes,
                "published_s": self._wall_clock(),
                "generation": generation,
                "own_files": own_files,
                "vocab_size": manifest.vocab_size,
            }

        self._append(record, by)
        with self._lock:
            version = self._catalog.find_digest(tenant, name, manifest.digest)
        if version is None:
            raise AdapterNotFound(f"{name} of tenant {tenant} was retired while it was published")
        return AdapterRef(
            tenant,
            name,
            version,
            manifest.digest,
            manifest.base,
            vocab_size=manifest.vocab_size,
            lora_rank=manifest.lora_rank,
        )

    def check_room(
        self, tenant: str, name: str, manifest: AdapterManifest, limits: PublishLimits
    ) -> None:
        """Raise LimitExceeded where `publish` would: to be asked before files are uploaded."""
        limits.check_rank(manifest.lora_rank)
        with self._lock:
            if not _is_latest(self._catalog, tenant, name, manifest):
                limits.check_number(tenant, self._catalog.num_live(tenant))
                limits.check_bytes(tenant, self._catalog.live_bytes(tenant), manifest.nbytes)

    def alias(self, tenant: str, name: str, alias: str, version: int, by: str = "") -> None:
        """Make name@alias mean this version from now on. Raises InvalidName, AdapterNotFound."""
        self.share(tenant, name, alias, {version: 1.0}, by=by)

    def share(
        self,
        tenant: str,
        name: str,
        alias: str,
        weights: Mapping[int, float],
        trial: Trial | None = None,
        by: str = "",
        expected: int | None = None,
        because: Mapping[str, Any] | None = None,
    ) -> bool:
        """Make name@alias mean these live versions, by weight, from now on.

        With `expected`, only if the alias' last record has this number; returns whether it had.
        `because` is kept in the log. Raises InvalidName, InvalidShares, AdapterNotFound.
        """
        check_alias(alias)
        check_name("adapter", name)
        check_weights(weights, trial)
        is_expected = True

        def record(catalog: Catalog) -> Record | None:
            nonlocal is_expected
            view = catalog.alias_view(tenant, f"{name}@{alias}")
            is_expected = expected is None or (view is not None and view.record == expected)
            if not is_expected:
                return None
            refs = [catalog.resolve(tenant, f"{name}@{version}") for version in weights]
            check_one_base(name, refs)
            head = {"kind": "alias", "tenant": tenant, "name": name, "alias": alias}
            why = {} if because is None else {"because": dict(because)}
            return {**head, **to_record(weights, trial), **why}

        self._append(record, by)
        return is_expected

    def alias_view(self, tenant: str, full_name: str) -> AliasView | None:
        """Return the alias behind a name's @; None if there is none. Raises InvalidName."""
        with self._lock:
            return self._catalog.alias_view(tenant, full_name)

    def trials(self) -> set[int]:
        """Return the records with which the trials that go on began."""
        with self._lock:
            return self._catalog.trials()

    def note_flip(
        self, view: AliasView, outcome: str, details: Mapping[str, Any], by: str = ""
    ) -> bool:
        """Note once how the new versions of an alias were waited for; return whether it was new."""
        is_new = False

        def record(catalog: Catalog) -> Record | None:
            nonlocal is_new
            now = catalog.alias_view(view.tenant, f"{view.name}@{view.alias}")
            is_new = now is not None and now.record == view.record and not now.flip
            if not is_new:
                return None
            head = {"kind": "flip", "tenant": view.tenant, "name": view.name, "alias": view.alias}
            return {**head, "of": view.record, "outcome": outcome, **details}

        self._append(record, by)
        return is_new

    def retire(self, tenant: str, full_name: str, by: str = "") -> tuple[int, ...]:
        """Withdraw name@version, or every version of a bare name; return the versions withdrawn.

        Raises InvalidName, AdapterNotFound.
        """
        retired: tuple[int, ...] = ()

        def record(catalog: Catalog) -> Record:
            nonlocal retired
            ref = catalog.resolve(tenant, full_name)
            name, _ = split_name(full_name)
            alias = catalog.alias_view(tenant, full_name)
            check_one(full_name, [] if alias is None else [r.version for r, _ in alias.shares])
            retired = (ref.version,) if "@" in full_name else catalog.live_versions(tenant, name)
            return {"kind": "retire", "tenant": tenant, "name": name, "versions": list(retired)}

        self._append(record, by)
        return retired

    def restore(
        self,
        tenant: str,
        name: str,
        version: int,
        generation: int,
        by: str = "",
        limits: PublishLimits = NO_LIMITS,
    ) -> None:
        """Make a retired version live again, with its files of this generation.

        Raises InvalidName, AdapterNotFound, LimitExceeded, and FilesRemoved if the files need not
        be there any more. A version that is live stays so.
        """

        def record(catalog: Catalog) -> Record | None:
            found = restorable(catalog.versions_of(tenant, name), tenant, f"{name}@{version}")
            if found.state == "live":
                return None
            limits.check_number(tenant, catalog.num_live(tenant))
            limits.check_bytes(tenant, catalog.live_bytes(tenant), found.nbytes)
            if not catalog.may_use(Place(found.digest, generation)):
                raise FilesRemoved(f"the files of {found.digest} were removed as garbage")
            return {
                "kind": "restore",
                "tenant": tenant,
                "name": name,
                "version": version,
                "generation": generation,
            }

        self._append(record, by)

    def delete(self, tenant: str, full_name: str, by: str = "") -> tuple[int, ...]:
        """Retire name@version, or all versions of a bare name, for good; return the versions.

        Raises InvalidName, AdapterNotFound.
        """
        deleted: tuple[int, ...] = ()

        def record(catalog: Catalog) -> Record:
            nonlocal deleted
            name, selector = split_name(full_name)
            records = catalog.versions_of(tenant, name)
            deleted = chosen_versions(records, tenant, full_name, selector)
            return {"kind": "delete", "tenant": tenant, "name": name, "versions": list(deleted)}

        self._append(record, by)
        return deleted

    def note(self, digest: str, verdict: Verdict) -> bool:
        """Append a verdict on a live adapter, unless it says what the last one said.

        Returns whether it is kept by now.
        """
        is_live = False

        def record(catalog: Catalog) -> Record | None:
            nonlocal is_live
            is_live = catalog.is_live(digest)
            if not is_live or verdict.says_the_same_as(catalog.verdict_of(digest)):
                return None
            dated = replace(verdict, proven_s=self._wall_clock())
            return {"kind": "verdict", "digest": digest, "verdict": dated.to_data()}

        self._append(record, "an engine")
        return is_live

    def verdict_of(self, digest: str) -> Verdict | None:
        """Return what an engine has found out about this content; None if nothing."""
        with self._lock:
            return self._catalog.verdict_of(digest)

    # ---- files ---------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """The number of collections so far."""
        return self._catalog.generation

    def place_of(self, digest: str) -> Place:
        """Return where files with this digest are, or where an upload has to put them."""
        with self._lock:
            return self._catalog.place_of(digest)

    def own_files_of(self, digest: str) -> tuple[str, ...] | None:
        """List the files that an adapter brings beside its weights; None if it is not known."""
        with self._lock:
            return self._catalog.own_files_of(digest)

    def is_live_at(self, place: Place) -> bool:
        """Check that a live version has its files in this place."""
        with self._lock:
            return self._catalog.is_live_at(place)

    def places_retired_by(self, numbers: Collection[int | None]) -> set[Place]:
        """Return where the files of the versions lie that these records retired."""
        with self._lock:
            return self._catalog.places_retired_by(numbers)

    def begin_generation(self) -> None:
        """Make all garbage of the present generation garbage for good."""

        def record(catalog: Catalog) -> Record:
            return {"kind": "collect", "generation": catalog.generation + 1}

        self._append(record, "the collector")

    # ---- snapshots -----------------------------------------------------------------------------

    def save_snapshot(self) -> None:
        """Write a snapshot of the state, unless there is one.

        What reads names meanwhile waits for a few adapters at a time, not for all.
        """
        with self._saving:
            self._records.save_snapshot(*self._encoded())

    def _encoded(self) -> tuple[int, bytes]:
        """Encode the state as of the end of this; return the number of its last record, too."""
        with self._lock:
            catalog = self._catalog
            keys = catalog.begin_snapshot()
        adapters: dict[Key, bytes] = {}
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            with self._lock:
                found = [catalog.adapter_data(key) for key in some]
            adapters.update((key, encode(data)) for key, data in zip(some, found, strict=True))
        with self._lock:
            changed = catalog.end_snapshot()
            adapters.update((key, encode(catalog.adapter_data(key))) for key in changed)
            number, others = catalog.num_records, catalog.other_data()
        listed = b", ".join(adapters[key] for key in sorted(adapters))
        return number, b'{"adapters": [' + listed + b"], " + encode(others)[1:]


def _is_latest(catalog: Catalog, tenant: str, name: str, manifest: AdapterManifest) -> bool:
    """Check that the name's latest version for this base has this very content."""
    found = catalog.find_digest(tenant, name, manifest.digest)
    return found is not None and found == catalog.latest(tenant, name, manifest.base)
