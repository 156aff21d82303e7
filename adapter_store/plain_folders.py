"""Find adapters that lie as plain PEFT folders below one root: <root>/<name>/adapter_config.json.

Nobody publishes them, so one listing of a folder says whether it is there and in which state. What
it says counts for a short time, also that there is nothing, and longer while the root cannot be
read. Never writes.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapter_store.errors import AdapterInvalid, AdapterNotFound, InvalidName, SourceUnavailable
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.names import LATEST, AdapterRecord, AdapterRef, check_name, split_name
from adapter_store.object_store import ObjectStore
from adapter_store.own_files import UPLOADED_FILES
from adapter_store.peft_config import CONFIG_NAME
from adapter_store.plain_origin import PLAIN_NAMESPACE, UNVERSIONED, PlainFile, PlainOrigin

FRESH_S = 2.0  # that a look counts
KNOWN = 10_000  # folders that are remembered, and as many names without one
MAX_LOOKS = 16  # at a time: who waits longer than the patience is refused
PATIENCE_S = 2.0
MAX_FILES = 1000  # of a folder
USED = (CONFIG_NAME, WEIGHTS_NAME, *UPLOADED_FILES)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Look:
    """What was seen of a folder; None: there is no adapter."""

    origin: PlainOrigin | None
    at_s: float


class PlainFolders:
    """The adapters below one root, as of the last look at each. Thread-safe.

    `root` is the address by which they are told from those of another root.
    """

    def __init__(
        self, root: str, objects: ObjectStore, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._root = root.rstrip("/")
        self._objects = objects
        self._clock = clock
        self._lock = threading.Lock()  # guards the two below; never held over I/O
        self._there: OrderedDict[str, _Look] = OrderedDict()
        self._absent: OrderedDict[str, _Look] = OrderedDict()
        self._looks = threading.Semaphore(MAX_LOOKS)
        self._in_turn = [threading.Lock() for _ in range(64)]  # so that a name is looked up once

    def known(self, full_name: str, base: str | None) -> AdapterRef | None:
        """Resolve a name from memory; None if that takes a look.

        Raises AdapterNotFound, InvalidName.
        """
        name = _plain_name(full_name)
        look = self._fresh(name)
        return None if look is None else _ref(name, look.origin, base)

    def resolve(self, full_name: str, base: str | None) -> AdapterRef:
        """Resolve a name. Raises AdapterNotFound, InvalidName, SourceUnavailable."""
        name = _plain_name(full_name)
        look = self._fresh(name)
        return _ref(name, (look or self._look(name)).origin, base)

    def origin_of(self, ref: AdapterRef) -> PlainOrigin:
        """Look at an adapter again. Raises SourceUnavailable if it is in another state by now."""
        look = self._fresh(ref.name)
        if look is None or look.origin is None or look.origin.digest(ref.base) != ref.digest:
            look = self._look(ref.name, anew=True)
        if look.origin is None or look.origin.digest(ref.base) != ref.digest:
            raise SourceUnavailable(
                f"{PLAIN_NAMESPACE}/{ref.name} has changed since the request came"
            )
        return look.origin

    def seen(self, ref: AdapterRef) -> PlainOrigin | None:
        """Return the state that a reference means, if the last look saw it."""
        with self._lock:
            look = self._there.get(ref.name)
        found = None if look is None else look.origin
        return found if found is not None and found.digest(ref.base) == ref.digest else None

    def list_from(self, first_name: str, num_names: int) -> Sequence[AdapterRecord]:
        """List adapters in the order of their keys, from this name on, without looking at each.

        A name that ends in a zero character begins behind it.
        """
        name = first_name.rstrip("\0")
        is_first = bool(name) and name == first_name and self._is_there(name)
        found = [_record(name)] if is_first else []
        start = f"{name}/" if name else ""
        while len(found) < num_names:
            folders = self._objects.folders(start, num_names - len(found))
            if not folders:
                break
            found += [_record(folder[:-1]) for folder in folders if _is_name(folder[:-1])]
            start = folders[-1]
        return found

    # ---- inside --------------------------------------------------------------------------------

    def _is_there(self, name: str) -> bool:
        return _is_name(name) and (self._fresh(name) or self._look(name)).origin is not None

    def _fresh(self, name: str) -> _Look | None:
        with self._lock:
            look = self._there.get(name) or self._absent.get(name)
        return look if look is not None and self._clock() < look.at_s + FRESH_S else None

    def _look(self, name: str, anew: bool = False) -> _Look:
        """List a folder; what many ask for at a time is listed once."""
        asked_s = self._clock()
        with self._in_turn[hash(name) % len(self._in_turn)]:
            with self._lock:
                known = self._there.get(name) or self._absent.get(name)
            if known is not None and known.at_s >= asked_s - (0.0 if anew else FRESH_S):
                return known
            if not self._looks.acquire(timeout=PATIENCE_S):
                raise SourceUnavailable(f"{MAX_LOOKS} folders are being looked at already")
            try:
                origin = self._list(name)
            except SourceUnavailable as error:
                if known is None or known.origin is None:
                    raise
                _log.warning("%s/%s is taken as it was: %s", PLAIN_NAMESPACE, name, error)
                origin = known.origin
            finally:
                self._looks.release()
            return self._keep(name, _Look(origin, self._clock()))

    def _list(self, name: str) -> PlainOrigin | None:
        listed = self._objects.describe_folder(f"{name}/", MAX_FILES)
        files = {each.key.removeprefix(f"{name}/"): each for each in listed}
        if CONFIG_NAME not in files:
            return None
        used = [files[each] for each in USED if each in files]
        found = (PlainFile(f.key.removeprefix(f"{name}/"), f.etag, f.nbytes) for f in used)
        return PlainOrigin(f"{self._root}/{name}", tuple(found))

    def _keep(self, name: str, look: _Look) -> _Look:
        with self._lock:
            self._there.pop(name, None)
            self._absent.pop(name, None)
            kept = self._absent if look.origin is None else self._there
            kept[name] = look
            if len(kept) > KNOWN:
                kept.popitem(last=False)
        return look


def check_origin(origin: PlainOrigin) -> PlainOrigin:
    """Return it; AdapterInvalid unless its weights are there, and each file can be told apart."""
    if not origin.has_any([WEIGHTS_NAME]):
        raise AdapterInvalid(f"the adapter's folder has no {WEIGHTS_NAME}")
    nameless = [file.name for file in origin.files if not file.etag]
    if nameless:
        raise AdapterInvalid(f"the store gives no ETag of {nameless[0]}: publish the adapter")
    return origin


def _plain_name(full_name: str) -> str:
    name, selector = split_name(full_name)
    if selector != LATEST:
        raise AdapterNotFound(
            f"{PLAIN_NAMESPACE}/{name} has no versions, so there is no {full_name!r}"
        )
    return name


def _ref(name: str, origin: PlainOrigin | None, base: str | None) -> AdapterRef:
    if origin is None:
        raise AdapterNotFound(f"there is no folder of an adapter {name!r}")
    base = base or ""  # whatever it is
    return AdapterRef(PLAIN_NAMESPACE, name, UNVERSIONED, origin.digest(base), base)


def _record(name: str) -> AdapterRecord:
    """Say of a folder what is known before anybody has looked into it."""
    return AdapterRecord(PLAIN_NAMESPACE, name, UNVERSIONED, "", "", 0, 0, 0.0, (LATEST,))


def _is_name(name: str) -> bool:
    try:
        check_name("adapter", name)
    except InvalidName:
        return False
    return True
