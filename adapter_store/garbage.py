"""Find what an adapter store needs no more, and remove it.

That is log records and snapshots that newer snapshots stand for (what the records say of who did
what is kept in the audit log), and the files of adapters without
a live version. Everything is spared for a while: by the store's clock, since it was written, and
files also since the record that retired their last version.

The time only keeps slow readers and uploads undisturbed. What makes a collection safe is the log:
its `collect` record has a place among all others, so an upload's record comes before it, and keeps
the files, or after it, and then the files are uploaded again to a place of their own.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adapter_store.audit import AuditLog
from adapter_store.blobs import BLOBS, parse_place
from adapter_store.errors import AccessDenied
from adapter_store.names import Place
from adapter_store.object_store import ObjectStore, StoredObject
from adapter_store.record_log import number_of
from adapter_store.registry import Registry
from adapter_store.trial_counts import TRIALS, trial_of

BATCH = 64  # objects that are removed between two reports

OnObjects = Callable[[int], object]  # progress callback: objects removed since the last call
IsOld = Callable[[StoredObject], bool]


@dataclass(frozen=True, slots=True)
class Garbage:
    """Objects that are not needed."""

    records: Sequence[StoredObject]
    snapshots: Sequence[StoredObject]
    files: Sequence[StoredObject]
    counts: Sequence[StoredObject] = ()  # of trials that are over

    @property
    def objects(self) -> Sequence[StoredObject]:
        """All of them, in the order in which they are removed."""
        return [*self.files, *self.snapshots, *self.records, *self.counts]

    @property
    def nbytes(self) -> int:
        """The bytes in all of them."""
        return sum(each.nbytes for each in self.objects)

    @property
    def places(self) -> set[Place]:
        """The uploads that the files are of."""
        return {place for each in self.files if (place := parse_place(each.key)) is not None}


class Collector:
    """Collects the garbage of one store. Any number may be at work at once, and stop anywhere."""

    def __init__(self, objects: ObjectStore, registry: Registry) -> None:
        self._objects = objects
        self._registry = registry
        self._audit = AuditLog(objects)

    def find(self, grace_s: float) -> Garbage:
        """List what is not needed, and has been there and unneeded for `grace_s`; write nothing.

        Raises StoreCorrupt if the log cannot be read to its end.
        """
        self._registry.refresh()
        is_old = _older_than(self._objects.now_s() - grace_s if grace_s else None)
        covered = self._registry.covered()
        records = self._objects.describe("log/")
        snapshots = self._objects.describe("snapshots/")
        recent = {number_of(each.key) for each in records if not is_old(each)}
        return Garbage(
            _numbered(records, covered, is_old),
            _numbered(snapshots, covered - 1, is_old),
            self._unused_files(is_old, self._registry.places_retired_by(recent)),
            self._old_counts(is_old),
        )

    def remove(self, garbage: Garbage, on_objects: OnObjects) -> Garbage:
        """Remove what was found, unless it is used again; return what was removed.

        Raises AccessDenied, SourceUnavailable, StoreCorrupt.
        """
        with _named_rights():
            unused = self._still_unused(garbage)
            self._audit.archive([each.key for each in unused.records])
            objects = unused.objects
            for start in range(0, len(objects), BATCH):
                batch = objects[start : start + BATCH]
                self._objects.remove([each.key for each in batch])
                on_objects(len(batch))
            self._registry.save_overdue_snapshot()
        return unused

    def _old_counts(self, is_old: IsOld) -> Sequence[StoredObject]:
        """List what processes that died have left of trials that are over."""
        going_on = self._registry.trials()
        found = self._objects.describe(TRIALS)
        return [each for each in found if is_old(each) and trial_of(each.key) not in going_on]

    def _unused_files(self, is_old: IsOld, spared: set[Place]) -> Sequence[StoredObject]:
        uploads: dict[Place, list[StoredObject]] = {}
        for each in self._objects.describe(BLOBS):
            if place := parse_place(each.key):
                uploads.setdefault(place, []).append(each)
        unused = (
            files
            for place, files in uploads.items()
            if place not in spared and not self._registry.is_live_at(place)
        )
        return [each for files in unused if all(map(is_old, files)) for each in files]

    def _still_unused(self, garbage: Garbage) -> Garbage:
        """Leave out files that a record names by now; after this none can name the others."""
        if garbage.objects:
            self._objects.check_writes()
        if any(place.generation >= self._registry.generation for place in garbage.places):
            self._registry.begin_generation()
        unused = {each for each in garbage.places if not self._registry.is_live_at(each)}
        files = [each for each in garbage.files if parse_place(each.key) in unused]
        return Garbage(garbage.records, garbage.snapshots, files, garbage.counts)


def _older_than(limit_s: float | None) -> IsOld:
    return lambda each: limit_s is None or each.modified_s <= limit_s


def _numbered(objects: Iterable[StoredObject], last: int, is_old: IsOld) -> Sequence[StoredObject]:
    """Select the old records or snapshots up to this number."""
    numbered = ((number_of(each.key), each) for each in objects)
    return [
        each for number, each in numbered if number is not None and number <= last and is_old(each)
    ]


@contextmanager
def _named_rights() -> Generator[None, None, None]:
    try:
        yield
    except AccessDenied as error:
        raise AccessDenied(
            f"to remove garbage takes the rights to write and to remove: {error}"
        ) from error
