"""Bring an adapter's files and its name into the store, in an order in which none is lost."""

import tempfile
from pathlib import Path

from adapter_store.blobs import Blobs
from adapter_store.errors import FilesRemoved, ObjectNotFound
from adapter_store.life_cycle import restorable
from adapter_store.limits import NO_LIMITS, PublishLimits
from adapter_store.manifest import PreparedAdapter
from adapter_store.names import AdapterRef, Place
from adapter_store.object_store import OnBytes
from adapter_store.registry import Registry


def publish(
    blobs: Blobs,
    registry: Registry,
    tenant: str,
    name: str,
    prepared: PreparedAdapter,
    on_bytes: OnBytes,
    only_new: bool = False,
    by: str = "",
    limits: PublishLimits = NO_LIMITS,
) -> AdapterRef:
    """Upload a checked adapter and append its record.

    The log decides whether a collection of garbage came in between: then the files are uploaded
    again, to a place that the collector does not know. Raises InvalidName, LimitExceeded,
    StoreCorrupt, and AdapterExists if the name should be new and is not.
    """
    registry.refresh()
    registry.check_room(tenant, name, prepared.manifest, limits)
    while True:
        place = registry.place_of(prepared.manifest.digest)
        blobs.upload(prepared, place, on_bytes)
        try:
            return registry.publish(
                tenant, name, prepared.manifest, place.generation, only_new, by, limits
            )
        except FilesRemoved:
            continue


def publish_again(
    blobs: Blobs,
    registry: Registry,
    source: tuple[str, str],
    tenant: str,
    name: str,
    only_new: bool = False,
    by: str = "",
    limits: PublishLimits = NO_LIMITS,
) -> AdapterRef:
    """Publish what a tenant's live name[@version|alias] means under another name, too.

    No file is moved: both are of one digest. Raises InvalidName, AdapterNotFound, LimitExceeded,
    ObjectNotFound, StoreCorrupt, and AdapterExists if the name should be new and is not.
    """
    registry.refresh()
    while True:
        digest = registry.resolve(*source).digest
        place = registry.place_of(digest)
        manifest = blobs.manifest(place)
        registry.check_room(tenant, name, manifest, limits)
        try:
            return registry.publish(tenant, name, manifest, place.generation, only_new, by, limits)
        except FilesRemoved:  # it was retired meanwhile, and garbage was collected
            continue


def restore(
    blobs: Blobs,
    registry: Registry,
    tenant: str,
    full_name: str,
    scratch: Path,
    by: str = "",
    limits: PublishLimits = NO_LIMITS,
) -> AdapterRef:
    """Make a retired name@version live again, if its files are still there.

    A collection of garbage that has begun may remove them at any time, so they are copied to where
    it does not look. Raises InvalidName, AdapterNotFound, LimitExceeded, StoreCorrupt, and
    FilesRemoved if it was too late.
    """
    registry.refresh()
    name = full_name.partition("@")[0]
    while True:
        found = restorable(registry.versions_of(tenant, name), tenant, full_name)
        if found.state != "live":
            limits.check_number(tenant, registry.num_live(tenant))
            place = registry.place_of(found.digest)
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                try:
                    blobs.copy(Place(found.digest, found.generation), place, Path(folder))
                except ObjectNotFound as error:
                    raise FilesRemoved(
                        f"{full_name} of tenant {tenant} cannot be restored, its files were "
                        "removed: publish it again"
                    ) from error
            try:
                registry.restore(tenant, name, found.version, place.generation, by, limits)
            except FilesRemoved:
                continue
        return registry.resolve(tenant, full_name)
