"""Admin: what the holders of publish_keys and admin_keys do with adapters.

The store's log is the truth, as for every ingress replica. All that waits for a disk or takes a
processor runs in threads, of which there are few.
"""

import asyncio
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from adapter_store.aliases import AliasView, Trial
from adapter_store.archives import unpack
from adapter_store.audit import AuditPage
from adapter_store.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    AdapterTooLarge,
    BaseNotFound,
    FilesRemoved,
    InvalidName,
    InvalidShares,
    LimitExceeded,
    NoRoom,
    ObjectNotFound,
)
from adapter_store.limits import PublishLimits
from adapter_store.listing import Page, Position, Wanted, page_of, version_of
from adapter_store.manifest import AdapterManifest
from adapter_store.names import AdapterRecord, AdapterRef, check_name
from adapter_store.store import AdapterStore
from deployments.config_sections import AdminSection
from deployments.ingress.allowed_sources import AllowedSources
from deployments.ingress.fetched_uploads import fetch
from deployments.ingress.http_errors import ApiError, forbidden, invalid, overloaded
from deployments.ingress.trial_figures import decode_counts, judged, merged
from deployments.ingress.upload_folders import UploadFolder, UploadFolders, disk_error
from deployments.ingress.uploads import ARCHIVE, receive
from deployments.ingress.verification import Verification
from deployments.tenants.tenant import Publisher, UploadLimits
from deployments.tenants.tenants import Tenants

MAX_UPLOADS = 4  # at a time, at one ingress replica
MAX_UPLOADS_OF_TENANT = 2
MAX_WAITING = 32  # other requests
PAGE = 1000
FETCH_S = 900.0  # for an adapter that the server fetches, from the request on
PUBLISHERS = 2  # threads that check and publish

T = TypeVar("T")


class Admin:
    """Used in one event loop. Uploads lie below `scratch` while they are published.

    `endpoint_url` is that of the S3 to fetch from; None: AWS.
    """

    def __init__(
        self,
        store: AdapterStore,
        tenants: Tenants,
        settings: AdminSection,
        scratch: Path,
        endpoint_url: str | None = None,
    ) -> None:
        self.store = store
        self._tenants = tenants
        self._defaults = UploadLimits(
            settings.max_upload_bytes,
            settings.max_lora_rank,
            settings.max_adapters,
            settings.max_stored_bytes,
        )
        self._sources = AllowedSources(settings.publish_from or ())
        self._endpoint_url = endpoint_url
        self._folders = UploadFolders(scratch)
        self._publishers = ThreadPoolExecutor(PUBLISHERS, "admin-publish")
        self._fetchers = ThreadPoolExecutor(MAX_UPLOADS, "admin-fetch")
        self._others = ThreadPoolExecutor(PUBLISHERS, "admin")
        self._uploads: Counter[str] = Counter()  # by tenant
        self._num_waiting = 0
        self._verification: weakref.ref[Verification] | None = None

    @property
    def num_uploads(self) -> int:
        """How many are being received or published."""
        return self._uploads.total()

    def close(self) -> None:
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._publishers.shutdown(wait=False, cancel_futures=True)
        self._others.shutdown(wait=False, cancel_futures=True)

    # ---- uploads -------------------------------------------------------------------------

    async def publish(
        self,
        http_request: HttpRequest,
        publisher: Publisher,
        place: tuple[str, str],
        base: str,
        only_new: bool,
    ) -> AdapterRef:
        """Publish a request's body as the next version of a (tenant, name).

        Nothing of the body is read before all else is known to be right. Once it has been read the
        work is done, though the client may go. Raises ApiError, ClientDisconnect.
        """
        tenant, name = place
        check_right(publisher, tenant)
        limits = self._tenants.upload_limits(tenant, self._defaults)
        await self.run(lambda: self._check_before(tenant, name, base, limits))
        self._take_slot(tenant)
        try:
            folder = await asyncio.to_thread(self._folders.open)
            try:
                await receive(http_request, folder, limits.max_upload_bytes)
            except BaseException:
                await asyncio.shield(asyncio.to_thread(folder.close))
                raise
        except BaseException:
            self._free_slot(tenant)
            raise
        author = publisher.author

        def work() -> AdapterRef:
            with folder:
                return self._publish(folder, tenant, name, base, only_new, author, limits)

        return await self._does(self._publishers, tenant, work)

    async def publish_from(
        self, source: str, publisher: Publisher, place: tuple[str, str], base: str, only_new: bool
    ) -> AdapterRef:
        """Fetch an adapter from an address that is allowed, and publish it as `publish` does.

        What is there is not said of other addresses. Raises ApiError.
        """
        tenant, name = place
        check_right(publisher, tenant)
        if not self._sources.has(source):
            raise invalid(
                f"source {source[:200]!r} is below none of the prefixes that the server allows "
                "(admin.publish_from).",
                "source",
            )
        limits = self._tenants.upload_limits(tenant, self._defaults)
        await self.run(lambda: self._check_before(tenant, name, base, limits))
        self._take_slot(tenant)
        deadline_s = time.monotonic() + FETCH_S

        def work() -> AdapterRef:
            with self._folders.open() as folder:
                fetch(source, self._endpoint_url, folder, limits.max_upload_bytes, deadline_s)
                published = self._publishers.submit(
                    self._publish, folder, tenant, name, base, only_new, publisher.author, limits
                )
                return published.result()

        return await self._does(self._fetchers, tenant, work)

    async def publish_again(
        self, source: str, publisher: Publisher, place: tuple[str, str], only_new: bool
    ) -> AdapterRef:
        """Publish a live version under another name, too, without its bytes. Raises ApiError."""
        tenant, name = place
        check_right(publisher, tenant)
        owner, slash, full_name = source.partition("/")
        found = (owner, full_name) if slash else (tenant, source)
        check_right(publisher, found[0])
        wanted = self._tenants.upload_limits(tenant, self._defaults)
        limits = _of_publishing(wanted)
        by = publisher.author
        return await self.run(
            lambda: self.store.publish_again(
                found, tenant, name, only_new=only_new, by=by, limits=limits
            )
        )

    async def _does(
        self, threads: ThreadPoolExecutor, tenant: str, work: Callable[[], AdapterRef]
    ) -> AdapterRef:
        """Do the work though the client may go; then the tenant's slot is free."""
        done = asyncio.get_running_loop().run_in_executor(threads, work)
        done.add_done_callback(lambda _: self._free_slot(tenant))
        done.add_done_callback(_look_at)
        return await asyncio.shield(done)

    def _take_slot(self, tenant: str) -> None:
        if self.num_uploads >= MAX_UPLOADS:
            raise overloaded(f"{MAX_UPLOADS} uploads are being received or published already.")
        if self._uploads[tenant] >= MAX_UPLOADS_OF_TENANT:
            raise overloaded(
                f"{MAX_UPLOADS_OF_TENANT} uploads of {tenant} are being received or published "
                "already."
            )
        self._uploads[tenant] += 1

    def _free_slot(self, tenant: str) -> None:
        self._uploads[tenant] -= 1
        self._uploads += Counter()  # forget those that have none

    def _check_before(self, tenant: str, name: str, base: str, limits: UploadLimits) -> None:
        check_name("tenant", tenant)
        check_name("adapter", name)
        self.store.base_model(base)
        if not any(record.state == "live" for record in self.store.versions_of(tenant, name)):
            # Else the content may be there already, which takes no room.
            room = PublishLimits(max_versions=limits.max_adapters)
            room.check_number(tenant, self.store.num_live(tenant))

    def _publish(
        self,
        folder: UploadFolder,
        tenant: str,
        name: str,
        base: str,
        only_new: bool,
        author: str,
        limits: UploadLimits,
    ) -> AdapterRef:
        path = folder.path
        try:
            if (path / ARCHIVE).exists():
                unpack(path / ARCHIVE, path, limits.max_upload_bytes)
                (path / ARCHIVE).unlink()
            return self.store.publish(
                path,
                tenant,
                name,
                base,
                only_new=only_new,
                by=author,
                limits=_of_publishing(limits),
            )
        except OSError as error:
            raise disk_error(error) from error
        except Exception as error:
            raise _translated(error, str(path)) from error

    # ---- the rest ------------------------------------------------------------------------

    async def run(self, work: Callable[[], T]) -> T:
        """Do in a thread what asks the store. Raises ApiError, AdapterStoreError."""
        if self._num_waiting >= MAX_WAITING:
            raise overloaded(f"{MAX_WAITING} requests of the admin API are being answered already.")
        self._num_waiting += 1

        def translated() -> T:
            try:
                return work()
            except Exception as error:
                raise _translated(error) from error

        done = asyncio.get_running_loop().run_in_executor(self._others, translated)
        done.add_done_callback(self._finish)
        return await asyncio.shield(done)

    def _finish(self, done: asyncio.Future[T]) -> None:
        self._num_waiting -= 1
        _look_at(done)

    async def page(self, wanted: Wanted, after: Position | None, limit: int) -> Page:
        return await self.run(lambda: page_of(self.store, wanted, after, limit))

    async def audit(self, before: int | None, limit: int, tenant: str | None) -> AuditPage:
        return await self.run(lambda: self.store.audit(before, limit, tenant))

    async def find(
        self, tenant: str, full_name: str
    ) -> tuple[AdapterRecord, AdapterManifest | None]:
        """Return a version, in whatever state, and its manifest unless that was removed."""

        def look() -> tuple[AdapterRecord, AdapterManifest | None]:
            record = version_of(self.store, tenant, full_name)
            try:
                return record, self.store.manifest(record.digest)
            except ObjectNotFound:
                return record, None

        return await self.run(look)

    async def alias(
        self,
        by: str,
        place: tuple[str, str],
        alias: str,
        weights: Mapping[int, float],
        make_trial: Callable[[], Trial | None],
    ) -> tuple[AliasView, Mapping[str, Any] | None]:
        """Make an alias of a (tenant, name) mean these versions; return what it means then."""
        tenant, name = place

        def work() -> tuple[AliasView, Mapping[str, Any] | None]:
            self.store.share(tenant, name, alias, weights, make_trial(), by)
            return alias_state(self.store, tenant, f"{name}@{alias}")

        return await self.run(work)

    async def alias_state(
        self, tenant: str, full_name: str
    ) -> tuple[AliasView, Mapping[str, Any] | None]:
        """Return what an alias means, and what its trial has shown, if it has one."""
        return await self.run(lambda: alias_state(self.store, tenant, full_name))

    async def change_state(
        self, publisher: Publisher, tenant: str, full_name: str, state: str
    ) -> Sequence[int]:
        """Make versions live, retired or deleted; return which ones."""
        by = publisher.author
        if state == "retired":
            return await self.run(lambda: self.store.retire(tenant, full_name, by))
        if state == "deleted":
            return await self.run(lambda: self.store.delete(tenant, full_name, by))
        wanted = self._tenants.upload_limits(tenant, self._defaults)
        limits = PublishLimits(None, wanted.max_adapters, wanted.max_stored_bytes)
        ref = await self.run(lambda: self.store.restore(tenant, full_name, by, limits))
        return (ref.version,)

    async def verify(self, tenant: str | None, name: str | None) -> AsyncIterator[bytes]:
        """Begin to hash live versions; return the lines of the answer. One at a time."""
        wanted = Wanted(tenant or "", name or "")
        records = await self.run(lambda: _all_of(self.store, wanted))
        if name is not None and not records:
            raise ApiError(404, f"There is no live adapter {name[:96]!r}.", param="name")
        # Known by whether it is still there: a client that goes before the first line starts none.
        if self._verification is not None and self._verification() is not None:
            raise overloaded("One verification is running already.")
        verification = Verification(self.store, records)
        self._verification = weakref.ref(verification)
        return verification.lines()


def _all_of(store: AdapterStore, wanted: Wanted) -> Sequence[AdapterRecord]:
    found: list[AdapterRecord] = []
    page = page_of(store, wanted, None, PAGE)
    while True:
        found += page.records
        if page.next_after is None:
            return found
        page = page_of(store, wanted, page.next_after, PAGE)


def alias_state(
    store: AdapterStore, tenant: str, full_name: str
) -> tuple[AliasView, Mapping[str, Any] | None]:
    """Look up an alias and what its trial has shown. Raises AdapterNotFound, InvalidName."""
    store.refresh()
    view = store.alias_view(tenant, full_name)
    if view is None or not view.shares:
        raise AdapterNotFound(f"tenant {tenant} has no alias {full_name!r}")
    if view.trial is None:
        return view, None
    tallies = merged([decode_counts(each) for each in store.trial_counts(view.began)])
    return view, judged(view, view.trial, tallies)[1]


def check_right(publisher: Publisher, tenant: str) -> None:
    """Raise ApiError unless the key manages this tenant's adapters, whatever there are."""
    if not publisher.may_manage(tenant):
        raise forbidden(
            f"This key manages the adapters of {publisher.tenant}, not those of {tenant[:96]!r}."
        )


def _look_at(done: "asyncio.Future[T]") -> None:
    """Take an error that nobody may wait for any more."""
    if not done.cancelled():
        done.exception()


def _of_publishing(limits: UploadLimits) -> PublishLimits:
    """Leave out what counts while bytes come."""
    return PublishLimits(limits.max_lora_rank, limits.max_adapters, limits.max_stored_bytes)


def _translated(error: Exception, folder: str = "") -> Exception:
    """Make an answer of what is wrong with the request; other errors stay what they are.

    A message that names the upload's folder on the server is rid of it.
    """
    sentence = f"{error}."
    if folder:
        sentence = sentence.replace(f"{folder}/", "").replace(folder, "the upload")
    match error:
        case InvalidName():
            return invalid(sentence, "name")
        case InvalidShares():
            return invalid(sentence, "versions")
        case AdapterNotFound():
            return ApiError(404, sentence, param="name", code="adapter_not_found")
        case NoRoom():
            return ApiError(409, sentence, code="limit_exceeded")
        case LimitExceeded():
            return invalid(sentence, code="limit_exceeded")
        case AdapterInvalid() | AdapterTooLarge():
            return invalid(sentence, "file", "adapter_invalid")
        case BaseNotFound():
            return invalid(sentence, "base")
        case FilesRemoved():
            return ApiError(409, sentence, code="files_removed")
        case AdapterExists():
            return ApiError(409, sentence, param="name", code="adapter_exists")
        case _:
            return error
