"""Publish adapters of random bytes over any object store, and check what a store serves."""

from collections.abc import Mapping
from pathlib import Path

from adapter_store.blobs import Blobs
from adapter_store.garbage import Collector, Garbage
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.limits import NO_LIMITS, PublishLimits
from adapter_store.manifest import CONFIG_NAME, PreparedAdapter
from adapter_store.names import AdapterRef, Place
from adapter_store.object_store import ObjectStore
from adapter_store.publishing import publish, restore
from adapter_store.registry import Registry
from tests.adapter_store.synthetic import synthetic


def prepare_synthetic(folder: Path, seed: int) -> PreparedAdapter:
    """Write the weights of this seed's adapter, unless they are there."""
    manifest, files = synthetic(seed)
    weights = folder / str(seed) / WEIGHTS_NAME
    if not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        weights.write_bytes(files[WEIGHTS_NAME])
    return PreparedAdapter(manifest, files[CONFIG_NAME], weights)


class Publisher:
    """One process that uses a store: what AdapterStore puts together, without checks of uploads."""

    def __init__(self, objects: ObjectStore, folder: Path) -> None:
        self.objects = objects
        self.registry = Registry(objects, wall_clock=lambda: 12.5)
        self.blobs = Blobs(objects)
        self.collector = Collector(objects, self.registry)
        self._folder = folder

    def publish(self, name: str, seed: int, limits: PublishLimits = NO_LIMITS) -> AdapterRef:
        prepared = prepare_synthetic(self._folder, seed)
        return publish(
            self.blobs, self.registry, "t", name, prepared, lambda _: None, limits=limits
        )

    def restore(self, full_name: str) -> AdapterRef:
        return restore(self.blobs, self.registry, "t", full_name, self._folder)

    def collect(self, grace_s: float = 0) -> Garbage:
        return self.collector.remove(self.collector.find(grace_s), lambda _: None)


def served(objects: ObjectStore) -> Mapping[str, str]:
    """Read a store as a new process does; return digests by name@version, name and name@alias.

    Asserts that the log can be read to its end and that each file is what it should be.
    """
    registry, blobs = Registry(objects, wall_clock=lambda: 0.0), Blobs(objects)
    registry.refresh()
    found: dict[str, str] = {}
    for record in registry.list():
        place = Place(record.digest, record.generation)
        assert list(blobs.problems(place, lambda _: None)) == []
        for selector in (f"@{record.version}", *(f"@{alias}" for alias in record.aliases)):
            full_name = record.name + selector.replace("@latest", "")
            found[full_name] = registry.resolve(record.tenant, full_name).digest
            assert found[full_name] == record.digest
    return found
