"""Store the files of adapters under blobs/<digest>/, read them back and check them.

What is uploaded after a collection of garbage lies under blobs/<digest>.<generation>/, so a
collector that was interrupted long ago cannot remove it. The digest is that of the content, so each
place that holds a file of a digest holds the same.

Invariant: the manifest is written last, so a place that has one is complete.
"""

import hashlib
import re
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from adapter_store.errors import ObjectNotFound, SourceUnavailable, StoreCorrupt
from adapter_store.layout import WEIGHTS_NAME
from adapter_store.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    AdapterManifest,
    PreparedAdapter,
    parse_manifest,
)
from adapter_store.names import Place
from adapter_store.object_store import CHUNK_BYTES, JUST_READ, ObjectStore, OnBytes, Reading
from adapter_store.own_files import MAX_OWN_BYTES, OWN_NAMES, OwnFiles, parse_own_files

BLOBS = "blobs/"
_FILES = (CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, *OWN_NAMES)
_NAMES = "|".join(re.escape(name) for name in _FILES)
_KEY = re.compile(rf"{BLOBS}([0-9a-f]{{64}})(?:\.([1-9][0-9]{{0,17}}))?/(?:{_NAMES})")

T = TypeVar("T")


class Blobs:
    """The files of all adapters in one object store. Thread-safe."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def upload(self, prepared: PreparedAdapter, place: Place, on_bytes: OnBytes) -> None:
        """Store an adapter's files unless they are there already.

        Raises StoreCorrupt if the weights have changed since they were checked.
        """
        manifest = prepared.manifest
        if self._is_complete(manifest, place):
            return
        weights = prepared.weights
        sha256 = manifest.files[weights.name].sha256
        # The weights first: what takes long leaves nothing behind that would look old meanwhile.
        self._objects.put_file(file_key(place, weights.name), weights, sha256, on_bytes)
        self._objects.put(file_key(place, CONFIG_NAME), prepared.config)
        for name, content in prepared.own_files.items():
            self._objects.put(file_key(place, name), content)
        self._objects.put_if_absent(file_key(place, MANIFEST_NAME), manifest.to_json())

    def download(self, place: Place, name: str, path: Path, how: Reading = JUST_READ) -> None:
        """Write one file of an adapter to `path`, from this place or another of its digest.

        Raises ObjectNotFound, SourceUnavailable, DownloadStopped.
        """
        try:
            self._read(place, name, lambda key: self._objects.get_file(key, path, how))
        except OSError as error:
            raise SourceUnavailable(f"cannot write {path}: {error}") from error

    def copy(self, source: Place, target: Place, scratch: Path) -> None:
        """Store an adapter's files in another place of its digest, unless they are there already.

        They pass through the folder `scratch`. Raises ObjectNotFound, StoreCorrupt.
        """
        manifest = self.manifest(source)
        if self._is_complete(manifest, target):
            return
        for name, entry in manifest.files.items():
            self.download(source, name, scratch / name)
            key = file_key(target, name)
            self._objects.put_file(key, scratch / name, entry.sha256, lambda _: None)
            (scratch / name).unlink()
        self._objects.put_if_absent(file_key(target, MANIFEST_NAME), manifest.to_json())

    def manifest(self, place: Place) -> AdapterManifest:
        """Read an adapter's manifest, as `download` does. Raises ObjectNotFound, StoreCorrupt."""
        return parse_manifest(self._read(place, MANIFEST_NAME, self._objects.get), place.digest)

    def own_files(self, place: Place) -> OwnFiles:
        """Read what an adapter brings beside its weights, as `download` does.

        Raises ObjectNotFound, StoreCorrupt.
        """
        entries = self.manifest(place).files
        names = [name for name in OWN_NAMES if name in entries]
        found = {name: self._checked(place, name, entries[name].sha256) for name in names}
        return parse_own_files(found, place.digest)

    def _checked(self, place: Place, name: str, sha256: str) -> bytes:
        raw = self._read(place, name, self._first_bytes)
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise StoreCorrupt(f"{file_key(place, name)} does not have the sha256 {sha256}")
        return raw

    def problems(self, place: Place, on_bytes: OnBytes) -> Generator[str, None, None]:
        """Hash an adapter's files; yield one sentence for each that is missing or damaged."""
        try:
            raw = self._objects.get(file_key(place, MANIFEST_NAME))
            manifest = parse_manifest(raw, place.digest)
        except (ObjectNotFound, StoreCorrupt) as error:
            yield str(error)
            return
        for name, expected in manifest.files.items():
            key = file_key(place, name)
            try:
                sha256 = self._hash(key, on_bytes)
            except ObjectNotFound as error:
                yield str(error)
                continue
            if sha256 != expected.sha256:
                yield f"{key} has sha256 {sha256}, not {expected.sha256}"

    def _is_complete(self, manifest: AdapterManifest, place: Place) -> bool:
        """Check that all files are there, with the right sizes."""
        if self._objects.size(file_key(place, MANIFEST_NAME)) is None:
            return False
        sizes = {name: self._objects.size(file_key(place, name)) for name in manifest.files}
        return sizes == {name: entry.nbytes for name, entry in manifest.files.items()}

    def _first_bytes(self, key: str) -> bytes:
        return self._objects.get_range(key, 0, MAX_OWN_BYTES)

    def _read(self, place: Place, name: str, read: Callable[[str], T]) -> T:
        """Read a file from its place, or if it is not there from another of its digest."""
        try:
            return read(file_key(place, name))
        except ObjectNotFound:
            for other in self._other_places(place):
                with suppress(ObjectNotFound):
                    return read(file_key(other, name))
            raise

    def _other_places(self, place: Place) -> list[Place]:
        """List where else a digest's files may be, the newest first."""
        found = {parse_place(key) for key in self._objects.list(f"{BLOBS}{place.digest}")}
        others = (each for each in found if each is not None and each != place)
        return sorted(others, reverse=True)

    def _hash(self, key: str, on_bytes: OnBytes) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks(key):
            digest.update(chunk)
            on_bytes(len(chunk))
        return digest.hexdigest()

    def _chunks(self, key: str) -> Generator[bytes, None, None]:
        start = 0
        while chunk := self._objects.get_range(key, start, CHUNK_BYTES):
            yield chunk
            start += len(chunk)
            if len(chunk) < CHUNK_BYTES:
                return


def file_key(place: Place, name: str) -> str:
    """Return the key of an adapter's file."""
    suffix = f".{place.generation}" if place.generation else ""
    return f"{BLOBS}{place.digest}{suffix}/{name}"


def parse_place(key: str) -> Place | None:
    """Return the place that a key is in; None if it is no adapter's file."""
    match = _KEY.fullmatch(key)
    return None if match is None else Place(match[1], int(match[2] or 0))
