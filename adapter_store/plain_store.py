"""PlainStore: what AdapterStore does for adapters that lie in plain folders."""

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from adapter_store.bases import BaseModel
from adapter_store.disk_cache import DiskCache
from adapter_store.errors import AdapterInvalid, AdapterNotFound
from adapter_store.names import AdapterRef
from adapter_store.object_store import ObjectStore
from adapter_store.own_files import NO_OWN_FILES, UPLOADED_FILES, OwnFiles
from adapter_store.plain_folder import PlainAdapter, own_files_of
from adapter_store.plain_folders import PlainFolders

MAX_REFUSED = 10_000  # states of adapters of which it is known that they are none


class PlainStore:
    """Folders below one root, and the disk cache that they are fetched to. Thread-safe."""

    def __init__(
        self,
        folders: PlainFolders,
        objects: ObjectStore,
        cache: DiskCache,
        base_model: Callable[[str], BaseModel],
        scratch: Path,
    ) -> None:
        self.folders = folders
        self._objects = objects  # what the folders are in, for reads that take long
        self._cache = cache
        self._base_model = base_model
        self._scratch = scratch
        self._lock = threading.Lock()
        self._refused: OrderedDict[str, str] = OrderedDict()  # by digest: why

    def find(self, full_name: str, base: str | None, may_look: bool) -> AdapterRef:
        """Resolve a name; without a look, what takes one is not found.

        Raises AdapterNotFound, InvalidName, SourceUnavailable.
        """
        if may_look:
            return self.folders.resolve(full_name, base)
        found = self.folders.known(full_name, base)
        if found is None:
            raise AdapterNotFound(f"{full_name!r} is not known from memory")
        return found

    def ensure_local(self, ref: AdapterRef, is_wanted: Callable[[], bool]) -> Path:
        """Return the adapter's verified folder, fetched and checked if need be.

        What was refused once is refused without a fetch, until its files change. Raises what
        `AdapterStore.ensure_local` raises, and AdapterInvalid.
        """
        if found := self._cache.find(ref.digest):
            return found
        with self._lock:
            reason = self._refused.get(ref.digest)
        if reason is not None:
            raise AdapterInvalid(reason)
        origin, base = self.folders.origin_of(ref), self._base_model(ref.base)
        adapter = PlainAdapter(origin, ref.name, base, self._objects, is_wanted)
        try:
            return self._cache.ensure_built(ref.digest, adapter)
        except AdapterInvalid as error:
            self._refuse(ref.digest, str(error))
            raise

    def is_bare(self, ref: AdapterRef) -> bool:
        """Tell from memory whether the adapter brings nothing beside its weights."""
        seen = self.folders.seen(ref)
        return seen is not None and not seen.has_any(UPLOADED_FILES)

    def own_files(self, ref: AdapterRef) -> OwnFiles:
        """Read what the adapter brings beside its weights. Raises AdapterInvalid."""
        origin = self.folders.origin_of(ref)
        if not origin.has_any(UPLOADED_FILES):
            return NO_OWN_FILES
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            base = self._base_model(ref.base)
            return own_files_of(self._objects, ref.name, origin, base, Path(name))

    def _refuse(self, digest: str, reason: str) -> None:
        with self._lock:
            self._refused[digest] = reason
            if len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)
