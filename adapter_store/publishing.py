"""Bring an adapter's files and its name into the store, in an order in which none is lost."""

from adapter_store.blobs import Blobs
from adapter_store.errors import FilesRemoved
from adapter_store.manifest import PreparedAdapter
from adapter_store.names import AdapterRef
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
) -> AdapterRef:
    """Upload a checked adapter and append its record.

    The log decides whether a collection of garbage came in between: then the files are uploaded
    again, to a place that the collector does not know. Raises InvalidName, StoreCorrupt, and
    AdapterExists if the name should be new and is not.
    """
    registry.refresh()
    while True:
        place = registry.place_of(prepared.manifest.digest)
        blobs.upload(prepared, place, on_bytes)
        try:
            return registry.publish(tenant, name, prepared.manifest, place.generation, only_new)
        except FilesRemoved:
            continue
