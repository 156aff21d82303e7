"""Publish adapters, resolve their names and fetch them into verified folders on local disk.

AdapterStore is the facade over registry, object store and disk cache that other packages use.
Knows no HTTP, no engine and no tensor.
"""

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from adapter_store.aliases import AliasView, Trial
from adapter_store.audit import MAX_AUDITED, AuditLog, AuditPage
from adapter_store.bases import BaseModel, describe_base, parse_base
from adapter_store.blobs import Blobs
from adapter_store.conversion.options import ConversionOptions
from adapter_store.conversion.upload import converted_upload
from adapter_store.disk_cache import DiskCache
from adapter_store.errors import (
    AccessDenied,
    AdapterNotFound,
    AdapterStoreError,
    BaseNotFound,
    NotAStore,
    ObjectNotFound,
    SourceUnavailable,
    StoreCorrupt,
)
from adapter_store.garbage import Collector, Garbage, OnObjects
from adapter_store.limits import NO_LIMITS, PublishLimits
from adapter_store.manifest import AdapterManifest, is_digest, prepare
from adapter_store.merged_folder import MergedAdapter
from adapter_store.names import AdapterRecord, AdapterRef, Place, check_name
from adapter_store.object_store import (
    ObjectStore,
    OnBytes,
    Reading,
    always_wanted,
    ignore_bytes,
)
from adapter_store.open_store import open_store
from adapter_store.own_files import NO_OWN_FILES, OwnFiles
from adapter_store.plain_folders import PlainFolders
from adapter_store.plain_origin import PLAIN_NAMESPACE
from adapter_store.plain_store import PlainStore
from adapter_store.publishing import publish, publish_again, restore
from adapter_store.recipes import Recipe
from adapter_store.registry import Registry, check_may_write
from adapter_store.sources import local_folder
from adapter_store.trial_counts import TRIALS, TrialCounts
from adapter_store.verdict import Verdict

MISS_INTERVAL_S = 0.1  # unknown names cause at most one read of the log in this time
PATIENCE_S = 2.0  # how long to wait for a store that does not answer
_PREFIXES = (
    "log/",
    "bases/",
    "blobs/",
    "snapshots/",
    "audit/",
    "probe/",
    "usage/",
    TRIALS,
    "keys/",
)  # all that a store holds
MIN_PREFIX = 8  # digits that the beginning of a fingerprint must have
_log = logging.getLogger(__name__)


class AdapterStore:
    """One root in an object store, and this machine's cache of it. Thread-safe.

    `resolve` and `list` answer from memory. They read new records of the log if the last
    `refresh_interval_s` seconds brought no refresh, and after a miss; with an interval of infinity
    only after a miss. While the store is unreachable, silent for PATIENCE_S, or damaged, names that
    are known still resolve.

    With `read_only`, opening writes nothing to the object store; the caller must not either,
    but for `remove_garbage`. Without `may_write` all that would write raises AccessDenied.
    `single_writer` is the caller's word that no other process writes meanwhile; then S3 servers are
    taken that do not keep one of two concurrent conditional writes.

    What lies in folders below a `plain_root` are adapters of a namespace of their own. They are
    never written, nobody publishes them, and they have one version: what is there now.

    `disk_bytes` bounds the cache at `disk_path`. Besides the errors that they name, methods raise
    SourceUnavailable if they need the object store and cannot use it, StoreCorrupt if they find the
    log damaged, OSError if `disk_path` cannot be used, and ValueError for a malformed digest.
    """

    def __init__(
        self,
        root: str,
        disk_path: Path,
        disk_bytes: int,
        *,
        endpoint_url: str | None = None,
        read_only: bool = False,
        may_write: bool = True,
        single_writer: bool = False,
        plain_root: str | None = None,
        plain_endpoint_url: str | None = None,
        refresh_interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self.endpoint_url = endpoint_url
        self._objects = open_store(
            root,
            endpoint_url,
            read_only=read_only or not may_write,
            single_writer=single_writer,
        )
        self._may_write = may_write
        self._blobs = Blobs(self._objects)
        self._cache = DiskCache(disk_path, disk_bytes)
        # A read of the log that hangs keeps names at what they meant, so it is given up early.
        self._log_reader = open_store(root, endpoint_url, read_only=True, is_impatient=True)
        self._registry = Registry(
            self._objects, wall_clock, self._log_reader, may_write, _do_in_thread
        )
        self._collector = Collector(self._objects, self._registry)
        self._audit = AuditLog(self._objects)
        self._trial_counts = TrialCounts(self._objects)
        self._scratch = disk_path / ".bases"
        self._uploads = disk_path / ".uploads"
        self._plain: PlainStore | None = None
        if plain_root is not None:
            where = (plain_root, plain_endpoint_url)
            looks = open_store(*where, read_only=True, is_impatient=True)
            folders = PlainFolders(plain_root, looks, clock)
            objects = open_store(*where, read_only=True)
            self._plain = PlainStore(folders, objects, self._cache, self.base_model, self._uploads)
        self._interval_s = refresh_interval_s
        self._clock = clock
        self._merging = threading.Lock()
        self._lock = threading.Lock()  # guards the three below
        self._next_refresh_s = clock() + refresh_interval_s
        self._next_miss_s = clock()
        self._last_refresh: Future[None] = Future()  # done or in progress
        self._last_refresh.set_result(None)

    @property
    def objects(self) -> ObjectStore:
        """The object store itself, for other logs in it."""
        return self._objects

    # ---- bases ---------------------------------------------------------------------------------

    def register_base(
        self, model_folder: Path, on_bytes: OnBytes = ignore_bytes, *, required: bool = True
    ) -> str:
        """Hash a model folder and store its description; return its fingerprint.

        Needed once per base. `on_bytes` is called with the bytes hashed since its last call.
        Raises BaseInvalid, and AccessDenied if the store may only be read and this is `required`:
        to publish for the base, not to serve it.
        """
        base = describe_base(Path(model_folder), self._scratch, on_bytes)
        try:
            self._store_base(base)
        except AccessDenied as error:
            if required:
                raise
            _log.warning(
                "the store may only be read, so base %s is not registered; publishing for it "
                "needs `reef publish --base` with the right to write: %s",
                base.fingerprint[:12],
                error,
            )
        return base.fingerprint

    def _store_base(self, base: BaseModel) -> None:
        """Write a description unless it is there. Of two text sides, the latest counts."""
        check_may_write(self._may_write)
        key, described = f"bases/{base.fingerprint}.json", base.to_json()
        if self._objects.size(key) is None:
            self._objects.put_if_absent(key, described)
        if self._objects.get(key) != described:
            self._objects.put(key, described)

    def fingerprint(self, model_folder: Path, on_bytes: OnBytes = ignore_bytes) -> str:
        """Hash a model folder; write nothing to the object store. Raises BaseInvalid."""
        return describe_base(Path(model_folder), self._scratch, on_bytes).fingerprint

    def bases(self) -> tuple[str, ...]:
        """List the fingerprints of all known bases."""
        keys = self._objects.list("bases/")
        return tuple(key.removeprefix("bases/").removesuffix(".json") for key in keys)

    def base_model(self, base: str | None = None) -> BaseModel:
        """Return the base with this fingerprint, or with this beginning of one.

        None means the only base there is. Raises BaseNotFound, StoreCorrupt.
        """
        if base is not None and is_digest(base):  # then there is nothing to look for
            with contextlib.suppress(ObjectNotFound):
                return parse_base(self._objects.get(f"bases/{base}.json"), base)
        known = self.bases()
        if base is not None and len(base) < MIN_PREFIX:
            raise BaseNotFound(f"base {base!r} must be at least {MIN_PREFIX} digits")
        found = [fingerprint for fingerprint in known if fingerprint.startswith(base or "")]
        if len(found) != 1:
            wanted = "no base was named" if base is None else f"{base!r} is not one of the bases"
            listed = ", ".join(known) or "none: register one first"
            raise BaseNotFound(f"{wanted}; the store knows {listed}")
        return parse_base(self._objects.get(f"bases/{found[0]}.json"), found[0])

    # ---- names ---------------------------------------------------------------------------------

    def publish(
        self,
        folder: str | Path,
        tenant: str,
        name: str,
        base: str | None = None,
        on_bytes: OnBytes = ignore_bytes,
        *,
        only_new: bool = False,
        conversion: ConversionOptions | None = None,
        by: str = "",
        limits: PublishLimits = NO_LIMITS,
    ) -> AdapterRef:
        """Check a PEFT folder, store it and make it the name's next version.

        With `conversion`, the folder may hold what other trainers and methods write; then
        `on_bytes` counts its bytes once more.

        If the name's latest version has the same content, that one is returned. `on_bytes` is
        called with the bytes processed since its last call, perhaps from another thread; each byte
        of the weights counts three times: checked, hashed, copied. `by` says in the log who did it.
        Raises InvalidName, AdapterInvalid, LimitExceeded, BaseNotFound, StoreCorrupt, and
        AdapterExists if the name should be new and has a live version.
        """
        check_name("tenant", tenant)
        check_name("adapter", name)
        check_may_write(self._may_write)
        upload = local_folder(folder)
        model = self.base_model(base)
        with converted_upload(upload, model, conversion, self._uploads, on_bytes) as ready:
            prepared = prepare(ready.folder, model, on_bytes, ready.record)
            return publish(
                self._blobs, self._registry, tenant, name, prepared, on_bytes, only_new, by, limits
            )

    def publish_again(
        self,
        source: tuple[str, str],
        tenant: str,
        name: str,
        *,
        only_new: bool = False,
        by: str = "",
        limits: PublishLimits = NO_LIMITS,
    ) -> AdapterRef:
        """Make a tenant's live name[@version|alias] the next version of another name, too.

        `source` is that tenant and name. No file is moved. Raises what `publish` raises, and
        AdapterNotFound.
        """
        check_name("tenant", source[0])
        check_name("tenant", tenant)
        check_name("adapter", name)
        return publish_again(
            self._blobs, self._registry, source, tenant, name, only_new, by, limits
        )

    @contextlib.contextmanager
    def scratch(self) -> Generator[Path, None, None]:
        """Yield an empty folder on the cache's disk for what is still to be published."""
        self._uploads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._uploads) as folder:
            yield Path(folder)

    @property
    def damage(self) -> str | None:
        """Which record of the log is damaged, as of the last refresh; None if none is.

        Names that only later records could know raise StoreCorrupt, and nothing can be written.
        """
        return self._registry.damage

    def resolve(self, tenant: str, full_name: str, base: str | None = None) -> AdapterRef:
        """Return what name[@version|alias] means now. Raises AdapterNotFound, InvalidName."""
        return self.resolve_first([(tenant, base)], full_name)

    def resolve_first(self, places: Sequence[tuple[str, str | None]], full_name: str) -> AdapterRef:
        """Return what the name means in the first of these (tenant, base) that has it.

        Only a name that none of them has is a miss, and causes a read of the log. Raises
        AdapterNotFound, InvalidName.
        """
        self._refresh_if_due()
        try:
            return self._find(places, full_name)
        except AdapterNotFound:
            self._refresh_after_miss()
        return self._find(places, full_name)

    def resolve_known(
        self, places: Sequence[tuple[str, str | None]], full_name: str
    ) -> AdapterRef | None:
        """Return what `resolve_first` would return, if it can do so from memory; never wait.

        None means that the caller must ask `resolve_first`, in a thread. Raises InvalidName.
        """
        with self._lock:
            if self._is_refresh_due(self._clock()):
                return None
        try:
            return self._find(places, full_name, may_look=False)
        except AdapterNotFound:
            return None

    def alias(self, tenant: str, name: str, alias: str, version: int, by: str = "") -> None:
        """Make name@alias mean this live version from now on.

        Raises AdapterNotFound, InvalidName, StoreCorrupt.
        """
        self._registry.alias(tenant, name, alias, version, by)

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
        """Make name@alias mean these live versions of one base, by weight, from now on.

        With a `trial`, one of two versions is judged beside the other. With `expected`, nothing
        changes unless the alias' last record has this number, so of several processes that
        conclude the same one does it; returns whether it had. `because` is kept in the log. Raises
        AdapterNotFound, InvalidName, InvalidShares, StoreCorrupt.
        """
        return self._registry.share(tenant, name, alias, weights, trial, by, expected, because)

    def alias_view(self, tenant: str, full_name: str) -> AliasView | None:
        """Tell from memory which versions an alias means; None if the name has no alias.

        Raises InvalidName.
        """
        return self._registry.alias_view(tenant, full_name)

    def note_flip(
        self, view: AliasView, outcome: str, details: Mapping[str, Any], by: str = ""
    ) -> bool:
        """Note in the log, once, how the new versions of an alias were waited for.

        Returns whether it was not noted yet. Raises StoreCorrupt.
        """
        return self._registry.note_flip(view, outcome, details, by)

    def put_trial_counts(self, began: int, writer: str, counts: bytes) -> None:
        """Replace what a process has counted of the trial that began with this record."""
        check_may_write(self._may_write)
        self._trial_counts.put(began, writer, counts)

    def trial_counts(self, began: int, but: str = "") -> Sequence[bytes]:
        """Read what all processes have counted of a trial, but for one of them."""
        return self._trial_counts.read(began, but)

    def remove_trial_counts(self, began: int) -> None:
        """Remove the counts of a trial that is over."""
        self._trial_counts.remove(began)

    def retire(self, tenant: str, full_name: str, by: str = "") -> tuple[int, ...]:
        """Withdraw name@version, or all versions of a bare name; return the versions.

        Their files become garbage. Raises AdapterNotFound, InvalidName, StoreCorrupt.
        """
        return self._registry.retire(tenant, full_name, by)

    def restore(
        self, tenant: str, full_name: str, by: str = "", limits: PublishLimits = NO_LIMITS
    ) -> AdapterRef:
        """Make a retired name@version live again; return what it means then.

        Raises AdapterNotFound, InvalidName, LimitExceeded, StoreCorrupt, and FilesRemoved if its
        files were removed meanwhile.
        """
        check_name("tenant", tenant)
        self._uploads.mkdir(parents=True, exist_ok=True)
        return restore(self._blobs, self._registry, tenant, full_name, self._uploads, by, limits)

    def delete(self, tenant: str, full_name: str, by: str = "") -> tuple[int, ...]:
        """Retire for good, as `retire` does, also what is retired already.

        Raises AdapterNotFound, InvalidName, StoreCorrupt.
        """
        return self._registry.delete(tenant, full_name, by)

    def audit(
        self, before: int | None = None, limit: int = MAX_AUDITED, tenant: str | None = None
    ) -> AuditPage:
        """Read who has changed what, the newest first, from before this entry on.

        At most `limit` entries are looked at, of which those of one tenant may be fewer. Raises
        ValueError for a limit that is not in [1, MAX_AUDITED].
        """
        self.refresh()
        last = self._registry.num_records
        return self._audit.read(last if before is None else min(last, before - 1), limit, tenant)

    def note_verdict(self, digest: str, verdict: Verdict) -> bool:
        """Keep what an engine has found out about an adapter, unless it was known.

        Returns whether it is kept: what no live version has is not. Raises AccessDenied,
        StoreCorrupt.
        """
        if verdict.says_the_same_as(self.verdict_of(digest)):
            return True
        return self._registry.note(digest, verdict)

    def verdict_of(self, ref_or_digest: AdapterRef | str) -> Verdict | None:
        """Tell from memory what an engine has found out about an adapter."""
        return self._registry.verdict_of(_digest(ref_or_digest))

    def refresh(self) -> None:
        """Read what other processes have published, aliased or retired. Raises StoreCorrupt."""
        with self._lock:
            self._next_refresh_s = self._clock() + self._interval_s
        self._registry.refresh()

    # ---- files ---------------------------------------------------------------------------------

    def ensure_local(
        self,
        ref_or_digest: AdapterRef | str,
        is_wanted: Callable[[], bool] = always_wanted,
    ) -> Path:
        """Return the adapter's verified folder, after fetching it if need be.

        One with a recipe is computed here from its members, which are fetched first. It may be
        evicted unless it was pinned before. `is_wanted` is asked now and then while it is fetched.
        Raises AdapterTooLarge, CacheFull, ObjectNotFound, StoreCorrupt; AdapterInvalid if members
        cannot be combined; DownloadStopped if it is not wanted any more.
        """
        if isinstance(ref_or_digest, AdapterRef):
            if ref_or_digest.recipe is not None:
                return self._ensure_merged(ref_or_digest, ref_or_digest.recipe, is_wanted)
            if plain := self._plain_of(ref_or_digest):
                return plain.ensure_local(ref_or_digest, is_wanted)
        digest = _digest(ref_or_digest)
        place = self._registry.place_of(digest)
        how = Reading(is_wanted=is_wanted)
        return self._cache.ensure(
            digest, lambda name, path: self._blobs.download(place, name, path, how)
        )

    def _ensure_merged(
        self, ref: AdapterRef, recipe: Recipe, is_wanted: Callable[[], bool]
    ) -> Path:
        """Compute one adapter at a time: it takes a processor and the memory of a module."""
        with contextlib.ExitStack() as pins:
            for member in recipe.members:
                pins.enter_context(self._cache.pinned(member))
            folders = [self.ensure_local(member, is_wanted) for member in recipe.members]
            with self._merging:
                merged = MergedAdapter(recipe, ref.base, folders)
                return self._cache.ensure_built(ref.digest, merged)

    def find_local(self, ref_or_digest: AdapterRef | str) -> Path | None:
        """Return the adapter's verified folder if it is on disk; never ask the object store."""
        return self._cache.find(_digest(ref_or_digest))

    def distrust(self, ref_or_digest: AdapterRef | str) -> None:
        """Verify the adapter's folder again at its next use: it could not be read."""
        self._cache.distrust(_digest(ref_or_digest))

    def pin(self, ref_or_digest: AdapterRef | str) -> None:
        """Forbid eviction until as many calls of `unpin`, even before the folder is on disk."""
        self._cache.pin(_digest(ref_or_digest))

    def unpin(self, ref_or_digest: AdapterRef | str) -> None:
        """Undo one `pin`; ValueError if there is none."""
        self._cache.unpin(_digest(ref_or_digest))

    @contextlib.contextmanager
    def pinned(self, ref_or_digest: AdapterRef | str) -> Generator[Path, None, None]:
        """Yield the adapter's folder, which is not evicted during the block.

        Raises the errors of `ensure_local`.
        """
        with self._cache.pinned(_digest(ref_or_digest)):
            yield self.ensure_local(ref_or_digest)

    def is_local(self, ref_or_digest: AdapterRef | str) -> bool:
        """Check whether the adapter's folder is on disk."""
        return self._cache.contains(_digest(ref_or_digest))

    def manifest(self, ref_or_digest: AdapterRef | str) -> AdapterManifest:
        """Read ranks, modules and sizes from the object store.

        Raises ObjectNotFound, StoreCorrupt.
        """
        return self._blobs.manifest(self._registry.place_of(_digest(ref_or_digest)))

    def is_bare(self, ref_or_digest: AdapterRef | str) -> bool:
        """Tell from memory whether the adapter brings nothing beside its weights."""
        if isinstance(ref_or_digest, AdapterRef) and (plain := self._plain_of(ref_or_digest)):
            return plain.is_bare(ref_or_digest)
        return self._registry.own_files_of(_digest(ref_or_digest)) == ()

    def own_files(self, ref_or_digest: AdapterRef | str) -> OwnFiles:
        """Read what the adapter brings beside its weights from the object store.

        Raises ObjectNotFound, StoreCorrupt.
        """
        if self.is_bare(ref_or_digest):
            return NO_OWN_FILES
        if isinstance(ref_or_digest, AdapterRef) and (plain := self._plain_of(ref_or_digest)):
            return plain.own_files(ref_or_digest)
        return self._blobs.own_files(self._registry.place_of(_digest(ref_or_digest)))

    def verify(
        self, records: Iterable[AdapterRecord], on_bytes: OnBytes = ignore_bytes
    ) -> list[str]:
        """Hash the stored files of these adapters; return one sentence for each problem.

        `on_bytes` is called with the bytes hashed since its last call.
        """
        places = dict.fromkeys(Place(record.digest, record.generation) for record in records)
        return [problem for place in places for problem in self._blobs.problems(place, on_bytes)]

    def find_garbage(self, grace_s: float) -> Garbage:
        """List what has not been needed for `grace_s` seconds; write nothing.

        Raises StoreCorrupt, also if the log cannot be read to its end.
        """
        return self._collector.find(grace_s)

    def remove_garbage(self, garbage: Garbage, on_objects: OnObjects = ignore_bytes) -> Garbage:
        """Remove what was found, unless it is used again; return what was removed.

        `on_objects` is called with the number of objects removed since its last call. Folders on
        local disk stay, as they are found by what they hold. Raises AccessDenied.
        """
        return self._collector.remove(garbage, on_objects)

    def check_is_store(self) -> None:
        """Raise NotAStore if the root holds other files alone, or is a folder that is not there."""
        url = urlsplit(self._root)
        if url.scheme == "file" and not Path(unquote(url.path)).is_dir():
            raise NotAStore(f"there is no adapter store at {self._root}: no such folder")
        if any(self._objects.has_any(prefix) for prefix in _PREFIXES):
            return
        if self._objects.has_any(""):
            raise NotAStore(f"{self._root} is no adapter store: it holds other files alone")

    def list(self, tenant: str | None = None) -> Sequence[AdapterRecord]:
        """List all live versions, of one tenant or of all."""
        self._refresh_if_due()
        return self._registry.list(tenant)

    def list_from(self, tenant: str, first_name: str, num_names: int) -> Sequence[AdapterRecord]:
        """List the live versions of at most so many of a tenant's names, from this one on.

        Of the namespace PLAIN_NAMESPACE all folders, with nothing but their names.
        """
        if self._plain is not None and tenant == PLAIN_NAMESPACE:
            return self._plain.folders.list_from(first_name, num_names)
        self._refresh_if_due()
        return self._registry.list_from(tenant, first_name, num_names)

    def list_versions(
        self, tenant: str, first_name: str, num_names: int
    ) -> Sequence[AdapterRecord]:
        """List all versions, retired ones included, of at most so many of a tenant's names."""
        self._refresh_if_due()
        return self._registry.list_versions(tenant, first_name, num_names)

    def versions_of(self, tenant: str, name: str) -> Sequence[AdapterRecord]:
        """List all versions of a name, retired ones included."""
        self._refresh_if_due()
        return self._registry.versions_of(tenant, name)

    def tenants_from(self, first: str = "") -> Sequence[str]:
        """List the tenants that have ever published, from this name on."""
        self._refresh_if_due()
        return self._registry.tenants_from(first)

    def num_live(self, tenant: str) -> int:
        """Count a tenant's live versions from memory."""
        return self._registry.num_live(tenant)

    # ---- inside --------------------------------------------------------------------------------

    def _find(
        self,
        places: Sequence[tuple[str, str | None]],
        full_name: str,
        may_look: bool = True,
    ) -> AdapterRef:
        *others, last = places
        for tenant, base in others:
            with contextlib.suppress(AdapterNotFound):
                return self._find_in(tenant, full_name, base, may_look)
        return self._find_in(last[0], full_name, last[1], may_look)

    def _plain_of(self, ref: AdapterRef) -> PlainStore | None:
        """Return where a reference's adapter lies, if nobody has published it."""
        return self._plain if ref.tenant == PLAIN_NAMESPACE else None

    def _find_in(self, tenant: str, full_name: str, base: str | None, may_look: bool) -> AdapterRef:
        if self._plain is not None and tenant == PLAIN_NAMESPACE:
            return self._plain.find(full_name, base, may_look)
        return self._registry.resolve(tenant, full_name, base)

    def _is_refresh_due(self, now: float) -> bool:
        return now >= self._next_refresh_s and self._last_refresh.done()

    def _refresh_if_due(self) -> None:
        """Read new records if the interval has passed.

        A store that is down is only logged, and so is damage, by the registry.
        """
        with self._lock:
            now = self._clock()
            if not self._is_refresh_due(now):
                return
            self._next_refresh_s = now + self._interval_s
            refresh = self._start_refresh()
        try:
            _wait_for(refresh)
        except (SourceUnavailable, ObjectNotFound) as error:
            _log.warning("answering from memory, the log cannot be followed: %s", error)
        except StoreCorrupt:
            pass

    def _refresh_after_miss(self) -> None:
        """Wait for a new refresh, or for the last one if that is in progress or recent.

        Raises SourceUnavailable, StoreCorrupt.
        """
        with self._lock:
            now = self._clock()
            if now >= self._next_miss_s and self._last_refresh.done():
                self._next_miss_s = now + MISS_INTERVAL_S
                self._start_refresh()
            refresh = self._last_refresh
        _wait_for(refresh)

    def _start_refresh(self) -> Future[None]:
        """Read new records in a thread, because a request that hangs cannot be interrupted."""
        refresh: Future[None] = Future()

        def run() -> None:
            try:
                self._registry.refresh()
            except BaseException as error:
                refresh.set_exception(error)
            else:
                refresh.set_result(None)

        threading.Thread(target=run, name="adapter-refresh", daemon=True).start()
        self._last_refresh = refresh
        return refresh


def _do_in_thread(work: Callable[[], None]) -> None:
    """Write a snapshot beside what goes on; a process that ends waits for it.

    One that fails is left to the next writer: readers do without.
    """

    def run() -> None:
        try:
            work()
        except AdapterStoreError as error:
            _log.warning("no snapshot of the log was written: %s", error)

    threading.Thread(target=run, name="adapter-snapshot").start()


def _wait_for(refresh: Future[None]) -> None:
    try:
        refresh.result(PATIENCE_S)
    except TimeoutError as error:
        raise SourceUnavailable(f"the store has not answered for {PATIENCE_S} s") from error


def _digest(ref_or_digest: AdapterRef | str) -> str:
    return ref_or_digest.digest if isinstance(ref_or_digest, AdapterRef) else ref_or_digest
